"""Ranges reported free: whole pages inside them leave the file. Source: virtio 1.x, 5.5.6.7."""

from __future__ import annotations

from dataclasses import replace

import pytest
from vhostd._native import BalloonFlag, Fault, Handler

from tests.fakes.driver import Buffer
from tests.fakes.memory import MIB, PAGE_SIZE, GuestMemory
from tests.native.rig import DATA_ADDR, LAYOUTS, Guest, Host, Layout, pages_at, present, regions

POISON_OFFSET = 12


def free(guest_addr: int, size: int) -> Buffer:
    """A range reported free."""
    return Buffer(guest_addr, size, writable=True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_reported_ranges_leave_the_file(host: Host, layout: Layout) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.REPORT, layout, size=32)
        guest.memory.touch(DATA_ADDR, 4 * MIB)
        blocks = [free(DATA_ADDR, MIB), free(DATA_ADDR + 2 * MIB, MIB)]
        assert ring.send(*blocks).written == 0
        pages = MIB // PAGE_SIZE
        present_now = [guest.memory.pages_present(DATA_ADDR + i * MIB, pages) for i in range(4)]
        assert present_now == [0, pages, 0, pages]
        counters = guest.device.balloon_counters()
        assert (counters.reported_size, counters.discarded_size) == (2 * MIB, 2 * MIB)
        assert counters.inflated_pages == 0


def test_neighbouring_ranges_go_in_one_call(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.REPORT)
        for offsets in (range(4), range(3, -1, -1)):
            guest.memory.touch(DATA_ADDR, 4 * MIB)
            before = guest.device.balloon_counters().discards
            ring.send(*(free(DATA_ADDR + i * MIB, MIB) for i in offsets))
            assert guest.memory.pages_present(DATA_ADDR, 4 * MIB // PAGE_SIZE) == 0
            assert guest.device.balloon_counters().discards == before + 1


def test_a_range_across_a_region_border_goes_whole(host: Host) -> None:
    with Guest.on(host, GuestMemory.adjacent()) as guest:
        ring = guest.ring(Handler.REPORT)
        seam = guest.memory.regions[1].guest_addr
        guest.memory.touch(seam - 4 * PAGE_SIZE, 4 * PAGE_SIZE)
        guest.memory.touch(seam, 4 * PAGE_SIZE)
        ring.send(free(seam - 2 * PAGE_SIZE, 4 * PAGE_SIZE))
        states = present(guest.memory, pages_at(seam - 4 * PAGE_SIZE, 8))
        assert states == [True, True, False, False, False, False, True, True]
        assert guest.device.balloon_counters().discarded_size == 4 * PAGE_SIZE


def test_a_range_into_a_hole_goes_up_to_it_and_is_counted(host: Host) -> None:
    with Guest.on(host, GuestMemory.with_hole()) as guest:
        ring = guest.ring(Handler.REPORT)
        end = guest.memory.regions[0].end
        guest.memory.touch(end - 2 * PAGE_SIZE, 2 * PAGE_SIZE)
        ring.send(free(end - PAGE_SIZE, 2 * PAGE_SIZE))
        assert present(guest.memory, pages_at(end - 2 * PAGE_SIZE, 2)) == [True, False]
        assert guest.device.balloon_counters().reports_refused == 1
        assert guest.device.ring_statistics(0).fault == Fault.NONE


@pytest.mark.parametrize("guest_addr", [1 << 40, (1 << 64) - PAGE_SIZE])
def test_a_range_outside_guest_memory_is_counted_and_given_back(
    host: Host, guest_addr: int
) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.REPORT)
        ring.send(free(guest_addr, 2 * PAGE_SIZE))
        counters = guest.device.balloon_counters()
        assert (counters.reports_refused, counters.discards) == (1, 0)
        assert guest.device.ring_statistics(0).fault == Fault.NONE


