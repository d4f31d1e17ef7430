"""The virtio-mem device: bytes of its answers, its config space, and what it asks of the host."""

from __future__ import annotations

from dataclasses import replace
from struct import pack, unpack

import pytest
from vhostd.devices.base import (
    Chain,
    Complete,
    DiscardMemory,
    Effects,
    Event,
    GuestRange,
    Log,
    MemorySlot,
    NotifyConfig,
    PopulateMemory,
    PublishConfig,
    Role,
)
from vhostd.devices.mem import Mem
from vhostd.devices.mem_window import MemOptions
from vhostd.devices.verdict import Finding, Verdict
from vhostd.errors import GuestError
from vhostd.units import GiB, MiB

BLOCK = 2 * MiB
ADDRESS = 8 * GiB
OPTIONS = MemOptions("mem0", ADDRESS, GiB, requested_size=128 * MiB, node=1)
PLUG, UNPLUG, UNPLUG_ALL, STATE = range(4)
ACK, NACK, BUSY, ERROR = (bytes([code]) + bytes(9) for code in range(4))


FREE = Verdict(Finding.FREE, "")
PINNED = Verdict(Finding.PINNED, "gpu0 (vfio-pci)")


def judged(options: MemOptions = OPTIONS, verdict: Verdict = FREE) -> Mem:
    """A device of a machine in which nothing pins memory."""
    mem = Mem(options)
    mem.on_verdict(verdict)
    return mem


def started(options: MemOptions = OPTIONS) -> Mem:
    """A device with a driver and an empty window."""
    mem = judged(options)
    mem.on_memory([MemorySlot(0, GiB), MemorySlot(ADDRESS, options.size)])
    mem.on_discarded(options.window, None)
    mem.on_started()
    return mem


def chain(kind: int, first: int = 0, count: int = 0, *, token: int = 1, at: int = 0) -> Chain:
    data = pack("<H6xQH6x", kind, ADDRESS + first * BLOCK, count)
    return Chain(0, Role.GUEST_REQUEST, token, data, 24, 1, 10, 0, at or token)


def ask(mem: Mem, kind: int, first: int = 0, count: int = 0, *, token: int = 1) -> Effects:
    return mem.on_chain(chain(kind, first, count, token=token), 0)


def answer(effects: Effects) -> bytes:
    (complete,) = (effect for effect in effects if isinstance(effect, Complete))
    return complete.data


def of_type(effects: Effects, kind: type) -> list[object]:
    return [effect for effect in effects if isinstance(effect, kind)]


def parts(first: int, count: int) -> GuestRange:
    return GuestRange(ADDRESS + first * BLOCK, count * BLOCK)


# -- config space ----------------------------------------------------------------------------------


def test_the_config_space_is_as_the_specification_lays_it_out() -> None:
    config = Mem(OPTIONS).config()
    assert len(config) == 56
    assert unpack("<QH6sQQQQQ", config) == (
        *(BLOCK, 1, bytes(6), ADDRESS, GiB),
        *(384 * MiB, 0, 128 * MiB),
    )
    assert Mem(OPTIONS).config_writable == bytes(56)


def test_usable_is_nothing_when_nothing_is_requested_and_never_more_than_the_window() -> None:
    assert unpack("<Q", Mem(replace(OPTIONS, requested_size=0)).config()[32:40]) == (0,)
    assert unpack("<Q", Mem(replace(OPTIONS, requested_size=GiB)).config()[32:40]) == (GiB,)


def test_usable_shrinks_only_when_all_is_unplugged() -> None:
    mem = started()
    mem.set_requested_size(2 * BLOCK)
    assert unpack("<QQQ", mem.config()[32:]) == (384 * MiB, 0, 2 * BLOCK)
    assert answer(ask(mem, UNPLUG_ALL)) == ACK
    assert unpack("<QQQ", mem.config()[32:]) == (256 * MiB + 2 * BLOCK, 0, 2 * BLOCK)


