"""How a guest gets to a size: arithmetic that an operator can check."""

from __future__ import annotations

import pytest
from vhostd.devices.base import GuestRange, Refused
from vhostd.devices.memory_plan import MemRoom, boot_memory_size, plan_memory
from vhostd.units import BALLOON_PAGE_SIZE, GiB, MiB

ROOMS = [MemRoom("mem0", GiB, 2 * MiB), MemRoom("mem1", 2 * GiB, 128 * MiB)]


@pytest.mark.parametrize(
    ("size", "mem0", "mem1", "balloon"),
    [
        (GiB, 0, 0, 0),
        (512 * MiB, 0, 0, 512 * MiB),
        (0, 0, 0, GiB),
        (GiB + 1, 2 * MiB, 0, 2 * MiB - 4096),
        (GiB - 4095, 0, 0, 0),
        (2 * GiB, GiB, 0, 0),
        (2 * GiB + MiB, GiB, 128 * MiB, 127 * MiB),
        (4 * GiB, GiB, 2 * GiB, 0),
    ],
)
def test_blocks_first_and_the_balloon_for_the_rest(
    size: int, mem0: int, mem1: int, balloon: int
) -> None:
    plan = plan_memory(GiB, ROOMS, size, has_balloon=True)
    assert (plan.requested, plan.balloon) == ({"mem0": mem0, "mem1": mem1}, balloon)
    # As near as pages of 4 KiB get, and never less than was asked for.
    assert 0 <= GiB + mem0 + mem1 - balloon - size < BALLOON_PAGE_SIZE


def test_without_a_balloon_the_guest_keeps_what_is_left_of_a_block() -> None:
    plan = plan_memory(GiB, ROOMS, GiB + MiB, has_balloon=False)
    assert (plan.requested["mem0"], plan.balloon) == (2 * MiB, 0)
    with pytest.raises(Refused, match="has no balloon"):
        plan_memory(GiB, ROOMS, 512 * MiB, has_balloon=False)


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(Refused, match="can have 4 GiB at most"):
        plan_memory(GiB, ROOMS, 4 * GiB + 1, has_balloon=True)


def test_windows_are_no_boot_memory() -> None:
    regions = [GuestRange(0, GiB), GuestRange(4 * GiB, GiB), GuestRange(8 * GiB, GiB)]
    assert boot_memory_size(regions, [GuestRange(8 * GiB, GiB)]) == 2 * GiB