def test_only_whole_pages_inside_a_range_go(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.REPORT)
        guest.memory.touch(DATA_ADDR, 4 * PAGE_SIZE)
        ring.send(free(DATA_ADDR + 100, 3 * PAGE_SIZE))
        assert present(guest.memory, pages_at(DATA_ADDR, 4)) == [True, False, False, True]
        assert guest.memory.read(DATA_ADDR, PAGE_SIZE) == b"\xa5" * PAGE_SIZE
        ring.send(free(DATA_ADDR + 10, PAGE_SIZE))
        assert guest.device.balloon_counters().discards == 1


def test_a_readable_range_is_refused(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.REPORT)
        guest.memory.touch(DATA_ADDR, 2 * PAGE_SIZE)
        ring.send(Buffer(DATA_ADDR, PAGE_SIZE), free(DATA_ADDR + PAGE_SIZE, PAGE_SIZE))
        assert present(guest.memory, pages_at(DATA_ADDR, 2)) == [True, False]
        assert guest.device.balloon_counters().reports_refused == 1


def test_a_poison_value_of_zero_keeps_nothing(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        guest.device.balloon_configure(BalloonFlag.MAY_DISCARD | BalloonFlag.PAGE_POISON)
        ring = guest.ring(Handler.REPORT)
        guest.memory.touch(DATA_ADDR, PAGE_SIZE)
        ring.send(free(DATA_ADDR, PAGE_SIZE))
        assert not guest.memory.page_present(DATA_ADDR)


@pytest.mark.parametrize(
    ("flags", "withheld"),
    [(BalloonFlag.MAY_DISCARD | BalloonFlag.PAGE_POISON, 0), (BalloonFlag(0), PAGE_SIZE)],
)
def test_pages_that_must_keep_their_bytes_keep_them(
    host: Host, flags: BalloonFlag, withheld: int
) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        guest.device.balloon_configure(flags)
        guest.device.publish_config(POISON_OFFSET, b"\xaa\0\0\0")
        ring = guest.ring(Handler.REPORT)
        guest.memory.touch(DATA_ADDR, PAGE_SIZE)
        ring.send(free(DATA_ADDR, PAGE_SIZE))
        assert guest.memory.page_present(DATA_ADDR)
        counters = guest.device.balloon_counters()
        assert (counters.reported_size, counters.discards) == (PAGE_SIZE, 0)
        assert counters.withheld_size == withheld
        guest.device.balloon_configure(BalloonFlag.MAY_DISCARD)
        ring.send(free(DATA_ADDR, PAGE_SIZE))
        assert not guest.memory.page_present(DATA_ADDR)


def test_a_range_outside_guest_memory_leaves_its_address(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        assert guest.device.balloon_counters().outside_addr == 0
        guest.ring(Handler.REPORT).send(free(5 << 40, PAGE_SIZE))
        assert guest.device.balloon_counters().outside_addr == 5 << 40
        guest.ring(Handler.INFLATE).send_pfns([(1 << 32) - 2])
        assert guest.device.balloon_counters().outside_addr == ((1 << 32) - 2) * PAGE_SIZE


def test_memory_that_was_allocated_ahead_stays_beside_memory_that_goes(host: Host) -> None:
    """Both in one request, so that the ranges are neighbours in guest memory."""
    with Guest.on(host, GuestMemory.adjacent(seam_addr=32 * MIB)) as guest:
        table = [
            replace(region, preallocated=region.guest_addr == 32 * MIB)
            for region in regions(guest.memory, guest.mapping)
        ]
        with host.parked():
            guest.device.set_regions(table)
        ring = guest.ring(Handler.REPORT)
        for page in (32 * MIB - PAGE_SIZE, 32 * MIB):
            guest.memory.touch(page, PAGE_SIZE)
        ring.send(free(32 * MIB - PAGE_SIZE, 2 * PAGE_SIZE))
        assert present(guest.memory, pages_at(32 * MIB - PAGE_SIZE, 2)) == [False, True]
        counters = guest.device.balloon_counters()
        assert (counters.reported_size, counters.withheld_size) == (2 * PAGE_SIZE, PAGE_SIZE)
