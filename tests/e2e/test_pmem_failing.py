"""A disk whose storage fails under a real guest: its fsync fails, and does until it is seen to."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
from vhostd.images.image_file import create_image

from tests.e2e.conftest import DISK_SIZE, VM, ServeDisk, disk_device
from tests.fakes.sync_shim import SyncShim, WatchedFile
from tests.vm.guest import Guest

pytestmark = pytest.mark.guest


def failing_disk(folder: Path) -> tuple[WatchedFile, str, dict[str, str]]:
    """A disk whose syncs are in our hands: those, its configuration, the daemon's environment."""
    image = folder / "disk.img"
    create_image(image, DISK_SIZE)
    shim = SyncShim.build(folder)
    return shim.watch(image), disk_device(image, "shmem"), dict(shim.environment())


async def synced(guest: Guest) -> bool:
    """Write to the raw disk and fsync; whether the guest was told that it is durable."""
    said = await guest.run(
        "dd if=/dev/zero of=/dev/pmem0 bs=4k count=1 conv=fsync 2>&1 && echo durable || true"
    )
    assert "durable" in said or "Input/output error" in said, said
    return "durable" in said


async def test_a_sync_that_failed_once_fails_until_it_is_cleared(
    serve_disk: ServeDisk, tmp_path: Path
) -> None:
    file, devices, environment = failing_disk(tmp_path)
    async with serve_disk(devices, environment=environment) as served:
        assert await synced(served.guest)
        file.fail(errno.EIO, 1)
        assert not await synced(served.guest)
        # The storage is healthy again, but what it lost is lost.
        for _ in range(3):
            assert not await synced(served.guest)
        pmem = await served.pmem()
        assert pmem["failed"] == "sync: Input/output error" and pmem["flush_errors"] >= 4
        events = await served.daemon.ctl("events")
        assert "pmem_failed" in events
        await served.daemon.ctl("pmem", "clear", VM)
        assert await synced(served.guest)
        assert (await served.pmem())["failed"] is None


async def test_a_failed_sync_stays_failed_over_deaths_and_reboots(
    serve_disk: ServeDisk, tmp_path: Path
) -> None:
    """Of vhostd, killed and started anew, and of the guest; the storage is healthy all the time."""
    file, devices, environment = failing_disk(tmp_path)
    async with serve_disk(devices, environment=environment, keep=True) as served:
        assert await synced(served.guest)
        file.fail(errno.EIO, 1)
        assert not await synced(served.guest)
        failed = (await served.pmem())["failed"]
        for _ in range(2):
            worker = served.daemon.worker
            os.kill(worker, signal.SIGKILL)
            assert not await synced(served.guest)
            await served.daemon.replaced(worker, VM)
            assert (await served.pmem())["failed"] == failed
    async with serve_disk(devices, environment=environment) as served:
        assert not await synced(served.guest)
        assert (await served.pmem())["failed"] == failed
        await served.daemon.ctl("pmem", "clear", VM)
        assert await synced(served.guest)
    async with serve_disk(devices, environment=environment) as served:
        assert await synced(served.guest)
