"""What is done for an image that nobody asked for: written early, watched, cooled, stopped for."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from vhostd import _native
from vhostd.backend.backend_requests import BackendRequests
from vhostd.backend.effects import EffectPerformer
from vhostd.backend.image_beat import FREE_SIZE_MIN
from vhostd.backend.journal import Journal
from vhostd.backend.memory_table import DeviceMemory
from vhostd.backend.storage import Storage, StoragePolicy
from vhostd.backend.surroundings import unsupervised
from vhostd.backend.window import NoHostWork
from vhostd.backend.worker import VmWorker
from vhostd.devices.base import Refused
from vhostd.devices.pmem import Pmem, PmemOptions
from vhostd.fds import OwnedFd
from vhostd.handover.fd_store import DeviceKeeping, NoStore
from vhostd.images.image_file import ImageState, ImageUnusable
from vhostd.log import LogEvent, RateLimiter
from vhostd.memory.registry import MemoryRegistry
from vhostd.units import MiB

from tests.backend.disks import (
    FLUSHED,
    SIZE,
    Disks,
    blocking,
    disk,
    guest_on,
    opened,
    serving,
    until,
)

LIMIT = 4 * MiB
DIRTY = 16 * MiB
COLD_S = 0.3


def written_behind(disks: Disks) -> None:
    """Skip the test where dirty pages can't be seen."""
    if disks.status()["dirty"] is None:
        pytest.skip("this kernel can't tell the page cache of a file (Linux 6.5 can)")


# -- written early ---------------------------------------------------------------------------------


async def test_much_that_is_dirty_is_written_without_a_flush(tmp_path: Path) -> None:
    pmem = disk(tmp_path, writeback_limit=LIMIT)
    async with serving(pmem) as disks, guest_on(pmem):
        await until(lambda: disks.status()["allocated"] is not None)
        written_behind(disks)
        with opened(pmem.file) as fd:
            os.pwrite(fd, b"x" * DIRTY, 0)
        await until(lambda: disks.status()["cached"] >= DIRTY)
        await until(lambda: disks.status()["dirty"] == disks.status()["writeback"] == 0)
        status = disks.status()
        assert (status["syncs"], status["flushes"]) == (0, 0)
        assert status["cached"] >= DIRTY, "it is written, not dropped"


@pytest.mark.parametrize(("limit", "size"), [(0, DIRTY), (LIMIT, MiB)], ids=["off", "below"])
async def test_less_than_the_limit_is_left_to_the_kernel(
    tmp_path: Path, limit: int, size: int
) -> None:
    pmem = disk(tmp_path, writeback_limit=limit)
    async with serving(pmem) as disks, guest_on(pmem):
        await until(lambda: disks.status()["allocated"] is not None)
        written_behind(disks)
        with opened(pmem.file) as fd:
            os.pwrite(fd, b"x" * size, 0)
            await until(lambda: disks.status()["dirty"] >= size)
            for _ in range(3):
                await disks.looked_at()
                assert disks.status()["dirty"] >= size


# -- watched ---------------------------------------------------------------------------------------


async def test_a_removed_image_is_told_once_and_goes_on(tmp_path: Path) -> None:
    pmem = disk(tmp_path)
    with capture_logs() as log:
        async with serving(pmem) as disks, guest_on(pmem) as guest:
            with opened(pmem.file) as fd:
                pmem.file.unlink()
                await until(lambda: disks.status()["removed"])
                for _ in range(3):
                    await disks.looked_at(fd=fd)
            (told,) = disks.told(LogEvent.IMAGE_REMOVED)
            assert (told["device"], told["file"]) == ("disk0", str(pmem.file))
            assert await blocking(guest.flush) == FLUSHED
            assert disks.status()["failed"] is None
    assert [line["log_level"] for line in log if line["event"] == LogEvent.IMAGE_REMOVED] == [
        "error"
    ]


class Rig:
    """An image's keeper alone, with what it asked for; nobody looks at the image by itself."""

    def __init__(self, worker: VmWorker, device: Pmem) -> None:
        self.stops: list[str] = []
        self.news: list[tuple[str, dict[str, Any]]] = []
        self.device = device
        self.native = _native.Device(1, 16, bytes(16))
        journal = Journal(
            "web",
            RateLimiter(trio.current_time),
            lambda vm, event, fields: self.news.append((event, fields)),
        )
        registry = MemoryRegistry()
        requests = BackendRequests("disk0", journal)
        effects = EffectPerformer(
            self.native, requests, NoHostWork(), self.stops.append, lambda: None, journal
        )
        memory = DeviceMemory(registry, worker, self.native, journal)
        self.storage = Storage(
            self.device,
            StoragePolicy(),
            self.native,
            memory,
            registry,
            requests,
            self.stops.append,
            os.getpid(),
            effects.perform,
            DeviceKeeping(NoStore(), "web", device.options.id),
            journal,
            unsupervised,
        )

    def look(self, **state: Any) -> None:  # noqa: ANN401
        """It is seen like this now; else all is well, and there is room to the brim."""
        usual = {"file_size": SIZE, "allocated": 0, "free": FREE_SIZE_MIN, "removed": False}
        self.storage._look_at_file(ImageState(**(usual | state)))

    def told(self, event: str) -> list[dict[str, Any]]:
        """All news of a kind."""
        return [fields for name, fields in self.news if name == event]


@asynccontextmanager
async def rig(device: Pmem) -> AsyncIterator[tuple[Rig, VmWorker]]:
    """The keeper of one connection, whose image is not open yet."""
    async with VmWorker.open("web", unsupervised) as worker:
        made = Rig(worker, device)
        await worker.attach(made.native, lambda events: None)
        try:
            yield made, worker
        finally:
            await worker.detach(made.native)
            made.native.close()


