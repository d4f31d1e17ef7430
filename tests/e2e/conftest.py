"""The stack, fetched once, and a daemon with one guest on it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

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


@pytest.fixture(scope="session")
def stack() -> Stack:
    """QEMU and all guest kernels; fetched on the first run ever."""
    return ensure(KERNELS)


@pytest.fixture
def serve(stack: Stack, tmp_path: Path) -> Serve:
    """serve(kernel="6.12", options="...", **boot arguments) starts daemon and guest."""

    @asynccontextmanager
    async def start(
        kernel: str = "6.12",
        options: str = "",
        modprobe: tuple[str, ...] = ("virtio_balloon",),
        append: str = "",
    ) -> AsyncIterator[Served]:
        configuration = f'[vm.{VM}.balloon]\nsocket = "{BALLOON_SOCKET}"\n{options}\n'
        async with (
            VhostdProcess.start(tmp_path, configuration) as daemon,
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
    prints for it.
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
    ) -> AsyncIterator[ServedMemory]:
        monitor = tmp_path / "vmm.qmp"
        configuration = f'[vm.{VM}]\nqmp = "{monitor}"\n' if qmp else ""
        configuration += f"[vm.{VM}.balloon]\n" if balloon else ""
        async with VhostdProcess.start(tmp_path, configuration + devices) as daemon:
            words = ("--json", "qemu-args", VM, "--memory", memory)
            options: list[str] = json.loads(await daemon.ctl(*words))
            size = options[options.index("-m") + 1]
            # What the guest of the tests has anyway, its RAM, is the first of the objects.
            windows = options.index("-object", options.index("-object") + 1)
            async with boot(
                stack,
                kernel=kernel,
                memory=memory,
                max_memory=size.split("maxmem=")[1].split(",")[0],
                nodes=nodes,
                devices=[
                    *(
                        option
                        for option in options[windows:]
                        if not option.startswith("node,") and option != "-numa"
                    ),
                    *("-qmp", f"unix:{monitor},server=on,wait=off"),
                ],
                modprobe=modprobe,
                append=append,
            ) as guest:
                yield ServedMemory(daemon, guest)

    return start
