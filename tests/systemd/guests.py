"""A real guest of a vhostd under a real systemd, and its fsync looked at all the time."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import trio
from vhostd.images.image_file import create_image
from vhostd.units import MiB

from tests.e2e.test_pmem import MAKE_FILE_SYSTEM
from tests.systemd.installed import install
from tests.systemd.machine import Machine
from tests.vm.channel import GuestProcess
from tests.vm.guest import Guest, boot
from tests.vm.stack import Stack

VM: Final = "web"
UNIT: Final = "vhostd"
IMAGES: Final = "/var/lib/images"
IMAGE_SIZE: Final = 128 * MiB
CONFIGURATION: Final = f"""
[metrics]
listen = "127.0.0.1:9713"
[vm.{VM}.balloon]
[[vm.{VM}.pmem]]
id = "disk0"
file = "{IMAGES}/disk.img"
size = {IMAGE_SIZE}
"""
HANGS_S: Final = 3.0
"""A guest without a record for so long waits for something that does not come by itself."""

GOES_ON_S: Final = 60.0


@dataclass
class Records:
    """A program in the guest that writes and fsyncs a record after the other.

    Attributes:
        times_s: when the end of each was seen.
    """

    process: GuestProcess
    times_s: list[float] = field(default_factory=list)

    async def watch(self) -> None:
        """Look at it until cancelled."""
        while True:
            await self.process.read_line(timeout_s=3600)
            self.times_s.append(trio.current_time())

    async def longest_gap_s(self, event: Callable[[], Awaitable[object]]) -> float:
        """The longest time without a record, from before an event until the guest goes on."""
        first = len(self.times_s) - 1
        await event()
        await self.goes_on()
        return self.longest_since_s(first)

    def longest_since_s(self, first: int) -> float:
        """The longest time without a record, of those from number `first` on."""
        return max(after - before for before, after in pairwise(self.times_s[first:]))

    async def goes_on(self) -> None:
        """Wait until it has written records that it had not begun before."""
        seen = len(self.times_s)
        with trio.fail_after(GOES_ON_S):
            while len(self.times_s) < seen + 3:  # noqa: ASYNC110  # times_s has no event
                await trio.sleep(0.01)

    async def hangs(self) -> bool:
        """Whether nothing is written any more."""
        await trio.sleep(0.5)  # what was answered before may still be on its way here
        seen = len(self.times_s)
        await trio.sleep(HANGS_S)
        return len(self.times_s) == seen


@dataclass
class Served:
    """A guest at work, and the machine whose vhostd serves it."""

    machine: Machine
    guest: Guest
    records: Records

    async def status(self) -> dict[str, Any]:
        """Of the VM."""
        status: dict[str, Any] = json.loads(
            await self.machine.run("vhostctl", "--json", "status", VM)
        )
        return status

    async def main_pid(self) -> int:
        """Of the daemon, as the machine counts; 0: there is none."""
        return int(await self.machine.property(UNIT, "MainPID"))

    async def stored(self) -> int:
        """Descriptors in systemd's store."""
        return int(await self.machine.property(UNIT, "NFileDescriptorStore"))

    async def kill(self, name: str) -> None:
        """Send the daemon a signal."""
        await self.machine.run("kill", f"-{name}", str(await self.main_pid()))

    async def replaced(self, before: int) -> None:
        """Wait until another daemon than `before` serves."""
        with trio.fail_after(GOES_ON_S):
            while not await self._serves_after(before):  # noqa: ASYNC110  # of another program
                await trio.sleep(0.05)

    async def _serves_after(self, before: int) -> bool:
        state = await self.machine.property(UNIT, "ActiveState")
        return state == "active" and await self.main_pid() not in (0, before)


def new_machine(folder: Path, tree: Path, configuration: str = CONFIGURATION) -> Machine:
    """A machine with vhostd and an image, yet to be booted."""
    machine = Machine(folder / "machine", tree)
    images = folder / "images"
    images.mkdir()
    create_image(images / "disk.img", IMAGE_SIZE)
    machine.binds.append((images, IMAGES, True))
    install(machine, configuration)
    return machine


@asynccontextmanager
async def served_guest(machine: Machine, stack: Stack) -> AsyncIterator[Served]:
    """Boot the machine, start vhostd's unit, boot a guest of it, have it write records."""
    async with machine.running():
        await machine.run("systemctl", "start", UNIT)
        async with guest_of(machine, stack) as guest:
            await guest.run(
                f"{MAKE_FILE_SYSTEM}; mount -t ext4 -o dax /dev/pmem0 /mnt", timeout_s=60
            )
            async with trio.open_nursery() as nursery:
                records = Records(await guest.start("disktool records /mnt/records"))
                nursery.start_soon(records.watch)
                await records.goes_on()
                yield Served(machine, guest, records)
                nursery.cancel_scope.cancel()


@asynccontextmanager
async def guest_of(machine: Machine, stack: Stack) -> AsyncIterator[Guest]:
    """A guest with all devices that vhostctl prints; QEMU runs outside, as this host counts."""
    words: list[str] = json.loads(
        await machine.run("vhostctl", "--json", "qemu-args", VM, "--memory", "512M")
    )
    ram = next(at for at, word in enumerate(words) if ",id=ram0," in word)
    inside = f"path={machine.path('/run/vhostd')}/"
    options = [word.replace("path=/run/vhostd/", inside) for word in words[ram + 1 :]]
    size = words[words.index("-m") + 1]
    async with boot(
        stack,
        kernel="6.12",
        memory="512M",
        max_memory=size.split("maxmem=")[1].split(",")[0] if "maxmem=" in size else None,
        devices=[word for word in options if not word.startswith("node,") and word != "-numa"],
        modprobe=("virtio_pmem", "nd_pmem", "virtio_balloon"),
    ) as guest:
        yield guest
