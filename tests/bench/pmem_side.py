"""One guest with four disks of equal size: vhostd's two virtio-pmem, QEMU's own, and virtio-blk.

All in the same guest, so that each is asked by the same processors at the same moment. Knows how
each gets into a guest. Must not know what is measured.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio
from vhostd.images.image_file import create_image
from vhostd.units import GiB, MiB

from tests.bench.figures import BenchFailed
from tests.bench.mem_side import process_s
from tests.bench.pmem_host import write_all
from tests.daemon import VhostdProcess
from tests.fakes.memory import PAGE_SIZE
from tests.vm.guest import Guest, boot
from tests.vm.stack import Stack

KERNEL: Final = "6.12"
VM: Final = "web"
SIZE: Final = 512 * MiB
MEMORY: Final = "1G"
MAX_MEMORY: Final = "6G"
WINDOW_ADDRESS: Final = 0x1_4000_0000
BUILT_IN_ADDRESS: Final = WINDOW_ADDRESS + GiB
TURN_TIMEOUT_S: Final = 120.0

SHMEM: Final = "vhostd shmem"
WINDOW: Final = "vhostd window"
BUILT_IN: Final = "built-in pmem"
BLOCK: Final = "virtio-blk"
NAMES: Final = (SHMEM, WINDOW, BUILT_IN, BLOCK)
HABIT: Final = "vhostd, writeback_limit 0"
"""Like SHMEM, but what is dirty is written when the kernel likes."""
ALL: Final = (*NAMES, HABIT)
OURS: Final = {
    SHMEM: 'mode = "shmem"',
    WINDOW: f'mode = "window"\nwindow_address = {WINDOW_ADDRESS:#x}',
    HABIT: 'mode = "shmem"\nwriteback_limit = 0',
}


@dataclass(frozen=True)
class Syncs:
    """What so many fsyncs took, as the guest's own clock says; each with the write before it."""

    count: int
    wall_s: float
    p50_us: float
    p99_us: float
    host_s: float  # processor time of QEMU and of the daemon that serves the disk


@dataclass(frozen=True)
class Side:
    """One disk of the guest."""

    name: str
    guest: Guest
    device: str
    image: Path
    processes: tuple[int, ...]

    @property
    def folder(self) -> str:
        """Where its file system is mounted."""
        return f"/mnt{self.device}"

    async def mount(self) -> None:
        """Make a file system on it and mount that, without the guest's page cache if it can."""
        options = "" if self.name == BLOCK else "-o dax=always"
        # Nothing is left to be made in the background while others are measured.
        make = f"mkfs.ext4 -q -b 4096 -E lazy_itable_init=0,lazy_journal_init=0 -F {self.device}"
        mount = f"mkdir -p {self.folder} && mount -t ext4 {options} {self.device} {self.folder}"
        await self.guest.run(f"{make} && {mount}", timeout_s=TURN_TIMEOUT_S)

    async def write(self, name: str, size: int) -> None:
        """Write a file of whole MiB in its file system, over what is there, without an fsync."""
        command = f"dd if=/dev/zero of={self.folder}/{name} bs=1M count={size // MiB} conv=notrunc"
        await self.guest.run(f"{command} 2>&1", timeout_s=TURN_TIMEOUT_S)

    async def sync(self, path: str, count: int, writers: int, size: int) -> Syncs:
        """`count` times write `size` bytes and fsync, from each of `writers` threads."""
        before_s = self.used_s()
        text = await self.guest.run(
            f"disktool fsyncs {path} {count} {writers} {size}", timeout_s=TURN_TIMEOUT_S
        )
        used_s = self.used_s() - before_s
        found = re.search(
            r"^fsyncs (\d+) seconds (\S+) p50_us (\S+) p99_us (\S+)$", text, re.MULTILINE
        )
        if found is None or int(found[1]) != count * writers:
            raise BenchFailed(f"real guest, {self.name}: disktool said {text.strip()}")
        return Syncs(int(found[1]), float(found[2]), float(found[3]), float(found[4]), used_s)

    def used_s(self) -> float:
        """Processor seconds of all that serves it, so far."""
        return sum(map(process_s, self.processes))


