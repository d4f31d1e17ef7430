"""Whose the bits are that say which pages are in the balloon: one driver's, on one connection."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
from vhostd._native import Handler, Mapping, Region

from tests.fakes.memory import MIB, PAGE_SIZE, GuestMemory, open_memfd
from tests.native.rig import LAYOUTS, Guest, Host, Layout, regions

HIGH = 1 << 30
SIZE = 8 * MIB
PAGE = HIGH // PAGE_SIZE + 3


@pytest.fixture
def guest(host: Host) -> Iterator[Guest]:
    with Guest.on(host, GuestMemory.flat(32 * MIB)) as made:
        yield made


@pytest.fixture
def other() -> Iterator[Mapping]:
    """A second file, for memory that comes and goes."""
    fd = open_memfd(SIZE)
    mapping = Mapping(fd)
    yield mapping
    mapping.close()
    os.close(fd)


def plug(guest: Guest, other: Mapping | None) -> None:
    """Have the table with the second file, or without it."""
    table = regions(guest.memory, guest.mapping)
    if other is not None:
        table.append(Region(HIGH, SIZE, 0, other))
    with guest.host.parked():
        guest.device.set_regions(table)


def inflated(guest: Guest) -> int:
    return guest.device.balloon_counters().inflated_pages


def test_pages_go_and_come_with_the_file_they_are_of(guest: Guest, other: Mapping) -> None:
    inflate, deflate = guest.ring(Handler.INFLATE), guest.ring(Handler.DEFLATE)
    plug(guest, other)
    inflate.send_pfns([4096, PAGE])
    plug(guest, None)
    assert inflated(guest) == 1
    plug(guest, other)
    assert inflated(guest) == 2
    deflate.send_pfns([PAGE])
    assert inflated(guest) == 1
    plug(guest, None)


def test_a_file_that_was_away_at_a_reset_has_nothing_of_the_old_driver(
    guest: Guest, other: Mapping
) -> None:
    inflate, deflate = guest.ring(Handler.INFLATE), guest.ring(Handler.DEFLATE)
    plug(guest, other)
    inflate.send_pfns([PAGE])
    plug(guest, None)
    with guest.host.parked():
        guest.device.balloon_reset()
    plug(guest, other)
    assert inflated(guest) == 0
    deflate.send_pfns([PAGE])
    assert inflated(guest) == 0
    assert guest.device.balloon_counters().pfns_repeated == 1
    inflate.send_pfns([PAGE + 1])
    assert (inflated(guest), other.given_up_pages) == (1, 1)
    plug(guest, None)


def test_another_connection_begins_with_nothing(guest: Guest) -> None:
    """The mapping lives on where another device of the VM uses the file."""
    guest.ring(Handler.INFLATE).send_pfns([4096, 4097])
    again = guest.host.device()
    with guest.host.parked():
        again.set_regions(regions(guest.memory, guest.mapping))
    assert again.balloon_counters().inflated_pages == 0
    guest.host.remove(again)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_ring_knows_whether_a_chain_was_taken_since_its_start(
    guest: Guest, layout: Layout
) -> None:
    ring = guest.ring(Handler.INFLATE, layout)
    assert not ring.statistics().taken
    ring.send_pfns([4096])
    assert ring.statistics().taken
    ring.start(ring.stop())
    assert ring.statistics().taken, "the same start, with other settings"
    position = ring.stop()
    with guest.host.parked():
        guest.device.start_ring(0, replace(ring.setup(position), start_number=1))
    assert not ring.statistics().taken
