"""The stack, fetched once, and a daemon with one guest on it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from vhostd.units import GiB, MiB

from tests.daemon import VhostdProcess
from tests.vm.guest import Guest, balloon_device, boot
from tests.vm.stack import Stack, ensure

KERNELS = ("6.1", "6.12", "7")
VM = "web"
BALLOON_SOCKET = "web-balloon.sock"


@dataclass(frozen=True)
class Served:
    """A guest whose balloon the daemon serves as VM "web"."""

    daemon: VhostdProcess
    guest: Guest

    async def balloon(self) -> dict[str, int]:
        """The balloon part of its status."""
        balloon: dict[str, int] = (await self.daemon.status(VM))["balloon"]
        return balloon


Serve = Callable[..., AbstractAsyncContextManager[Served]]

WINDOW_ADDRESS = 0x1_4000_0000
ONLINE_MOVABLE = "memhp_default_state=online_movable"


def memory_device(
    number: int = 0, address: int = WINDOW_ADDRESS, size: str = "4GiB", options: str = ""
) -> str:
    """The configuration of device mem0, mem1, and so on."""
    return (
        f'[[vm.{VM}.mem]]\nid = "mem{number}"\nwindow_address = {address:#x}\n'
        f'size = "{size}"\n{options}\n'
    )


@dataclass(frozen=True)
class ServedMemory(Served):
    """A guest with virtio-mem devices, and a balloon if it was asked for."""

    async def mem(self, number: int = 0) -> dict[str, Any]:
        """One device's part of the VM's status."""
        mem: dict[str, Any] = (await self.daemon.status(VM))["mem"][number]
        return mem

    async def resize(self, size: int | str, *more: str, timeout_s: float = 60) -> None:
        """`mem resize --wait`."""
        await self.daemon.ctl(
            *("mem", "resize", VM, str(size), "--wait", "--timeout", str(timeout_s), *more),
            timeout_s=timeout_s + 20,
        )

    def window_memory(self, number: int = 0) -> int:
        """Bytes of host memory a device's window takes up."""
        return self.guest.host_memory(f"mem{number}-window")


ServeMemory = Callable[..., AbstractAsyncContextManager[ServedMemory]]

DISK_SIZE = 256 * MiB
DISK_MODULES = ("virtio_pmem", "nd_pmem")


def disk_device(
    image: Path, mode: str, number: int = 0, size: int = DISK_SIZE, options: str = ""
) -> str:
    """The configuration of device disk0, disk1, and so on."""
    address = WINDOW_ADDRESS + number * GiB
    window = f"window_address = {address:#x}\n" if mode == "window" else ""
    return (
        f'[[vm.{VM}.pmem]]\nid = "disk{number}"\nfile = "{image}"\nsize = {size}\n'
        f'mode = "{mode}"\n{window}{options}\n'
    )


@dataclass(frozen=True)
class ServedDisk(Served):
    """A guest with virtio-pmem devices."""

    async def pmem(self, number: int = 0) -> dict[str, Any]:
        """One device's part of the VM's status."""
        pmem: dict[str, Any] = (await self.daemon.status(VM))["pmem"][number]
        return pmem

    async def mount(self, options: str = "-o dax", device: str = "/dev/pmem0") -> None:
        """Mount the disk's file system at /mnt."""
        await self.guest.run(f"mount -t ext4 {options} {device} /mnt")


ServeDisk = Callable[..., AbstractAsyncContextManager[ServedDisk]]
"""serve_disk(devices, kernel="6.12", ...): what QEMU gets is what vhostctl prints for these."""


async def qemu_options(daemon: VhostdProcess, memory: str = "1G") -> tuple[list[str], str | None]:
    """What vhostctl says a VMM needs for the VM's devices, and the maxmem that goes with it.

    What the guest of the tests has anyway, its RAM, is left out.
    """
    options: list[str] = json.loads(await daemon.ctl("--json", "qemu-args", VM, "--memory", memory))
    size = options[options.index("-m") + 1]
    maxmem = size.split("maxmem=")[1].split(",")[0] if "maxmem=" in size else None
    ram = next(at for at, option in enumerate(options) if ",id=ram0," in option)
    return [
        option
        for option in options[ram + 1 :]
        if not option.startswith("node,") and option != "-numa"
    ], maxmem