def _mark(name: str) -> str:
    return f"bench {ALL.index(name)}"


def make_images(folder: Path) -> dict[str, Path]:
    """An image for each disk, all blocks written; its first bytes say whose it is."""
    images: dict[str, Path] = {}
    for name in ALL:
        path = folder / f"{_mark(name).replace(' ', '')}.img"
        create_image(path, SIZE)
        with path.open("r+b", buffering=0) as file:
            # Page by page: in large folios a write of 4 KiB costs what the folio does.
            write_all(file.fileno(), SIZE, PAGE_SIZE)
            os.pwrite(file.fileno(), _mark(name).encode(), 0)
            os.fsync(file.fileno())
        images[name] = path
    return images


def _configuration(monitor: Path, images: dict[str, Path]) -> str:
    text = f'[vm.{VM}]\nqmp = "{monitor}"\n'
    for number, (name, options) in enumerate(OURS.items()):
        text += f'[[vm.{VM}.pmem]]\nid = "disk{number}"\nfile = "{images[name]}"\n'
        text += f"size = {SIZE}\n{options}\n"
    return text


def _built_in_options(images: dict[str, Path]) -> list[str]:
    return [
        "-object",
        f"memory-backend-file,id=built-in,size={SIZE},share=on,mem-path={images[BUILT_IN]}",
        *("-device", f"virtio-pmem-pci,memdev=built-in,memaddr={BUILT_IN_ADDRESS:#x},addr=10.0"),
        *("-drive", f"if=none,id=block,format=raw,cache=writeback,file={images[BLOCK]}"),
        *("-device", "virtio-blk-pci,drive=block,addr=11.0"),
    ]


@asynccontextmanager
async def disks(stack: Stack, folder: Path, image_folder: Path) -> AsyncIterator[dict[str, Side]]:
    """The guest's disks by name; sockets in folder, images in image_folder."""
    images = await trio.to_thread.run_sync(make_images, image_folder)
    monitor = folder / "vmm.qmp"
    async with VhostdProcess.start(folder, _configuration(monitor, images)) as daemon:
        options: list[str] = json.loads(
            await daemon.ctl("--json", "qemu-args", VM, "--memory", MEMORY)
        )
        # What every guest of ours has anyway, its RAM, is the first of the objects.
        own = options[options.index("-object") + 2 :]
        devices = [*own, *_built_in_options(images), "-qmp", f"unix:{monitor},server=on,wait=off"]
        async with boot(
            stack,
            KERNEL,
            MEMORY,
            devices=devices,
            # With one processor none of the guest's spins for a lock whose holder does not run.
            smp=1,
            append="no_timer_check",  # which fails where the host has no time for it
            max_memory=MAX_MEMORY,
            modprobe=("virtio_pmem", "nd_pmem", "virtio_blk"),
        ) as guest:
            found = await _find(guest)
            if missing := set(ALL) - set(found):
                raise BenchFailed(f"real guest: no disk of {', '.join(sorted(missing))}")
            served = (guest.pid, daemon.process.pid)
            yield {
                name: Side(
                    name, guest, device, images[name], served if name in OURS else served[:1]
                )
                for name, device in found.items()
            }


async def _find(guest: Guest) -> dict[str, str]:
    """Which device is whose: their order is the guest's choice."""
    size = len(_mark(SHMEM))
    command = f"for d in /dev/pmem? /dev/vd?; do echo $(head -c {size} $d) = $d; done"
    lines = (await guest.run(command)).splitlines()
    devices = {mark: device for mark, _, device in (line.partition(" = ") for line in lines)}
    return {name: devices[_mark(name)] for name in ALL if _mark(name) in devices}
