"""What the VMM does to a virtio-mem device: windows, pinned and encrypted memory, resets."""

from __future__ import annotations

from dataclasses import replace

import pytest
from vhostd.devices.base import (
    DiscardMemory,
    GuestRange,
    Log,
    MemorySlot,
    NotifyConfig,
    PopulateMemory,
    Refused,
)
from vhostd.devices.mem import Mem
from vhostd.devices.verdict import Finding, Verdict
from vhostd.units import GiB, MiB

from tests.devices.test_mem import (
    ACK,
    ADDRESS,
    BLOCK,
    BUSY,
    FREE,
    OPTIONS,
    PINNED,
    PLUG,
    UNPLUG,
    UNPLUG_ALL,
    answer,
    ask,
    chain,
    judged,
    of_type,
    parts,
    started,
)


def test_a_new_window_is_emptied_first() -> None:
    mem = judged()
    assert not of_type(mem.on_memory([MemorySlot(0, GiB)]), DiscardMemory)
    effects = mem.on_memory([MemorySlot(0, GiB), MemorySlot(ADDRESS, GiB)])
    assert of_type(effects, DiscardMemory) == [DiscardMemory(OPTIONS.window)]
    assert not mem.on_memory([MemorySlot(0, GiB), MemorySlot(ADDRESS, GiB)])


@pytest.mark.parametrize(
    ("slots", "reason"),
    [
        ([], "no region of exactly 1 GiB at 0x200000000"),
        ([MemorySlot(ADDRESS, 2 * GiB)], "no region of exactly"),
        ([MemorySlot(ADDRESS - GiB, 3 * GiB)], "no region of exactly"),
        ([MemorySlot(ADDRESS, GiB, GiB)], "pages of 1 GiB can't be given back in blocks of 2 MiB"),
    ],
)
def test_without_its_own_window_nothing_is_touched(slots: list[MemorySlot], reason: str) -> None:
    mem = judged()
    assert not of_type(mem.on_memory(slots), DiscardMemory)
    assert of_type(mem.on_started(), Log)
    assert answer(ask(mem, PLUG, 0, 1)) == BUSY
    status = mem.status({}, 0)
    assert (status["window"], status["plugged"]) == (False, 0)
    assert reason in status["standing"]


def test_a_window_that_may_be_pinned_waits_for_the_verdict() -> None:
    mem = Mem(OPTIONS)
    effects = mem.on_memory([MemorySlot(ADDRESS, GiB)])
    assert not of_type(effects, DiscardMemory)
    assert mem.look_begins() == []
    assert DiscardMemory(OPTIONS.window) in mem.on_verdict(FREE)
    assert mem.on_verdict(FREE) == []


def test_a_guest_may_be_asked_for_less_before_the_verdict_and_is_busy_until_then() -> None:
    mem = started()
    ask(mem, PLUG, 0, 4)
    mem.on_verdict(Verdict())
    mem.set_requested_size(0)
    assert answer(ask(mem, UNPLUG, 0, 4, token=2)) == BUSY
    assert "not known whether guest memory is pinned" in mem.status({}, 0)["standing"]
    mem.on_verdict(FREE)
    assert DiscardMemory(parts(0, 4)) in ask(mem, UNPLUG, 0, 4, token=3)


@pytest.mark.parametrize("verdict", [Verdict(), PINNED])
def test_what_is_unplugged_meanwhile_is_withheld_also_by_a_successor(verdict: Verdict) -> None:
    mem = started()
    ask(mem, PLUG, 0, 4)
    mem.on_verdict(verdict)
    assert not of_type(ask(mem, UNPLUG_ALL, token=2), DiscardMemory)
    assert mem.status({}, 0)["withheld"] == 4 * BLOCK
    heir = Mem(OPTIONS)
    heir.load(mem.save())
    assert not of_type(heir.on_memory([MemorySlot(ADDRESS, GiB)]), DiscardMemory)
    assert heir.status({}, 0)["withheld"] == 4 * BLOCK
    assert DiscardMemory(OPTIONS.window) in heir.on_verdict(FREE)
    assert heir.status({}, 0)["withheld"] == 0


def test_a_discard_that_waits_in_line_is_not_made_once_memory_is_pinned() -> None:
    mem = started()
    ask(mem, PLUG, 0, 4)
    assert of_type(ask(mem, UNPLUG, 0, 4, token=2), DiscardMemory)
    mem.on_verdict(PINNED)
    assert not mem.discard_due(parts(0, 4))
    mem.on_discarded(parts(0, 4), None)
    assert mem.status({}, 0)["withheld"] == 4 * BLOCK


