"""Every device wherever it can be put: QEMU lives, and where there is a guest it has its devices.

At the root bus, at a PCIe root port and behind a PCI bridge; cold and hot-plugged; taken away and
plugged again. QEMU's options are those that vhostctl prints.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from vhostd.images.image_file import create_image
from vhostd.qmp import QmpError
from vhostd.units import GiB, MiB, TiB

from tests.daemon import VhostdProcess
from tests.e2e.conftest import VM
from tests.e2e.waiting import until
from tests.sampling import sampled
from tests.vm.bare import BUSES, Bare, QemuEnded, bare, bus_of, chardev, device, topology
from tests.vm.stack import Stack

pytestmark = pytest.mark.guest  # it needs the same QEMU as guests do

SIZE = 256 * MiB
WINDOWS = 0x2_4000_0000
KINDS = ("balloon0", "mem0", "shmem0", "window0")


def configuration(folder: Path, size: int = SIZE) -> str:
    """A VM with one device of each kind; size: of the disks."""
    for name in ("shmem0", "window0"):
        if not (folder / f"{name}.img").exists():
            create_image(folder / f"{name}.img", size)
    return f"""
[vm.{VM}.balloon]
[[vm.{VM}.mem]]
id = "mem0"
window_address = {WINDOWS:#x}
size = "1GiB"
[[vm.{VM}.pmem]]
id = "shmem0"
file = "{folder}/shmem0.img"
size = {size}
[[vm.{VM}.pmem]]
id = "window0"
file = "{folder}/window0.img"
size = {size}
mode = "window"
window_address = {WINDOWS + GiB:#x}
"""


@dataclass
class Options:
    """What vhostctl prints, taken apart.

    Attributes:
        machine: all but the vhost-user devices: machine, RAM and windows.
        devices: the value of -device of each, by the id of its chardev.
        sockets: where each is served.
    """

    machine: list[str]
    devices: dict[str, str]
    sockets: dict[str, Path]

    @classmethod
    async def of(cls, daemon: VhostdProcess, memory: str = "256M") -> Options:
        """Ask the daemon."""
        words: list[str] = json.loads(
            await daemon.ctl("--json", "qemu-args", VM, "--memory", memory)
        )
        found = cls([], {}, {})
        for name, value in zip(words[::2], words[1::2], strict=True):
            if value.startswith("vhost-user-test-device-pci,"):
                chardev_id = value.split("chardev=")[1].split(",")[0]
                found.devices[chardev_id] = f"{value},id={chardev_id}-device"
            elif name == "-chardev":
                words_of = dict(pair.split("=", 1) for pair in value.split(",")[1:])
                found.sockets[words_of["id"]] = Path(words_of["path"])
            else:
                found.machine += [name, value]
        return found

    def cold(self, kind: str) -> list[str]:
        """Options for all devices at buses of one kind."""
        options: list[str] = []
        for number, (id, value) in enumerate(self.devices.items()):
            options += ["-chardev", f"socket,id={id},path={self.sockets[id]}"]
            options += ["-device", f"{value},bus={bus_of(kind, number)}"]
        return options


async def states(daemon: VhostdProcess) -> dict[str, str]:
    """The state of each device, by its id."""
    status = await daemon.status(VM)
    devices = {"balloon0": status["balloon"]["state"]}
    devices |= {mem["id"]: mem["state"] for mem in status["mem"]}
    return devices | {pmem["id"]: pmem["state"] for pmem in status["pmem"]}


async def all_are(daemon: VhostdProcess, state: str, ids: Sequence[str] = KINDS) -> None:
    """Wait until these devices have a state."""
    await until(
        lambda: states(daemon),
        lambda found: all(found[id] == state for id in ids),
        20,
        f"{ids} {state}",
    )


async def plug(qemu: Bare, options: Options, id: str, bus: str) -> None:
    """Hot-plug one device."""
    await qemu.qmp.execute("chardev-add", **chardev(id, options.sockets[id]))
    await qemu.qmp.execute("device_add", **device(options.devices[id], bus))


@asynccontextmanager
async def served(folder: Path, size: int = SIZE) -> AsyncIterator[tuple[VhostdProcess, Options]]:
    """A daemon and what it says to QEMU."""
    async with VhostdProcess.start(folder, configuration(folder, size)) as daemon:
        yield daemon, await Options.of(daemon)


@pytest.mark.parametrize("kind", BUSES)
async def test_qemu_lives_with_all_devices_cold(kind: str, stack: Stack, tmp_path: Path) -> None:
    async with served(tmp_path) as (daemon, options):
        async with bare(stack, [*options.machine, *topology(), *options.cold(kind)]) as qemu:
            await all_are(daemon, "connected")
            assert await qemu.lives()
        await all_are(daemon, "waiting")


@pytest.mark.parametrize("kind", [kind for kind in BUSES if kind != "pcie.0"])
async def test_qemu_lives_with_each_device_plugged(kind: str, stack: Stack, tmp_path: Path) -> None:
    """Taking one away needs a guest that lets it go."""
    async with (
        served(tmp_path) as (daemon, options),
        bare(stack, [*options.machine, *topology()]) as qemu,
    ):
        for number, id in enumerate(options.devices):
            await plug(qemu, options, id, bus_of(kind, number))
            await all_are(daemon, "connected", [id])
            assert await qemu.lives(), id


@sampled("size", [384 * MiB, 3 * GiB, 9 * GiB], every_day=[384 * MiB])
async def test_a_size_that_would_end_qemu_is_refused_before_it_asks(
    size: int, stack: Stack, tmp_path: Path
) -> None:
    async with served(tmp_path, size) as (daemon, options):
        disk = Options(options.machine, {"shmem0": options.devices["shmem0"]}, options.sockets)
        for kind in BUSES:
            with pytest.raises(QemuEnded) as ended:
                async with bare(stack, [*options.machine, *topology(), *disk.cold(kind)]):
                    pytest.fail("it started")
            assert ended.value.status == 1, str(ended.value)
        async with bare(stack, [*options.machine, *topology()]) as qemu:
            for kind in BUSES[1:]:
                with pytest.raises(QmpError):
                    await plug(qemu, disk, "shmem0", bus_of(kind, 0))
                await qemu.qmp.execute("chardev-remove", id="shmem0")
                assert await qemu.lives()
        (pmem,) = (pmem for pmem in (await daemon.status(VM))["pmem"] if pmem["id"] == "shmem0")
        assert "is no power of two" in pmem["refused"]


@sampled("size", [2 * MiB, GiB, 8 * TiB], every_day=[8 * TiB])
async def test_a_power_of_two_of_any_size_is_borne(size: int, stack: Stack, tmp_path: Path) -> None:
    async with served(tmp_path, size) as (_, options):
        disk = Options([], {"shmem0": options.devices["shmem0"]}, options.sockets)
        memory = ("-object", "memory-backend-memfd,id=ram0,size=256M,share=on")
        machine = ["-machine", "q35,memory-backend=ram0", "-m", "256M", *memory]
        for kind in BUSES:
            async with bare(stack, [*machine, *topology(), *disk.cold(kind)]) as qemu:
                assert await qemu.lives()
