"""H34 to H41, H49 to H54, H68: memory tables and the dirty log, as far as numbers decide."""

from __future__ import annotations

import pytest
from vhostd.errors import FrontendError
from vhostd.protocol.features import BACKEND_PROTOCOL_FEATURES, ProtocolFeature
from vhostd.session import actions

from tests.fakes import messages
from tests.fakes.messages import Request, VirtioFeature, WireRegion, u64
from tests.protocol.streams import Watched, watched
from tests.session.conversation import (
    HIGH,
    LOW,
    MIB,
    SPLIT,
    Conversation,
    memfd,
    ring_addresses,
)

TOP = 1 << 64
SPARE = WireRegion(1 << 40, MIB, 1 << 41, 0)

LIES: list[tuple[str, dict[str, int]]] = [
    ("H35 empty", {"size": 0}),
    ("H36 size", {"size": MIB - 1}),
    ("H36 guest address", {"guest_addr": SPARE.guest_addr + 8}),
    ("H37 size 2^63", {"size": 1 << 63, "guest_addr": (1 << 63) + 4096}),
    ("H37 size 2^64-1", {"size": TOP - 1}),
    ("H38 guest", {"guest_addr": TOP - 4096}),
    ("H38 frontend", {"frontend_addr": TOP - 4096}),
    ("H38 offset", {"file_offset": TOP - 4096}),
    ("H39 all of it", {"guest_addr": LOW.guest_addr}),
    ("H39 last page", {"guest_addr": LOW.guest_addr + LOW.size - 4096}),
    ("H39 first page", {"guest_addr": HIGH.guest_addr - MIB + 4096}),
    ("H40 all of it", {"frontend_addr": HIGH.frontend_addr}),
    ("H40 first byte", {"frontend_addr": HIGH.frontend_addr + HIGH.size - 1}),
    ("H41 twice", {"guest_addr": LOW.guest_addr, "frontend_addr": LOW.frontend_addr}),
]
IDS = [name for name, _changes in LIES]


def with_memory() -> Conversation:
    talk = Conversation()
    talk.negotiate()
    talk.add_memory(LOW, HIGH)
    talk.take()
    return talk


def with_table(*regions: WireRegion) -> Conversation:
    talk = Conversation()
    slots = ProtocolFeature.CONFIGURE_MEM_SLOTS | ProtocolFeature.GPA_ADDRESSES
    talk.negotiate(protocol_features=BACKEND_PROTOCOL_FEATURES & ~slots)
    assert set_table(talk, *regions) == 0
    talk.take()
    return talk


def set_table(talk: Conversation, *regions: WireRegion) -> int:
    payload = messages.memory_table(regions)
    return talk.ack(Request.SET_MEM_TABLE, payload, [memfd() for _ in regions])


def guest_addrs(talk: Conversation) -> list[int]:
    return [region.guest_addr for region in talk.state.regions]


@pytest.mark.parametrize("changes", [changes for _name, changes in LIES], ids=IDS)
def test_a_lying_slot_is_refused_and_the_table_kept(changes: dict[str, int]) -> None:
    talk = with_memory()
    before, file = talk.state, Watched()
    slot = messages.memory_slot(SPARE.but(**changes))

    assert talk.ack(Request.ADD_MEM_REG, slot, [file.fd.take()]) == 1

    assert talk.state == before
    assert talk.take() == []
    assert file.closed
    talk.add_memory(SPARE)


@pytest.mark.parametrize("changes", [changes for _name, changes in LIES], ids=IDS)
def test_a_table_with_one_lie_is_refused_whole(changes: dict[str, int]) -> None:
    talk = with_table(LOW, HIGH)
    before = talk.state

    assert set_table(talk, LOW, HIGH, SPARE.but(**changes)) == 1

    assert talk.state == before
    assert talk.take() == []
    assert set_table(talk, LOW, HIGH, SPARE) == 0


def test_regions_may_touch_in_both_spaces() -> None:
    talk = with_memory()
    beside = WireRegion(LOW.size, MIB, LOW.frontend_addr - MIB, 0)

    talk.add_memory(beside)

    assert guest_addrs(talk) == [LOW.guest_addr, HIGH.guest_addr, beside.guest_addr]