def test_pinned_memory_is_kept_and_given_back_when_it_is_free() -> None:
    mem = started()
    ask(mem, PLUG, 0, 4)
    mem.on_verdict(PINNED)
    assert answer(ask(mem, UNPLUG, 0, 1, token=2)) == BUSY
    with pytest.raises(Refused, match="can't give memory back now: guest memory is pinned by gpu0"):
        mem.set_requested_size(0)
    mem.set_requested_size(256 * MiB)
    effects = mem.on_verdict(FREE)
    rest = GuestRange(ADDRESS + 4 * BLOCK, GiB - 4 * BLOCK)
    assert of_type(effects, DiscardMemory) == [DiscardMemory(rest)]
    assert of_type(effects, NotifyConfig)


def test_encrypted_memory_is_not_resized_at_all() -> None:
    mem = started()
    mem.on_verdict(Verdict(Finding.ENCRYPTED, "sev0"))
    with pytest.raises(Refused, match="encrypted by sev0"):
        mem.set_requested_size(GiB)


@pytest.mark.parametrize(
    ("size", "reason"),
    [(GiB + BLOCK, "has a window of 1 GiB"), (BLOCK + 1, "the nearest are 2097152 and 4194304")],
)
def test_sizes_that_can_t_be_are_refused(size: int, reason: str) -> None:
    mem = started()
    with pytest.raises(Refused, match=reason):
        mem.set_requested_size(size)
    assert mem.requested_size == 128 * MiB


def test_a_system_reset_unplugs_all_unless_a_driver_runs() -> None:
    mem = started()
    ask(mem, PLUG, 0, 4)
    assert mem.on_system_reset() == []
    mem.on_stopped()
    effects = mem.on_system_reset()
    assert of_type(effects, DiscardMemory) == [DiscardMemory(parts(0, 4))]
    assert mem.plugged_size == 0


def test_a_driver_s_reset_unplugs_nothing() -> None:
    mem = started()
    ask(mem, PLUG, 0, 4)
    mem.on_stopped()
    mem.on_driver_reset()
    mem.on_started()
    assert mem.plugged_size == 4 * BLOCK


def test_a_guest_that_stands_still_is_told_to_try_again_more_and_more_rarely() -> None:
    mem = started()
    mem.set_requested_size(BLOCK)
    told = [beat for beat in range(60) if NotifyConfig() in mem.on_timer()]
    assert told == [2, 8, 20, 36, 52]
    ask(mem, PLUG, 0, 1)
    assert not any(mem.on_timer() for _ in range(60))


def test_blocks_emptied_while_they_were_populated_are_populated_again() -> None:
    """A sweep that ends after the guest was told would take its memory away."""
    mem = started(replace(OPTIONS, prealloc=True))
    ask(mem, PLUG, 0, 4)
    mem.on_verdict(PINNED)
    (sweep,) = of_type(mem.on_verdict(FREE), DiscardMemory)
    assert mem.on_populated(parts(0, 4), None) == []
    assert mem.plugged_size == 0
    again = mem.on_discarded(OPTIONS.window, None)
    assert sweep == DiscardMemory(OPTIONS.window)
    assert PopulateMemory(parts(0, 4)) in again
    assert answer(mem.on_populated(parts(0, 4), None)) == ACK
    assert not mem.discard_due(parts(0, 4))


def test_the_end_of_a_reason_ends_its_telling() -> None:
    mem = started()
    ask(mem, PLUG, 0, 4)
    mem.on_verdict(PINNED)
    ask(mem, UNPLUG, 0, 1, token=2)
    assert "pinned by gpu0" in mem.status({}, 9)["standing"]
    mem.on_verdict(FREE)
    assert "pinned" not in mem.status({}, 9)["standing"]


def test_one_that_was_told_to_wait_is_not_nudged_before() -> None:
    mem = Mem(OPTIONS)
    mem.on_started()
    for token in range(1, 6):
        assert answer(ask(mem, PLUG, 0, 1, token=token)) == BUSY
    told = [beat for beat in range(20) if NotifyConfig() in mem.on_timer()]
    assert told == [15]


def test_what_the_host_failed_to_take_is_no_violation_and_tried_again() -> None:
    mem = started()
    ask(mem, PLUG, 0, 4)
    ask(mem, UNPLUG, 0, 2, token=2)
    mem.on_discarded(parts(0, 2), "Input/output error")
    assert parts(0, 2).end <= mem.look_begins()[0].guest_addr
    assert mem.on_looked({}) == []
    assert mem.on_timer() == [DiscardMemory(parts(0, 2))]
    mem.on_discarded(parts(0, 2), None)
    assert mem.look_begins()[0] == parts(0, 2)


def test_several_answers_that_were_not_out_come_again() -> None:
    mem = started()
    requests = [chain(PLUG, first, 2, token=first + 1, at=first + 9) for first in (0, 2, 4)]
    for request in requests:
        assert answer(mem.on_chain(request, 0)) == ACK
    mem.on_stopped()
    mem.on_started()
    for request in requests:
        assert answer(mem.on_chain(replace(request, token=request.token + 50), 0)) == ACK
    assert mem.plugged_size == 6 * BLOCK
