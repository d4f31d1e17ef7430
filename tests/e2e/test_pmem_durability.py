"""Every record the guest was told is durable is in the image, whenever the VMM dies."""

from __future__ import annotations

import random
from pathlib import Path
from struct import unpack

import pytest
import trio
from vhostd.images.image_file import create_image
from vhostd.units import MiB

from tests.daemon import VhostdProcess
from tests.e2e.conftest import VM, disk_device, guest_with_disks
from tests.e2e.test_pmem import check_file_system
from tests.vm.guest import Guest
from tests.vm.stack import Stack

pytestmark = [pytest.mark.guest, pytest.mark.timeout(3600)]

RECORD_SIZE = 512
SIZE = 64 * MiB
DISKS = ("shmem", "window")


def mix(x: int) -> int:
    """As in disktool.c."""
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def check_records(content: bytes, last: int) -> None:
    """Records 1 to last are there, whole."""
    for number in range(1, last + 1):
        words = unpack("<64Q", content[number * RECORD_SIZE : (number + 1) * RECORD_SIZE])
        assert words[0] == number
        assert words[1:] == tuple(mix(number * 64 + i) for i in range(1, 64)), f"record {number}"


async def write_until_killed(guest: Guest, generator: random.Random) -> list[int]:
    """Have records written to both disks; kill QEMU at some moment; the last number each told."""
    for number in range(len(DISKS)):
        device, folder = f"/dev/pmem{number}", f"/mnt{number}"
        await guest.run(
            f"mkdir -p {folder}; blkid {device} | grep -q ext4 ||"
            f" mkfs.ext4 -q -b 4096 -F {device}; mount -t ext4 -o dax {device} {folder};"
            f" rm -f {folder}/records",
            timeout_s=60,
        )
    running = [
        await guest.start(f"disktool records /mnt{number}/records") for number in range(len(DISKS))
    ]
    for process in running:
        await process.read_line()
    # No event tells when to die: that is the point.
    await trio.sleep(generator.uniform(0, 1.5))
    guest.kill()
    await guest.wait_exit()
    whole_lines = [process.output.rpartition("\n")[0].splitlines() for process in running]
    return [int(lines[-1]) for lines in whole_lines]


async def test_no_acknowledged_record_is_lost_when_qemu_is_killed(
    stack: Stack, tmp_path: Path, kills: int
) -> None:
    images = [tmp_path / f"{mode}.img" for mode in DISKS]
    for image in images:
        create_image(image, SIZE)
    devices = "".join(
        disk_device(image, mode, number, SIZE)
        for number, (image, mode) in enumerate(zip(images, DISKS, strict=True))
    )
    generator = random.Random(27)
    monitor = tmp_path / "vmm.qmp"
    configuration = f'[vm.{VM}]\nqmp = "{monitor}"\n' + devices
    told = 0
    async with VhostdProcess.start(tmp_path, configuration) as daemon:
        for _ in range(kills):
            async with guest_with_disks(stack, daemon, monitor, "6.12") as guest:
                last = await write_until_killed(guest, generator)
            for number, (image, count) in enumerate(zip(images, last, strict=True)):
                check_file_system(stack, image)
                out = tmp_path / f"records{number}"
                stack.e2fsprogs.run("debugfs", "-R", f"dump /records {out}", image)
                check_records(out.read_bytes(), count)
                told += count
        status = await daemon.status(VM)
    assert all(pmem["flush_errors"] == 0 for pmem in status["pmem"])
    print(f"{kills} kills, {told} records told durable and found")
