"""Page numbers in, holes out: the inflate and deflate data plane on a memfd of 4 KiB pages.

Source: virtio 1.x, 5.5.6. Must not know messages.
"""

from __future__ import annotations

import os
import random

import pytest
from vhostd._native import Fault, Handler

from tests.fakes.driver import Buffer
from tests.fakes.memory import MIB, PAGE_SIZE, GuestMemory, Region, open_file, open_memfd
from tests.native.rig import (
    DATA_ADDR,
    LAYOUTS,
    Guest,
    Host,
    Layout,
    Ring,
    pack_pfns,
    pages_at,
    present,
)

PFNS_MAX = 1024  # of one chain


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_inflated_pages_leave_the_file_and_their_neighbours_stay(
    host: Host, layout: Layout
) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        guest.memory.touch(MIB, MIB)  # where the ring and the list will lie
        ring = guest.ring(Handler.INFLATE, layout)
        guest.memory.touch(DATA_ADDR, 300 * PAGE_SIZE)
        before = guest.memory.blocks()
        used = ring.send_pfns(pages_at(DATA_ADDR + PAGE_SIZE, 256))
        assert used.written == 0
        assert guest.memory.blocks() == before - 256 * PAGE_SIZE
        assert guest.memory.page_present(DATA_ADDR)
        assert guest.memory.pages_present(DATA_ADDR + PAGE_SIZE, 256) == 0
        assert guest.memory.pages_present(DATA_ADDR + 257 * PAGE_SIZE, 43) == 43
        counters = guest.device.balloon_counters()
        assert (counters.inflated_pages, counters.inflate_pfns) == (256, 256)
        assert (counters.discards, counters.discarded_size) == (1, 256 * PAGE_SIZE)
        assert guest.mapping.given_up_pages == 256
        statistics = ring.statistics()
        assert (statistics.chains, statistics.used, statistics.calls) == (1, 1, 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_deflate_counts_pages_back_and_punches_nothing(host: Host, layout: Layout) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        inflate = guest.ring(Handler.INFLATE, layout)
        deflate = guest.ring(Handler.DEFLATE, layout)
        pages = pages_at(DATA_ADDR, 256)
        inflate.send_pfns(pages)
        guest.memory.touch(DATA_ADDR, 256 * PAGE_SIZE)
        deflate.send_pfns(pages[:100])
        counters = guest.device.balloon_counters()
        assert (counters.inflated_pages, counters.deflate_pfns) == (156, 100)
        assert counters.discards == 1
        assert guest.memory.pages_present(DATA_ADDR, 256) == 256
        assert guest.mapping.given_up_pages == 156


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_page_number_may_straddle_descriptors(host: Host, layout: Layout) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE, layout)
        guest.memory.touch(DATA_ADDR, 8 * PAGE_SIZE)
        data = pack_pfns(pages_at(DATA_ADDR, 4))
        ring.send_bytes(data[:1], data[1:6], data[6:7], data[7:])
        assert guest.memory.pages_present(DATA_ADDR, 4) == 0
        assert guest.memory.pages_present(DATA_ADDR + 4 * PAGE_SIZE, 4) == 4


def test_page_numbers_come_through_an_indirect_table(host: Host) -> None:
    for packed in (False, True):
        with Guest.on(host, GuestMemory.flat()) as guest:
            ring = guest.ring(Handler.INFLATE, Layout(packed, event_idx=True, indirect=True))
            guest.memory.touch(DATA_ADDR, 4 * PAGE_SIZE)
            data = pack_pfns(pages_at(DATA_ADDR, 4))
            ring.driver.add_chain(ring.buffers(data[:6], data[6:]), indirect=True)
            ring.driver.notify()
            ring.driver.wait_used()
            assert guest.memory.pages_present(DATA_ADDR, 4) == 0


def test_a_ragged_tail_is_counted_and_ignored(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE)
        guest.memory.touch(DATA_ADDR, 3 * PAGE_SIZE)
        ring.send_bytes(pack_pfns(pages_at(DATA_ADDR, 2)) + b"\x02\x40\x00")
        assert present(guest.memory, pages_at(DATA_ADDR, 3)) == [False, False, True]
        assert guest.device.balloon_counters().pfns_excess == 1