@pytest.mark.parametrize("count", [0, 9, 0x8000_0000, 0xFFFF_FFFF])
def test_a_table_that_miscounts_is_refused(count: int) -> None:
    """H34."""
    talk = with_table(LOW, HIGH)
    files = watched(2)
    payload = messages.memory_table([LOW, HIGH], count)

    fds = [file.fd.take() for file in files]
    assert talk.ack(Request.SET_MEM_TABLE, payload, fds) == 1

    assert all(file.closed for file in files)
    assert talk.take() == []


@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_table_needs_one_descriptor_a_region(count: int) -> None:
    talk = with_table(LOW, HIGH)
    files = watched(count)
    payload = messages.memory_table([LOW, HIGH])

    fds = [file.fd.take() for file in files]
    assert talk.ack(Request.SET_MEM_TABLE, payload, fds) == 1

    assert all(file.closed for file in files)


def test_a_full_table_of_eight_is_taken() -> None:
    regions = [WireRegion(n * MIB, MIB, (n + 64) * MIB, 0) for n in range(8)]

    talk = with_table(*regions)

    assert guest_addrs(talk) == [region.guest_addr for region in regions]


def test_as_many_slots_as_advertised_and_no_more() -> None:
    """H49."""
    talk = Conversation()
    talk.negotiate()
    slots = talk.ask(Request.GET_MAX_MEM_SLOTS)
    for n in range(slots):
        talk.add_memory(WireRegion(n * MIB, MIB, (n + 4096) * MIB, 0))

    last = messages.memory_slot(SPARE)
    assert talk.ack(Request.ADD_MEM_REG, last, [memfd()]) == 1
    gone = messages.memory_slot(WireRegion(0, MIB, 4096 * MIB, 0))
    assert talk.ack(Request.REM_MEM_REG, gone) == 0
    assert talk.ack(Request.ADD_MEM_REG, last, [memfd()]) == 0


def test_adding_hands_on_the_new_file_only() -> None:
    talk = with_memory()
    talk.add_memory(SPARE)

    (action,) = talk.take()
    assert isinstance(action, actions.SetRegions)
    assert [source.file is None for source in action.regions] == [True, True, False]
    assert [region.inode for region in talk.state.regions] == [100, 101, 102]


@pytest.mark.parametrize(
    "changes",
    [
        {"guest_addr": SPARE.guest_addr + 4096},
        {"size": SPARE.size - 4096},
        {"frontend_addr": SPARE.frontend_addr + 4096},
    ],
)
def test_removing_a_slot_needs_all_of_its_identity(changes: dict[str, int]) -> None:
    """H50."""
    talk = with_memory()
    talk.add_memory(SPARE)

    assert talk.ack(Request.REM_MEM_REG, messages.memory_slot(SPARE.but(**changes))) == 1
    assert talk.ack(Request.REM_MEM_REG, messages.memory_slot(SPARE.but(file_offset=4096))) == 0
    assert guest_addrs(talk) == [LOW.guest_addr, HIGH.guest_addr]


def test_removing_a_slot_closes_a_descriptor_that_came_along() -> None:
    """H50: old front ends send one."""
    talk = with_memory()
    talk.add_memory(SPARE)
    file = Watched()

    assert talk.ack(Request.REM_MEM_REG, messages.memory_slot(SPARE), [file.fd.take()]) == 0

    assert file.closed


def test_the_region_of_a_running_ring_cannot_be_removed() -> None:
    """H51."""
    talk = Conversation()
    talk.start()

    assert talk.ack(Request.REM_MEM_REG, messages.memory_slot(HIGH)) == 1
    assert talk.ack(Request.REM_MEM_REG, messages.memory_slot(LOW)) == 0
    for index in range(3):
        talk.stop(index)
    assert talk.ack(Request.REM_MEM_REG, messages.memory_slot(HIGH)) == 0


def test_a_table_may_not_move_a_running_ring() -> None:
    """H52: the guest would go on using the old place."""
    talk = with_table(LOW, HIGH)
    talk.set_up(0)
    assert talk.kick(0) == 0
    before = talk.state

    moved = HIGH.but(guest_addr=HIGH.guest_addr + (1 << 32))
    assert set_table(talk, LOW, moved) == 1
    assert set_table(talk, LOW) == 1
    assert talk.state == before
    assert set_table(talk, HIGH, LOW, SPARE) == 0
    assert set_table(talk, HIGH) == 0


