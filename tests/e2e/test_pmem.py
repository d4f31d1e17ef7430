"""virtio-pmem on real guests: the disk as the guest has it, and the image as the host has it."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest
import trio
from vhostd.images.image_file import create_image
from vhostd.units import KiB, MiB

from tests.daemon import ControlFailed
from tests.e2e.conftest import DISK_SIZE, VM, ServedDisk, ServeDisk, disk_device
from tests.e2e.waiting import until
from tests.sampling import sampled
from tests.vm.stack import Stack

pytestmark = pytest.mark.guest

WAYS = (("6.1", "window"), ("6.12", "window"), ("6.12", "shmem"), ("7", "shmem"))
"""Kernels, and how they get the region."""

SECTOR_SIZE = 512
MAKE_FILE_SYSTEM = "mkfs.ext4 -q -b 4096 -F /dev/pmem0"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    create_image(path, DISK_SIZE)
    return path


def content_of(stack: Stack, image: Path, name: str) -> bytes:
    """A file of the ext4 file system in the image, as the host would find it after a crash.

    What sync(2) promises may be in the journal alone, so that is played, on a copy.
    """
    copy = image.with_suffix(".copy")
    subprocess.run(["cp", "--sparse=always", image, copy], check=True)
    stack.e2fsprogs.run("e2fsck", "-fp", copy)  # the file system is in use: no word on its state
    found = stack.e2fsprogs.run("debugfs", "-R", f"cat {name}", copy)
    copy.unlink()
    return found.stdout.encode()


def check_file_system(stack: Stack, image: Path) -> None:
    """Play the journal; the file system must be whole then."""
    played = stack.e2fsprogs.run("e2fsck", "-fp", image)
    assert played.returncode in (0, 1), played.stdout + played.stderr
    whole = stack.e2fsprogs.run("e2fsck", "-fn", image)
    assert whole.returncode == 0, whole.stdout + whole.stderr


def sha256(image: Path) -> str:
    with image.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def disk_size(served: ServedDisk) -> int:
    return int(await served.guest.run("cat /sys/block/pmem0/size")) * SECTOR_SIZE


@sampled(("kernel", "mode"), WAYS, every_day=[("6.1", "window"), ("7", "shmem")])
async def test_a_file_system_lives_through_reboots_and_reaches_the_image(
    kernel: str, mode: str, serve_disk: ServeDisk, stack: Stack, image: Path
) -> None:
    written = "written"
    async with serve_disk(disk_device(image, mode), kernel, balloon=True) as served:
        guest = served.guest
        assert await disk_size(served) == DISK_SIZE
        await guest.run(MAKE_FILE_SYSTEM, timeout_s=60)
        for boot in range(4):
            await served.mount()
            assert "dax=always" in await guest.run("grep pmem0 /proc/mounts")
            if boot:
                assert (await guest.run("cat /mnt/file")).strip() == written
            written = f"written in boot {boot}"
            await guest.run(f"echo {written} > /mnt/file && sync")
            content = await trio.to_thread.run_sync(content_of, stack, image, "/file")
            assert content.decode().strip() == written
            if boot < 3:
                await (guest.system_reset() if boot % 2 else guest.reboot())
        pmem = await served.pmem()
        assert pmem["mapped"] and pmem["flushes"] > 4 and pmem["flush_errors"] == 0
        assert pmem["mode"] == mode and pmem["size"] == DISK_SIZE
        guest.kill()
        await guest.wait_exit()
    check_file_system(stack, image)


async def test_pauses_lose_nothing(serve_disk: ServeDisk, stack: Stack, image: Path) -> None:
    async with serve_disk(disk_device(image, "shmem")) as served:
        guest = served.guest
        await guest.run(MAKE_FILE_SYSTEM, timeout_s=60)
        await served.mount()
        records = await guest.start("disktool records /mnt/records")
        for _ in range(20):
            for _ in range(5):
                last = int(await records.read_line())
            await guest.qmp.execute("stop")
            await guest.qmp.execute("cont")
        assert last == 100
        assert (await served.pmem())["flush_errors"] == 0
        await records.kill()
        await guest.run("umount /mnt")
    check_file_system(stack, image)


async def test_a_guest_too_old_for_shared_memory_is_named(
    serve_disk: ServeDisk, image: Path
) -> None:
    async with serve_disk(disk_device(image, "shmem"), "6.1") as served:
        assert "pmem0" not in await served.guest.run("ls /dev")
        pmem = await served.pmem()
        assert not pmem["mapped"]
        assert "Linux 6.9" in pmem["standing"]
        with pytest.raises(ControlFailed, match="vhostctl"):
            await served.daemon.ctl("doctor")


async def test_qemu_maps_no_readonly_image_as_shared_memory(
    serve_disk: ServeDisk, image: Path
) -> None:
    """It would map it writable; one that learns the flag should be noticed."""
    async with serve_disk(disk_device(image, "shmem", options="readonly = true")) as served:
        pmem = await served.pmem()
        assert not pmem["mapped"] and 'set mode = "window"' in pmem["standing"]
        await served.guest.check_alive()


async def test_a_readonly_image_stays_as_it_is(serve_disk: ServeDisk, image: Path) -> None:
    fd = os.open(image, os.O_WRONLY)
    os.pwrite(fd, b"as it was", 0)
    os.close(fd)
    before = sha256(image)
    async with serve_disk(disk_device(image, "window", options="readonly = true")) as served:
        guest = served.guest
        assert (await guest.run("head -c 9 /dev/pmem0")).strip() == "as it was"
        await guest.run("dd if=/dev/zero of=/dev/pmem0 bs=4k count=16 conv=fsync || true")
        await guest.check_alive()
        assert (await served.pmem())["readonly"]
    assert sha256(image) == before


async def test_an_image_in_use_is_refused_and_said(
    serve_disk: ServeDisk, stack: Stack, image: Path
) -> None:
    async with serve_disk(disk_device(image, "shmem")) as served:
        with pytest.raises(ControlFailed, match="exists"):
            await served.daemon.ctl("pmem", "create", str(image), "64M")
        command = [
            *stack.qemu.command,
            *("-M", "q35", "-nodefaults", "-display", "none", "-S", "-blockdev"),
            f"driver=file,node-name=n,filename={image}",
            *("-device", "virtio-blk-pci,drive=n"),
        ]
        with trio.fail_after(20):
            done = await trio.run_process(command, capture_stderr=True, check=False)
        assert done.returncode == 1
        assert b"lock" in done.stderr


async def test_the_page_cache_is_ours(serve_disk: ServeDisk, image: Path) -> None:
    """What the guest wrote is written back early, and its cache can be dropped under it."""
    limit = "writeback_limit = 4194304"
    async with serve_disk(disk_device(image, "shmem", options=limit)) as served:
        guest = served.guest
        await guest.run("dd if=/dev/urandom of=/dev/pmem0 bs=1M count=64 2>&1", timeout_s=60)
        summed = await guest.run("md5sum /dev/pmem0", timeout_s=60)
        seen = await served.pmem()
        if seen["cached"] is None:
            pytest.skip("this kernel has no cachestat(2): Linux 6.5 does")
        assert seen["cached"] >= 64 * MiB and seen["flushes"] == 0
        await until(served.pmem, lambda pmem: pmem["dirty"] <= 4 * MiB, 20, "written back")
        assert (await served.pmem())["allocated"] >= 60 * MiB
        told = await served.daemon.ctl("pmem", "drop-cache", VM)
        after = await until(served.pmem, lambda pmem: pmem["dirty"] == 0, 10, "looked at")
        if os.geteuid() == 0:
            assert "stay" not in told
            assert after["cached"] < 8 * MiB, (told, after)
        assert await guest.run("md5sum /dev/pmem0", timeout_s=60) == summed


async def test_a_cold_image_costs_the_host_nothing(serve_disk: ServeDisk, image: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may page out another process: run as root to see it")
    async with serve_disk(disk_device(image, "shmem", options="cold_cache_s = 1.0")) as served:
        guest = served.guest
        await guest.run("dd if=/dev/urandom of=/dev/pmem0 bs=1M count=32 conv=fsync 2>&1")
        summed = await guest.run("md5sum /dev/pmem0", timeout_s=60)
        # The kernel's own page cache of the raw device is not what is measured here.
        await until(served.pmem, lambda pmem: pmem["cached"] < 512 * KiB, 30, "cold")
        assert "pmem_cache_dropped" in await served.daemon.ctl("events")
        assert await guest.run("md5sum /dev/pmem0", timeout_s=60) == summed


@pytest.mark.parametrize("mode", ["shmem", "window"])
async def test_an_image_that_shrinks_stops_its_vm_and_nothing_else(
    mode: str, serve_disk: ServeDisk, image: Path
) -> None:
    async with serve_disk(disk_device(image, mode), balloon=True) as served:
        guest = served.guest
        await guest.run("dd if=/dev/zero of=/dev/pmem0 bs=4k count=1 conv=fsync 2>&1")
        os.truncate(image, 64 * MiB)
        await until(
            lambda: guest.qmp.execute("query-status"),
            lambda status: status["status"] == "paused",
            20,
            "the VM is stopped",
        )
        pmem = await served.pmem()
        assert "shrunk" in pmem["failed"]
        assert (await served.daemon.status(VM))["balloon"]["state"] == "stopped"
        os.truncate(image, DISK_SIZE)
        await guest.qmp.execute("cont")
        failing = "dd if=/dev/zero of=/dev/pmem0 bs=4k count=1 conv=fsync 2>&1 || echo failed"
        assert "failed" in await guest.run(failing)
        await served.daemon.ctl("pmem", "clear", VM)
        assert "failed" not in await guest.run(failing)


async def test_unbinding_the_driver_flushes_and_a_new_vmm_finds_all(
    serve_disk: ServeDisk, image: Path
) -> None:
    async with serve_disk(disk_device(image, "shmem")) as served:
        guest = served.guest
        await guest.run("printf kept | dd of=/dev/pmem0 bs=4k conv=sync 2>&1; sync")
        before = (await served.pmem())["flushes"]
        await guest.run(
            "for d in /sys/bus/virtio/drivers/virtio_pmem/virtio*;"
            " do echo ${d##*/} > ${d%/*}/unbind; done"
        )
        assert "pmem0" not in await guest.run("ls /dev")
        assert (await served.pmem())["flushes"] == before + 1
        guest.kill()
        await guest.wait_exit()
    async with serve_disk(disk_device(image, "window")) as served:
        assert (await served.guest.run("head -c 4 /dev/pmem0")).strip() == "kept"