def test_less_than_one_page_number_is_given_back_unused(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE)
        assert ring.send_bytes(b"\x01\x02\x03").written == 0
        counters = guest.device.balloon_counters()
        assert (counters.inflate_pfns, counters.pfns_excess, counters.discards) == (0, 1, 0)


def test_page_numbers_beyond_1024_of_one_chain_are_counted_and_ignored(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE)
        guest.memory.touch(DATA_ADDR, (PFNS_MAX + 10) * PAGE_SIZE)
        ring.send_pfns(pages_at(DATA_ADDR, PFNS_MAX + 10))
        assert guest.memory.pages_present(DATA_ADDR, PFNS_MAX) == 0
        assert guest.memory.pages_present(DATA_ADDR + PFNS_MAX * PAGE_SIZE, 10) == 10
        counters = guest.device.balloon_counters()
        assert (counters.inflate_pfns, counters.pfns_excess) == (PFNS_MAX, 10)


def test_page_numbers_outside_guest_memory_harm_nothing(host: Host) -> None:
    outside = [64 * MIB // PAGE_SIZE, 0xFFFF_FFFF, 1 << 20]
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE)
        guest.memory.touch(DATA_ADDR, 2 * PAGE_SIZE)
        before = guest.memory.blocks()
        first, second = pages_at(DATA_ADDR, 2)
        ring.send_pfns([outside[0], first, outside[1], second, outside[2]])
        assert guest.memory.blocks() <= before - 2 * PAGE_SIZE + PAGE_SIZE  # the list's own page
        counters = guest.device.balloon_counters()
        assert (counters.pfns_outside, counters.inflated_pages) == (3, 2)
        assert guest.device.ring_statistics(0).fault == Fault.NONE


def test_repeated_page_numbers_are_counted_once(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        inflate = guest.ring(Handler.INFLATE)
        deflate = guest.ring(Handler.DEFLATE)
        page = DATA_ADDR // PAGE_SIZE
        guest.memory.touch(DATA_ADDR, 2 * PAGE_SIZE)
        inflate.send_pfns([page, page, page + 1, page])
        counters = guest.device.balloon_counters()
        assert (counters.inflated_pages, counters.pfns_repeated) == (2, 2)
        assert (counters.discards, counters.discarded_size) == (1, 2 * PAGE_SIZE)
        deflate.send_pfns([page, page])
        counters = guest.device.balloon_counters()
        assert (counters.inflated_pages, counters.pfns_repeated) == (1, 3)


def test_a_page_touched_in_the_balloon_goes_again_when_repeated(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE)
        for _ in range(2):
            guest.memory.touch(DATA_ADDR, PAGE_SIZE)
            ring.send_pfns(pages_at(DATA_ADDR, 1))
            assert not guest.memory.page_present(DATA_ADDR)


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled", "every other"])
def test_whatever_their_order_neighbours_go_in_one_call(host: Host, order: str) -> None:
    pages = pages_at(DATA_ADDR, 512)
    if order == "descending":
        pages.reverse()
    elif order == "shuffled":
        random.Random(7).shuffle(pages)
    elif order == "every other":
        pages = pages[::2]
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE)
        guest.memory.touch(DATA_ADDR, 512 * PAGE_SIZE)
        ring.send_pfns(pages)
        gone = set(pages)
        states = present(guest.memory, pages_at(DATA_ADDR, 512))
        assert states == [page not in gone for page in pages_at(DATA_ADDR, 512)]
        expected = 256 if order == "every other" else 1
        assert guest.device.balloon_counters().discards == expected


def test_pages_of_both_regions_go_and_the_hole_between_them_is_outside(host: Host) -> None:
    with Guest.on(host, GuestMemory.with_hole()) as guest:
        ring = guest.ring(Handler.INFLATE)
        low, high = guest.memory.regions
        guest.memory.touch(low.end - 2 * PAGE_SIZE, 2 * PAGE_SIZE)
        guest.memory.touch(high.guest_addr, 2 * PAGE_SIZE)
        around = pages_at(low.end - PAGE_SIZE, 3) + pages_at(high.guest_addr - PAGE_SIZE, 2)
        ring.send_pfns(around)
        assert present(guest.memory, pages_at(low.end - 2 * PAGE_SIZE, 2)) == [True, False]
        assert present(guest.memory, pages_at(high.guest_addr, 2)) == [False, True]
        counters = guest.device.balloon_counters()
        assert (counters.inflated_pages, counters.pfns_outside) == (2, 3)