@pytest.fixture
def device(tmp_path: Path) -> Pmem:
    return Pmem(PmemOptions("disk0", str(disk(tmp_path).file), SIZE))


async def test_the_vm_is_stopped_while_there_is_still_room_and_again_at_half_of_it(
    device: Pmem,
) -> None:
    async with rig(device) as (keeper, worker), keeper.storage.opened(worker):
        keeper.look(free=FREE_SIZE_MIN)
        assert keeper.stops == []
        keeper.look(free=FREE_SIZE_MIN - 1)
        (stop,) = keeper.stops
        path = device.options.file
        assert stop == f"disk0: {path} may grow, and its file system has 256 MiB left"
        (told,) = keeper.told(LogEvent.IMAGE_NO_SPACE)
        assert (told["free"], told["consequence"]) == (FREE_SIZE_MIN - 1, "the VM is stopped")
        for free in (FREE_SIZE_MIN - 2, FREE_SIZE_MIN // 2):
            keeper.look(free=free)
        assert len(keeper.stops) == 1, "an operator let it go on: it has room for a while"
        keeper.look(free=FREE_SIZE_MIN // 2 - 1)
        assert len(keeper.stops) == 2
        keeper.look(free=FREE_SIZE_MIN)
        keeper.look(free=FREE_SIZE_MIN - 1)
        assert len(keeper.stops) == 3, "room that came and went again"


@pytest.mark.parametrize("state", [{"allocated": SIZE}, {"free": None}], ids=["full", "device"])
async def test_an_image_that_can_t_grow_needs_no_room(device: Pmem, state: dict[str, Any]) -> None:
    async with rig(device) as (keeper, worker), keeper.storage.opened(worker):
        keeper.look(**({"free": 0} | state))
        assert keeper.stops == []


async def test_an_image_that_is_only_read_needs_no_room(device: Pmem) -> None:
    async with (
        rig(Pmem(replace(device.options, readonly=True))) as (keeper, worker),
        keeper.storage.opened(worker),
    ):
        keeper.look(free=0)
        assert keeper.stops == []


async def test_a_host_short_of_descriptors_turns_the_vmm_away_and_harms_nobody(
    device: Pmem,
) -> None:
    """With room for ever one more descriptor, until there is enough."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    refusals = 0
    while True:
        async with rig(device) as (keeper, worker):
            await trio.to_thread.run_sync(int)  # a thread's first start takes descriptors too
            with OwnedFd(os.open("/dev/null", os.O_RDONLY)) as spare:
                lowest = spare.fileno()
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + refusals, limits[1]))
            try:
                async with keeper.storage.opened(worker):
                    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                    await keeper.storage.flush()
                    break
            except ImageUnusable as error:
                assert str(error).endswith(": Too many open files")
                refusals += 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert refusals >= 2, "of the image, and of what the native side needs for it"


async def test_a_sync_that_failed_at_the_very_end_is_remembered(device: Pmem) -> None:
    """The VMM may hang up before anybody heard of it."""
    async with rig(device) as (keeper, worker), keeper.storage.opened(worker):
        assert keeper.storage._image is not None
        keeper.storage._image.fail(errno.EIO)
    assert device.failure is not None
    assert device.failure.why == "sync: Input/output error"
    async with rig(device) as (keeper, worker), keeper.storage.opened(worker):
        with pytest.raises(Refused, match="disk0: Input/output error"):
            await keeper.storage.flush()


# -- cooled ----------------------------------------------------------------------------------------


async def test_the_cache_of_an_image_nobody_uses_is_given_back(tmp_path: Path) -> None:
    pmem = disk(tmp_path, cold_cache_s=COLD_S, writeback_limit=0)
    async with serving(pmem) as disks, guest_on(pmem):
        with opened(pmem.file) as fd:
            os.pwrite(fd, b"x" * DIRTY, 0)
        await until(lambda: disks.told(LogEvent.CACHE_DROPPED))
        (told, *_) = disks.told(LogEvent.CACHE_DROPPED)
        assert (told["cached_before"], told["cached_after"]) == (DIRTY, 0)
        await until(lambda: disks.status()["cached"] == 0)


async def test_without_a_period_the_cache_stays(tmp_path: Path) -> None:
    pmem = disk(tmp_path)
    async with serving(pmem) as disks, guest_on(pmem):
        with opened(pmem.file) as fd:
            os.pwrite(fd, b"x" * MiB, 0)
        for _ in range(3):
            await disks.looked_at()
        assert disks.told(LogEvent.CACHE_DROPPED) == []


async def test_a_failed_disk_is_not_cooled_and_the_vm_goes_on(tmp_path: Path) -> None:
    """It can't be made durable, so that none of it may be dropped."""
    failed, healthy = disk(tmp_path, cold_cache_s=COLD_S), disk(tmp_path, "disk1")
    async with serving(failed, healthy) as disks, guest_on(failed), guest_on(healthy) as guest:
        with opened(failed.file) as fd:
            os.pwrite(fd, b"x" * MiB, 0)
        os.truncate(failed.file, SIZE // 2)
        await until(lambda: disks.status()["failed"])
        await trio.sleep(3 * COLD_S)  # what it must not do has no event
        await disks.looked_at()
        assert disks.told(LogEvent.CACHE_DROPPED) == []
        assert disks.status()["cached"] >= MiB
        assert await blocking(guest.flush) == FLUSHED
