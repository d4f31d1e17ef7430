"""Memory that was allocated ahead stays allocated, whatever a real guest reports free of it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vhostd.units import GiB, MiB

from tests.e2e.conftest import ServedMemory, ServeMemory, memory_device
from tests.e2e.waiting import until

pytestmark = pytest.mark.guest

PREALLOCATED = memory_device(options="prealloc = true")
HUGE = 2 * MiB
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
PLUGGED_PAGES = 64  # a memory block of Linux, so that all of it is used
MAP_HUGETLB = 0x40000  # include/uapi/asm-generic/mman.h


async def reported(served: ServedMemory, size: int) -> None:
    """Wait until the guest has reported so much of its windows free, and it was kept."""
    await until(served.balloon, lambda balloon: balloon["withheld"] >= size, 60, "reports")


async def test_reports_take_nothing_of_a_plugged_gibibyte(serve_memory: ServeMemory) -> None:
    async with serve_memory(devices=PREALLOCATED, balloon=True) as served:
        await served.resize(GiB)
        await reported(served, GiB // 2)
        assert served.window_memory() == GiB
        assert (await served.mem())["violations"] == 0


def free_huge_pages() -> int:
    return int((POOL / "free_hugepages").read_text())


@contextmanager
def pool(pages: int) -> Iterator[None]:
    """The host's pool has so many free pages."""
    reserve = POOL / "nr_hugepages"
    before = int(reserve.read_text())
    try:
        try:
            reserve.write_text(str(before + pages - free_huge_pages()))
        except OSError as error:
            pytest.skip(f"{reserve}: {error.strerror}")
        if free_huge_pages() != pages:
            pytest.skip(f"the host has {free_huge_pages()} free huge pages, {pages} are needed")
        yield
    finally:
        reserve.write_text(str(before))


async def test_a_small_pool_of_huge_pages_is_not_given_away(serve_memory: ServeMemory) -> None:
    """Another program takes what is free in the pool; the guest's next touch must find its own."""
    with pool(PLUGGED_PAGES):
        async with serve_memory(
            devices=PREALLOCATED, balloon=True, backend=",hugetlb=on,hugetlbsize=2M,reserve=off"
        ) as served:
            await served.resize(PLUGGED_PAGES * HUGE)
            await reported(served, PLUGGED_PAGES * HUGE // 2)
            others = free_huge_pages()
            taken = (
                mmap.mmap(-1, others * HUGE, flags=mmap.MAP_SHARED | MAP_HUGETLB)
                if others
                else None
            )
            try:
                patterned = await served.guest.start("guesttool fill 880 7")
                await patterned.read_line(timeout_s=90)
                assert (await patterned.ask("verify", timeout_s=60)).startswith("ok ")
            finally:
                if taken is not None:
                    taken.close()
            assert others == 0