@pytest.fixture(scope="session")
def stack() -> Stack:
    """QEMU and all guest kernels; fetched on the first run ever."""
    return ensure(KERNELS)


@pytest.fixture
def serve(stack: Stack, tmp_path: Path) -> Serve:
    """serve(kernel="6.12", options="...", keep=..., **boot arguments) starts daemon and guest."""

    @asynccontextmanager
    async def start(
        kernel: str = "6.12",
        options: str = "",
        modprobe: tuple[str, ...] = ("virtio_balloon",),
        append: str = "",
        keep: bool = False,
    ) -> AsyncIterator[Served]:
        configuration = f'[vm.{VM}.balloon]\nsocket = "{BALLOON_SOCKET}"\n{options}\n'
        async with (
            VhostdProcess.start(tmp_path, configuration, *(["--keep"] * keep)) as daemon,
            boot(
                stack,
                kernel=kernel,
                memory="1G",
                devices=balloon_device(tmp_path / BALLOON_SOCKET),
                modprobe=modprobe,
                append=append,
            ) as guest,
        ):
            yield Served(daemon, guest)

    return start


@pytest.fixture
def serve_memory(stack: Stack, tmp_path: Path) -> ServeMemory:
    """serve_memory(kernel, devices="", balloon=False, qmp=True, **boot arguments).

    devices: configuration of memory devices, by default one; what QEMU gets is what vhostctl
    prints for it. backend: more options for the memory of each window.
    """

    @asynccontextmanager
    async def start(
        kernel: str = "6.12",
        devices: str = memory_device(),
        *,
        balloon: bool = False,
        qmp: bool = True,
        modprobe: tuple[str, ...] = ("virtio_mem", "virtio_balloon"),
        append: str = ONLINE_MOVABLE,
        nodes: int = 1,
        memory: str = "1G",
        backend: str = "",
    ) -> AsyncIterator[ServedMemory]:
        monitor = tmp_path / "vmm.qmp"
        configuration = f'[vm.{VM}]\nqmp = "{monitor}"\n' if qmp else ""
        configuration += f"[vm.{VM}.balloon]\n" if balloon else ""
        async with VhostdProcess.start(tmp_path, configuration + devices) as daemon:
            options, max_memory = await qemu_options(daemon, memory)
            options = [
                option + backend if option.startswith("memory-backend-") else option
                for option in options
            ]
            async with boot(
                stack,
                kernel=kernel,
                memory=memory,
                max_memory=max_memory,
                nodes=nodes,
                devices=[*options, "-qmp", f"unix:{monitor},server=on,wait=off"],
                modprobe=modprobe,
                append=append,
            ) as guest:
                yield ServedMemory(daemon, guest)

    return start


@pytest.fixture
def serve_disk(stack: Stack, tmp_path: Path) -> ServeDisk:
    """See ServeDisk."""

    @asynccontextmanager
    async def start(
        devices: str,
        kernel: str = "6.12",
        *,
        balloon: bool = False,
        qmp: bool = True,
        append: str = "",
        environment: Mapping[str, str] | None = None,
        keep: bool = False,
    ) -> AsyncIterator[ServedDisk]:
        monitor = tmp_path / "vmm.qmp"
        configuration = f'[vm.{VM}]\nqmp = "{monitor}"\n' if qmp else ""
        configuration += f"[vm.{VM}.balloon]\n" if balloon else ""
        async with (
            VhostdProcess.start(
                tmp_path,
                configuration + devices,
                *(["--keep"] * keep),
                environment=environment,
            ) as daemon,
            guest_with_disks(stack, daemon, monitor, kernel, append) as guest,
        ):
            yield ServedDisk(daemon, guest)

    return start


@asynccontextmanager
async def guest_with_disks(
    stack: Stack, daemon: VhostdProcess, monitor: Path, kernel: str, append: str = ""
) -> AsyncIterator[Guest]:
    """Boot a guest with all devices the daemon has for it."""
    options, max_memory = await qemu_options(daemon, "512M")
    async with boot(
        stack,
        kernel=kernel,
        memory="512M",
        max_memory=max_memory,
        devices=[*options, "-qmp", f"unix:{monitor},server=on,wait=off"],
        modprobe=(*DISK_MODULES, "virtio_balloon"),
        append=append,
    ) as guest:
        yield guest