def test_a_large_guest_gets_room_for_large_memory_blocks() -> None:
    options = MemOptions("mem0", 128 * GiB, 64 * GiB, requested_size=3 * GiB)
    mem = Mem(options)
    mem.on_memory([MemorySlot(0, 80 * GiB), MemorySlot(128 * GiB, 64 * GiB)])
    assert unpack("<Q", mem.config()[32:40]) == (7 * GiB,)


# -- requests --------------------------------------------------------------------------------------


def test_a_plug_is_published_before_it_is_acknowledged() -> None:
    effects = ask(started(), PLUG, 0, 64)
    publish, complete, event = effects
    assert publish == PublishConfig(32, pack("<QQQ", 384 * MiB, 128 * MiB, 128 * MiB))
    assert complete == Complete(0, 1, ACK)
    assert isinstance(event, Event) and event.fields["plugged"] == 128 * MiB


def test_an_unplug_gives_the_memory_back() -> None:
    mem = started()
    ask(mem, PLUG, 0, 10)
    effects = ask(mem, UNPLUG, 2, 3, token=2)
    assert answer(effects) == ACK
    assert of_type(effects, DiscardMemory) == [DiscardMemory(parts(2, 3))]
    assert mem.plugged_size == 7 * BLOCK


@pytest.mark.parametrize(
    ("kind", "address", "count"),
    [
        (PLUG, ADDRESS - BLOCK, 1),
        (PLUG, ADDRESS + 1, 1),
        (PLUG, ADDRESS, 0),
        (PLUG, ADDRESS + 384 * MiB - BLOCK, 2),
        (PLUG, 2**64 - BLOCK, 1),
        (UNPLUG, ADDRESS, 0),
        (UNPLUG, ADDRESS + 4096, 1),
        (STATE, ADDRESS, 0xFFFF),
        (STATE, 0, 1),
        (4, ADDRESS, 1),
        (0xFFFF, ADDRESS, 1),
    ],
)
def test_what_is_not_whole_usable_blocks_is_an_error(kind: int, address: int, count: int) -> None:
    mem = started()
    request = Chain(
        0, Role.GUEST_REQUEST, 1, pack("<H6xQH6x", kind, address, count), 24, 1, 10, 0, 1
    )
    effects = mem.on_chain(request, 0)
    assert answer(effects) == ERROR
    assert of_type(effects, Log)
    assert mem.plugged_size == 0


def test_padding_and_what_follows_the_request_are_ignored() -> None:
    data = b"\x00\x00" + b"\xff" * 6 + pack("<QH", ADDRESS, 1) + b"\xff" * 30
    effects = started().on_chain(Chain(0, Role.GUEST_REQUEST, 1, data, len(data), 1, 10, 0, 1), 0)
    assert answer(effects) == ACK


def test_a_block_is_plugged_once_and_unplugged_once() -> None:
    mem = started()
    ask(mem, PLUG, 4, 2)
    assert answer(ask(mem, PLUG, 5, 2, token=2)) == ERROR
    assert answer(ask(mem, UNPLUG, 3, 2, token=3)) == ERROR
    assert mem.plugged_size == 2 * BLOCK


def test_more_than_requested_is_refused_and_one_that_does_not_listen_has_to_wait() -> None:
    mem = started()
    for token in range(1, 4):
        effects = ask(mem, PLUG, 0, 65, token=token)
        assert answer(effects) == NACK
        assert of_type(effects, NotifyConfig)
    assert answer(ask(mem, PLUG, 0, 65, token=4)) == BUSY
    assert mem.on_timer() == [NotifyConfig()]
    assert mem.on_timer() == []
    mem.set_requested_size(130 * MiB)
    assert answer(ask(mem, PLUG, 0, 65, token=5)) == ACK


def test_states() -> None:
    mem = started()
    ask(mem, PLUG, 0, 2)
    for first, count, state in ((0, 2, 0), (2, 9, 1), (1, 2, 2)):
        expected = bytes(8) + pack("<H", state)
        assert answer(ask(mem, STATE, first, count, token=2 + first)) == expected