def test_two_addresses_are_refused_where_guest_addresses_were_agreed_on() -> None:
    """H54."""
    talk = Conversation()
    talk.negotiate(protocol_features=BACKEND_PROTOCOL_FEATURES)

    assert talk.ack(Request.ADD_MEM_REG, messages.memory_slot(SPARE), [memfd()]) == 1
    talk.add_memory(SPARE.but(frontend_addr=SPARE.guest_addr))


def test_guest_addresses_cannot_be_agreed_on_over_a_table_that_has_others() -> None:
    talk = Conversation()
    talk.send(Request.SET_MEM_TABLE, messages.memory_table([LOW]), [memfd()])
    before = talk.state

    talk.send(Request.SET_PROTOCOL_FEATURES, u64(BACKEND_PROTOCOL_FEATURES))

    assert len(before.regions) == 1
    assert talk.state == before


def test_a_table_the_shell_cannot_map_changes_nothing() -> None:
    """H42 to H48: sizes and kinds of files are the shell's to check."""
    talk = with_memory()
    before, file = talk.state, Watched()
    talk.refuse_next = FrontendError("no memory file")

    assert talk.ack(Request.ADD_MEM_REG, messages.memory_slot(SPARE), [file.fd.take()]) == 1

    assert talk.state == before
    assert file.closed


# -- dirty log -----------------------------------------------------------------------------------


def log_size_for(end: int) -> int:
    return (end + 8 * 4096 - 1) // (8 * 4096)


def test_a_log_must_cover_guest_memory() -> None:
    """H68."""
    talk = with_memory()
    enough = log_size_for(HIGH.guest_addr + HIGH.size)

    for size in (8, enough - 1):
        answer = talk.send(Request.SET_LOG_BASE, messages.log(size, 0), [memfd()])
        assert answer == u64(1)
    assert talk.send(Request.SET_LOG_BASE, messages.log(enough, 4096), [memfd()]) == b""

    (action,) = talk.take()
    assert isinstance(action, actions.SetLog)
    assert (action.log.size, action.log.file_offset) == (enough, 4096)


def test_a_log_can_be_asked_a_verdict_for() -> None:
    talk = with_memory()

    assert talk.ack(Request.SET_LOG_BASE, messages.log(1 << 20, 0), [memfd()]) == 0
    assert talk.ack(Request.SET_LOG_BASE, messages.log(8, 0), [memfd()]) == 1


def test_a_running_ring_starts_and_stops_logging_where_it_is() -> None:
    """Migration sends a running ring its own addresses with another flag."""
    talk = Conversation()
    talk.start(rings=[0])
    talk.ack(Request.SET_LOG_BASE, messages.log(1 << 20, 0), [memfd()])
    talk.take()
    used_guest_addr = HIGH.guest_addr + 0x1_4000

    for flags in (1, 1, 0):
        payload = messages.vring_addr(0, *ring_addresses(0), flags, used_guest_addr)
        assert talk.ack(Request.SET_VRING_ADDR, payload) == 0

    on, off = talk.take()
    assert isinstance(on, actions.RestartRing)
    assert isinstance(off, actions.RestartRing)
    assert (on.setup.log_used, on.setup.log_addr, on.kick) == (True, used_guest_addr, None)
    assert on.setup.enabled
    assert not off.setup.log_used


def test_used_ring_must_be_logged_inside_the_log() -> None:
    """H68: it may be outside guest RAM, but not outside the log."""
    talk = Conversation()
    talk.start(SPLIT | VirtioFeature.LOG_ALL, rings=[0])
    talk.ack(Request.SET_LOG_BASE, messages.log(1 << 20, 0), [memfd()])
    covered = (1 << 20) * 8 * 4096
    used_size = 4 + 8 * 128
    last_legal = covered - used_size

    for log_addr, verdict in ((last_legal, 0), (last_legal + 1, 1), (TOP - 8, 1)):
        payload = messages.vring_addr(0, *ring_addresses(0), 1, log_addr)
        assert talk.ack(Request.SET_VRING_ADDR, payload) == verdict
