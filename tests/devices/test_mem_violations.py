"""Memory in unplugged blocks: told once, with its blocks, and dealt with as configured."""

from __future__ import annotations

from dataclasses import replace

from vhostd.devices.base import DeviceEvent, DiscardMemory, Event, GuestRange, Log, StopVm
from vhostd.devices.mem_violations import OnViolation
from vhostd.units import GiB

from tests.devices.test_mem import (
    ADDRESS,
    BLOCK,
    OPTIONS,
    PLUG,
    UNPLUG,
    ask,
    of_type,
    parts,
    started,
)


def test_a_violation_is_told_once_with_its_blocks() -> None:
    mem = started()
    ask(mem, PLUG, 0, 4)
    assert mem.look_begins() == [GuestRange(ADDRESS + 4 * BLOCK, GiB - 4 * BLOCK)]
    log, event = mem.on_looked({7: 4096, 8: BLOCK})
    assert isinstance(log, Log) and isinstance(event, Event)
    assert event.name is DeviceEvent.MEM_VIOLATION
    assert (event.fields["blocks"], event.fields["size"]) == ([(7, 2)], BLOCK + 4096)
    mem.look_begins()
    assert mem.on_looked({7: 4096, 8: BLOCK}) == []
    assert mem.status({}, 0)["violations"] == 2


def test_blocks_that_changed_during_the_look_are_not_judged() -> None:
    mem = started()
    mem.look_begins()
    ask(mem, PLUG, 0, 4)
    ask(mem, UNPLUG, 0, 2, token=2)
    assert mem.on_looked({0: 4096, 3: BLOCK}) == []
    assert mem.status({}, 0)["violations"] == 0


def test_with_discard_the_memory_is_taken_and_a_second_time_counts() -> None:
    mem = started(replace(OPTIONS, on_violation=OnViolation.DISCARD))
    for times in (1, 2):
        mem.look_begins()
        effects = mem.on_looked({9: 8192})
        assert of_type(effects, DiscardMemory) == [DiscardMemory(parts(9, 1))]
        mem.on_discarded(parts(9, 1), None)
        assert mem.status({}, 0)["violations"] == times


def test_with_stop_the_vm_is_stopped_for_a_reason() -> None:
    mem = started(replace(OPTIONS, on_violation=OnViolation.STOP))
    mem.look_begins()
    (stop,) = of_type(mem.on_looked({9: 8192}), StopVm)
    assert stop == StopVm("mem0: the guest uses 8 KiB of unplugged memory")


def test_an_excess_is_told_when_it_grows() -> None:
    mem = started()
    for excess, violations in ((0, 0), (BLOCK, 1), (BLOCK, 1), (3 * BLOCK, 3), (0, 3)):
        mem.look_begins()
        mem.on_excess(excess)
        assert mem.status({}, 0)["violations"] == violations