def test_swapped_regions_punch_where_the_file_holds_the_page(host: Host) -> None:
    with Guest.on(host, GuestMemory.adjacent()) as guest:
        ring = guest.ring(Handler.INFLATE)
        seam = guest.memory.regions[1].guest_addr
        guest.memory.touch(seam - 4 * PAGE_SIZE, 4 * PAGE_SIZE)
        guest.memory.touch(seam, 4 * PAGE_SIZE)
        ring.send_pfns(pages_at(seam - 2 * PAGE_SIZE, 4))
        assert present(guest.memory, pages_at(seam - 4 * PAGE_SIZE, 8)) == [
            *[True] * 2,
            *[False] * 4,
            *[True] * 2,
        ]
        offset = guest.memory.file_offset(seam)
        assert os.lseek(guest.memory.fd, offset, os.SEEK_HOLE) == offset
        assert os.lseek(guest.memory.fd, offset, os.SEEK_DATA) == offset + 2 * PAGE_SIZE


def test_a_slot_off_the_files_pages_loses_nothing(host: Host) -> None:
    region = Region(0, 32 * MIB, 2048)
    with Guest.on(host, GuestMemory(open_memfd(33 * MIB), [region])) as guest:
        ring = guest.ring(Handler.INFLATE)
        guest.memory.touch(DATA_ADDR, 4 * PAGE_SIZE)
        ring.send_pfns(pages_at(DATA_ADDR + PAGE_SIZE, 2))
        assert guest.memory.read(DATA_ADDR, 4 * PAGE_SIZE) == b"\xa5" * (4 * PAGE_SIZE)
        assert guest.device.balloon_counters().discards == 0


def test_a_chain_with_a_writable_part_is_refused_and_given_back(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        for handler in (Handler.INFLATE, Handler.DEFLATE):
            ring = guest.ring(handler)
            guest.memory.touch(DATA_ADDR, PAGE_SIZE)
            (pages,) = ring.buffers(pack_pfns(pages_at(DATA_ADDR, 1)))
            room = Buffer(guest.memory.allocate(16), 16, writable=True)
            assert ring.send(pages, room).written == 0
            assert guest.memory.page_present(DATA_ADDR)
            assert guest.device.ring_statistics(ring.index).rejected == 1
            assert guest.device.ring_statistics(ring.index).fault == Fault.NONE


def test_a_new_device_counts_pages_and_keeps_them_until_it_may_discard(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat(), may_discard=False) as guest:
        ring = guest.ring(Handler.INFLATE)
        guest.memory.touch(DATA_ADDR, PAGE_SIZE)
        ring.send_pfns(pages_at(DATA_ADDR, 1))
        assert guest.memory.page_present(DATA_ADDR)
        counters = guest.device.balloon_counters()
        assert (counters.inflated_pages, counters.withheld_size) == (1, PAGE_SIZE)


def test_a_file_on_tmpfs_gets_holes(host: Host) -> None:
    memory = GuestMemory(open_file(32 * MIB), [Region(0, 32 * MIB, 0)])
    with Guest.on(host, memory) as guest:
        ring = guest.ring(Handler.INFLATE)
        guest.memory.touch(DATA_ADDR, 2 * PAGE_SIZE)
        ring.send_pfns(pages_at(DATA_ADDR, 1))
        assert present(guest.memory, pages_at(DATA_ADDR, 2)) == [False, True]


def test_a_reset_empties_the_balloons_books(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring: Ring = guest.ring(Handler.INFLATE)
        ring.send_pfns(pages_at(DATA_ADDR, 64))
        with host.parked():
            guest.device.balloon_reset()
        assert guest.device.balloon_counters().inflated_pages == 0
        assert guest.mapping.given_up_pages == 0
        ring.send_pfns(pages_at(DATA_ADDR, 64))
        counters = guest.device.balloon_counters()
        assert (counters.inflated_pages, counters.pfns_repeated) == (64, 0)
