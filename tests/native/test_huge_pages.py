"""A guest on 2 MiB pages: nothing goes until the guest gave up all of one.

Needs four huge pages; as root they are set aside for the time of these tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from vhostd._native import BalloonFlag, Handler, Log, RingPosition

from tests.fakes.driver import Buffer
from tests.fakes.memory import MIB, PAGE_SIZE, GuestMemory, Region, huge_pages, open_hugetlb
from tests.native.rig import Guest, Host, pages_at, regions

HUGE = 2 * MIB
PARTS = HUGE // PAGE_SIZE
SIZE = 4 * HUGE
DATA = 2 * HUGE


@pytest.fixture
def guest(host: Host) -> Iterator[Guest]:
    """A guest of four huge pages, all touched; rings lie in the first."""
    with huge_pages(SIZE // HUGE):
        try:
            fd = open_hugetlb(SIZE)
        except OSError as error:
            pytest.skip(f"no {SIZE // HUGE} huge pages: {error.strerror}")
        memory = GuestMemory(fd, [Region(0, SIZE, 0)])
        with Guest.on(host, memory) as made:
            memory.touch(DATA, 2 * HUGE)
            yield made


def inflate_in_parts(guest: Guest, first: int, count: int) -> None:
    """Give up pages, 256 to a request."""
    ring = guest.rings[0] if guest.rings else guest.ring(Handler.INFLATE)
    pages = pages_at(first, count)
    for at in range(0, count, 256):
        ring.send_pfns(pages[at : at + 256])


def test_the_mapping_knows_its_page_size(guest: Guest) -> None:
    assert guest.mapping.page_size == HUGE


def test_a_page_given_up_in_part_stays(guest: Guest) -> None:
    guest.device.balloon_configure(BalloonFlag.MAY_DISCARD | BalloonFlag.MUST_TELL_HOST)
    inflate_in_parts(guest, DATA, PARTS - 1)
    assert guest.memory.read(DATA, HUGE) == b"\xa5" * HUGE
    counters = guest.device.balloon_counters()
    assert (counters.discards, counters.inflated_pages) == (0, PARTS - 1)
    assert counters.pages_kept == PARTS - 1


def test_pages_of_another_driver_complete_nothing(guest: Guest) -> None:
    """The old driver's page numbers lie about what a new one uses."""
    guest.device.balloon_configure(BalloonFlag.MAY_DISCARD | BalloonFlag.MUST_TELL_HOST)
    inflate_in_parts(guest, DATA, PARTS - 1)
    host = guest.host
    again = host.device()
    again.balloon_configure(BalloonFlag.MAY_DISCARD | BalloonFlag.MUST_TELL_HOST)
    with host.parked():
        again.set_regions(regions(guest.memory, guest.mapping))
    ring = guest.rings.pop()
    host.remove(guest.device)
    guest.device = ring.device = again
    guest.rings.append(ring)
    ring.start(RingPosition(2, 2))
    ring.send_pfns(pages_at(DATA + HUGE - PAGE_SIZE, 1))
    assert guest.memory.read(DATA, HUGE) == b"\xa5" * HUGE
    assert again.balloon_counters().inflated_pages == 1


def test_a_page_completed_over_several_requests_goes_with_must_tell_host(guest: Guest) -> None:
    guest.device.balloon_configure(BalloonFlag.MAY_DISCARD | BalloonFlag.MUST_TELL_HOST)
    before = guest.memory.blocks()
    inflate_in_parts(guest, DATA, PARTS)
    assert guest.memory.blocks() == before - HUGE
    assert guest.memory.read(DATA + HUGE, HUGE) == b"\xa5" * HUGE
    assert guest.device.balloon_counters().discarded_size == HUGE


def test_without_must_tell_host_it_stays(guest: Guest) -> None:
    inflate_in_parts(guest, DATA, PARTS)
    assert guest.memory.read(DATA, HUGE) == b"\xa5" * HUGE
    assert guest.device.balloon_counters().discards == 0


def test_a_page_deflated_in_part_between_stays(guest: Guest) -> None:
    guest.device.balloon_configure(BalloonFlag.MAY_DISCARD | BalloonFlag.MUST_TELL_HOST)
    inflate_in_parts(guest, DATA, PARTS // 2)
    guest.ring(Handler.DEFLATE).send_pfns(pages_at(DATA, 1))
    inflate_in_parts(guest, DATA + HUGE // 2, PARTS // 2)
    assert guest.memory.read(DATA, HUGE) == b"\xa5" * HUGE


@pytest.mark.parametrize("flags", [BalloonFlag(0), BalloonFlag.MUST_TELL_HOST])
def test_a_page_listed_whole_in_one_request_goes(guest: Guest, flags: BalloonFlag) -> None:
    guest.device.balloon_configure(BalloonFlag.MAY_DISCARD | flags)
    ring = guest.ring(Handler.INFLATE)
    before = guest.memory.blocks()
    ring.send_pfns(pages_at(DATA + HUGE - 5 * PAGE_SIZE, PARTS + 5))
    assert guest.memory.blocks() == before - HUGE
    assert guest.memory.read(DATA, HUGE) == b"\xa5" * HUGE
    assert guest.device.balloon_counters().pages_kept == 5


def test_reports_shrink_inward_to_huge_pages(guest: Guest) -> None:
    ring = guest.ring(Handler.REPORT)
    before = guest.memory.blocks()
    ring.send(Buffer(DATA + PAGE_SIZE, HUGE, writable=True))
    assert guest.memory.blocks() == before
    ring.send(Buffer(DATA + HUGE - PAGE_SIZE, HUGE + PAGE_SIZE, writable=True))
    assert guest.memory.blocks() == before - HUGE
    assert guest.memory.read(DATA, HUGE) == b"\xa5" * HUGE


def mappings_of(fd: int) -> int:
    """How often this process has the file mapped."""
    inode = str(os.fstat(fd).st_ino)
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(line.split()[4] == inode for line in lines)


@pytest.mark.parametrize("offset", [0, HUGE - 8, HUGE + 4096])
def test_a_dirty_log_on_huge_pages_leaves_no_mapping(guest: Guest, offset: int) -> None:
    # Of less than a page at any offset, as a VMM may ask for; the guest's memory is the file.
    before = mappings_of(guest.memory.fd)
    for _ in range(3):
        log = Log(guest.memory.fd, 4096, offset)
        assert mappings_of(guest.memory.fd) > before
        log.close()
    assert mappings_of(guest.memory.fd) == before