@pytest.mark.parametrize(("size", "room"), [(23, 10), (0, 10), (24, 9), (24, 0)])
def test_a_chain_too_small_is_not_answered(size: int, room: int) -> None:
    request = Chain(0, Role.GUEST_REQUEST, 1, bytes(size), size, 1, room, 0, 1)
    with pytest.raises(GuestError):
        started().on_chain(request, 0)


def test_a_request_that_comes_again_is_answered_again_and_not_carried_out_again() -> None:
    mem = started()
    assert answer(mem.on_chain(chain(PLUG, 0, 4, token=1, at=9), 0)) == ACK
    mem.on_stopped()
    mem.on_started()
    again = mem.on_chain(chain(PLUG, 0, 4, token=2, at=9), 0)
    assert again == [Complete(0, 2, ACK)]
    assert mem.plugged_size == 4 * BLOCK


def test_the_same_request_is_carried_out_where_it_is_another_chain() -> None:
    """A packed ring has the same slot in the same round again after two rounds."""
    mem = started()
    slot = 5 << 16
    assert answer(mem.on_chain(chain(PLUG, 0, 4, token=1, at=slot + 7), 0)) == ACK
    assert answer(mem.on_chain(chain(UNPLUG, 0, 4, token=2, at=slot + 8), 0)) == ACK
    mem.on_discarded(parts(0, 4), None)
    assert answer(mem.on_chain(chain(PLUG, 0, 4, token=3, at=slot + 263), 0)) == ACK
    assert mem.plugged_size == 4 * BLOCK


def test_what_was_owed_comes_again_to_a_driver_that_looks_new() -> None:
    """Stopped and continued where its ring is at its beginning."""
    mem = started()
    mem.on_chain(chain(PLUG, 0, 4, token=1, at=9), 0)
    mem.on_stopped()
    mem.on_driver_reset()
    mem.on_started()
    assert mem.on_chain(chain(PLUG, 0, 4, token=2, at=9), 0) == [Complete(0, 2, ACK)]


def test_nothing_comes_again_after_a_reset_of_the_machine() -> None:
    mem = started()
    mem.on_chain(chain(PLUG, 0, 4, token=1, at=9), 0)
    mem.on_stopped()
    mem.on_system_reset()
    mem.on_discarded(parts(0, 4), None)
    mem.on_started()
    assert answer(mem.on_chain(chain(PLUG, 0, 4, token=2, at=9), 0)) == ACK
    assert mem.plugged_size == 4 * BLOCK


def test_a_refused_chain_leaves_what_may_come_again_and_comes_again_itself() -> None:
    mem = started()
    mem.on_chain(chain(PLUG, 0, 1, at=9), 0)
    refused = Chain(0, Role.GUEST_REQUEST, 2, b"", 0, 1, 10, 0, 10)
    with pytest.raises(GuestError):
        mem.on_chain(refused, 0)
    mem.on_stopped()
    mem.on_started()
    assert mem.on_chain(chain(PLUG, 0, 1, token=3, at=9), 0) == [Complete(0, 3, ACK)]
    with pytest.raises(GuestError):
        mem.on_chain(refused, 0)


# -- what the host does ----------------------------------------------------------------------------


def test_blocks_are_plugged_again_only_when_they_are_empty() -> None:
    mem = started()
    ask(mem, PLUG, 0, 4)
    ask(mem, UNPLUG, 0, 4, token=2)
    assert ask(mem, PLUG, 2, 1, token=3) == []
    assert ask(mem, STATE, 0, 1, token=4) == []  # in its turn
    assert not of_type(mem.on_discarded(parts(0, 2), None), Complete)
    first, second = of_type(mem.on_discarded(parts(2, 2), None), Complete)
    assert (first, second) == (Complete(0, 3, ACK), Complete(0, 4, bytes(8) + b"\1\0"))


def test_a_guest_in_need_is_not_kept_from_memory_by_a_failed_discard() -> None:
    mem = started()
    ask(mem, PLUG, 0, 1)
    ask(mem, UNPLUG, 0, 1, token=2)
    ask(mem, PLUG, 0, 1, token=3)
    effects = mem.on_discarded(parts(0, 1), "Input/output error")
    assert answer(effects) == ACK
    assert mem.status({}, 0)["discard_errors"] == 1


def test_prealloc_populates_before_the_guest_may_use_it() -> None:
    mem = started(replace(OPTIONS, prealloc=True))
    assert ask(mem, PLUG, 0, 8) == [PopulateMemory(parts(0, 8))]
    assert mem.plugged_size == 0
    assert answer(mem.on_populated(parts(0, 8), None)) == ACK


def test_no_memory_to_populate_is_busy_with_nothing_half_done() -> None:
    mem = started(replace(OPTIONS, prealloc=True))
    ask(mem, PLUG, 0, 8)
    effects = mem.on_populated(parts(0, 8), "No space left on device")
    assert answer(effects) == BUSY
    assert of_type(effects, DiscardMemory) == [DiscardMemory(parts(0, 8))]
    assert mem.plugged_size == 0
    assert "No space left on device" in mem.status({}, 0)["standing"]
    assert mem.on_timer() == [NotifyConfig()]


def test_a_request_lowered_meanwhile_counts() -> None:
    mem = started(replace(OPTIONS, prealloc=True))
    ask(mem, PLUG, 0, 8)
    mem.set_requested_size(2 * BLOCK)
    effects = mem.on_populated(parts(0, 8), None)
    assert answer(effects) == NACK
    assert of_type(effects, DiscardMemory) == [DiscardMemory(parts(0, 8))]


def test_what_was_populated_for_a_driver_that_left_is_taken_back() -> None:
    mem = started(replace(OPTIONS, prealloc=True))
    ask(mem, PLUG, 0, 8)
    mem.on_stopped()
    assert mem.on_populated(parts(0, 8), None) == [DiscardMemory(parts(0, 8))]


def test_what_a_later_driver_plugged_is_never_taken_back() -> None:
    mem = started(replace(OPTIONS, prealloc=True))
    ask(mem, PLUG, 0, 8)
    mem.on_stopped()
    mem.on_started()
    ask(mem, PLUG, 0, 8, token=2)
    assert answer(mem.on_populated(parts(0, 8), None)) == ACK
    assert mem.on_populated(parts(0, 8), None) == []
    assert mem.plugged_size == 8 * BLOCK


# -- for people and successors ---------------------------------------------------------------------


def test_where_a_guest_stands_and_why() -> None:
    mem = Mem(OPTIONS)
    assert "no guest driver runs" in mem.status({}, 0)["standing"]
    mem = started(MemOptions("mem0", ADDRESS, 4 * GiB, requested_size=2 * GiB))
    ask(mem, PLUG, 0, 512)
    assert mem.status({}, 1)["standing"] == "the guest is at work"
    assert "has not onlined" in mem.status({}, 10)["standing"]
    mem.set_requested_size(GiB)
    assert mem.status({}, 10)["standing"] == "reached"
    mem.set_requested_size(0)
    assert "the guest is busy" in mem.status({}, 10)["standing"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", 2 * GiB),
        ("requested_size", 1),
        ("usable_size", 2 * GiB),
        ("plugged", [[0, 513]]),
        ("plugged", [[-1, 1]]),
        ("plugged", [[0, 0]]),
        ("requested_size", 512 * MiB),
        ("violations", "many"),
        ("surprise", 1),
    ],
)
def test_saved_state_that_does_not_fit_is_refused(key: str, value: object) -> None:
    saved = started().save() | {key: value}
    heir = Mem(OPTIONS)
    with pytest.raises(ValueError):
        heir.load(saved)
    assert heir.save() == Mem(OPTIONS).save()
