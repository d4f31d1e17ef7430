"""H56 to H61: what a ring is set up with: size, addresses, base."""

from __future__ import annotations

import os

import pytest
from vhostd.protocol.requests import Request
from vhostd.session import actions
from vhostd.session.actions import RingPosition
from vhostd.session.ring_layout import position_of
from vhostd.session.state import RingAddresses

from tests.fakes import messages
from tests.fakes.messages import VirtioFeature, u64, vring_state
from tests.protocol.streams import Watched
from tests.session.conversation import (
    HIGH,
    LOW,
    PACKED,
    QUEUES,
    SPLIT,
    Conversation,
    eventfd,
    ring_addresses,
)

TOP = 1 << 64


def ready(features: int = SPLIT) -> Conversation:
    """Memory and features, no ring."""
    talk = Conversation()
    talk.negotiate(features)
    talk.add_memory(LOW, HIGH)
    talk.take()
    return talk


def started(talk: Conversation) -> actions.StartRing:
    """The only start since the last look."""
    (start,) = [action for action in talk.take() if isinstance(action, actions.StartRing)]
    return start


def guest(index: int) -> RingAddresses:
    """Where the guest has the ring that ring_addresses() names for the VMM."""
    offset = HIGH.guest_addr - HIGH.frontend_addr
    return RingAddresses(*(address + offset for address in ring_addresses(index)))


def test_ring_messages_of_a_ring_there_is_not_are_refused() -> None:
    """H56."""
    talk = Conversation()
    talk.start(rings=[0])
    before = talk.state
    talk.take()
    descriptors = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counts our own descriptors
    for index in (QUEUES, 255, 0xFFFF_FFFF):
        for request in (
            Request.SET_VRING_NUM,
            Request.SET_VRING_BASE,
            Request.SET_VRING_ENABLE,
        ):
            assert talk.ack(request, vring_state(index, 1)) == 1
        assert talk.ack(Request.SET_VRING_ADDR, messages.vring_addr(index, 0, 0, 0)) == 1
        assert talk.stop(index) == 0
    for index in (QUEUES, 255, 0x200, 1 << 32):
        for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
            assert talk.ack(request, u64(index), [eventfd()]) == 1
    assert talk.state == before
    assert talk.take() == []
    assert len(os.listdir("/proc/self/fd")) == descriptors  # noqa: PTH208


# -- size ------------------------------------------------------------------------------------------

ILLEGAL_SIZES = [0, 1, 32769, 65535, 0x8000_0000, 0xFFFF_FFFF]


@pytest.mark.parametrize("size", [*ILLEGAL_SIZES, 3, 127])
def test_split_rings_have_a_power_of_two_of_descriptors(size: int) -> None:
    """H57."""
    talk = ready()

    assert talk.ack(Request.SET_VRING_NUM, vring_state(0, size)) == 1
    talk.set_up(0)
    assert talk.kick(0) == 0


@pytest.mark.parametrize("size", [2, 256, 32768])
def test_legal_sizes_are_taken(size: int) -> None:
    assert ready().ack(Request.SET_VRING_NUM, vring_state(0, size)) == 0


@pytest.mark.parametrize("size", ILLEGAL_SIZES)
def test_packed_rings_have_limits_too(size: int) -> None:
    """H57."""
    assert ready(PACKED).ack(Request.SET_VRING_NUM, vring_state(0, size)) == 1


def test_packed_rings_may_have_any_number_of_descriptors() -> None:
    talk = ready(PACKED)
    talk.set_up(0, size=3, base=None)

    assert talk.kick(0) == 0
    assert started(talk).setup.size == 3


def test_a_size_told_before_the_layout_is_checked_at_the_start() -> None:
    talk = Conversation()
    talk.negotiate(PACKED)
    talk.add_memory(LOW, HIGH)
    talk.set_up(0, size=3, base=None)
    assert talk.ack(Request.SET_FEATURES, u64(SPLIT)) == 0

    assert talk.kick(0) == 1
    assert not talk.state.rings[0].started


@pytest.mark.parametrize("size", [64, 256])
def test_a_running_ring_keeps_its_size(size: int) -> None:
    """H60."""
    talk = Conversation()
    talk.start()

    assert talk.ack(Request.SET_VRING_NUM, vring_state(0, size)) == 1
    assert talk.ack(Request.SET_VRING_NUM, vring_state(0, 128)) == 0
    assert talk.state.rings[0].size == 128


# -- addresses -------------------------------------------------------------------------------------

DESC, AVAIL, USED = ring_addresses(0)
END = HIGH.frontend_addr + HIGH.size
ADDRESS_LIES: dict[str, tuple[int, int, int]] = {
    "desc unmapped": (1 << 50, AVAIL, USED),
    "avail unmapped": (DESC, 1 << 50, USED),
    "used unmapped": (DESC, AVAIL, 1 << 50),
    "desc is a guest address": (HIGH.guest_addr, AVAIL, USED),
    "desc unaligned": (DESC + 8, AVAIL, USED),
    "avail unaligned": (DESC, AVAIL + 1, USED),
    "used unaligned": (DESC, AVAIL, USED + 2),
    "desc leaves its region": (END - 16 * 127, AVAIL, USED),
    "avail leaves its region": (DESC, END - 4 - 2 * 127, USED),
    "used leaves its region": (DESC, AVAIL, END - 8 * 128),
    "desc wraps": (TOP - 16, AVAIL, USED),
    "avail wraps": (DESC, TOP - 2, USED),
    "used wraps": (DESC, AVAIL, TOP - 4),
    "used on avail": (DESC, AVAIL, AVAIL),
    "used in desc": (DESC, AVAIL, DESC + 16 * 128 - 4),
    "avail in desc": (DESC, DESC + 16 * 128 - 2, USED),
    "desc in used": (USED + 16, AVAIL, USED),
    "all the same": (DESC, DESC, DESC),
}


@pytest.mark.parametrize("addresses", ADDRESS_LIES.values(), ids=ADDRESS_LIES.keys())
def test_ring_addresses_that_lie_are_refused(addresses: tuple[int, int, int]) -> None:
    """H58, H59: at once, since memory and size are known, and a later start fails too."""
    talk = ready()
    talk.ack(Request.SET_VRING_NUM, vring_state(0, 128))
    before = talk.state

    assert talk.ack(Request.SET_VRING_ADDR, messages.vring_addr(0, *addresses)) == 1

    assert talk.state == before
    assert talk.kick(0) == 1
    assert talk.take() == []


@pytest.mark.parametrize("addresses", ADDRESS_LIES.values(), ids=ADDRESS_LIES.keys())
def test_lies_told_before_there_is_memory_come_out_at_the_start(
    addresses: tuple[int, int, int],
) -> None:
    talk = Conversation()
    talk.negotiate()
    talk.ack(Request.SET_VRING_NUM, vring_state(0, 128))
    talk.ack(Request.SET_VRING_ADDR, messages.vring_addr(0, *addresses))
    talk.add_memory(LOW, HIGH)
    talk.take()
    file = Watched()

    assert talk.ack(Request.SET_VRING_KICK, u64(0), [file.fd.take()]) == 1

    assert talk.take() == []
    assert file.closed


def test_parts_may_touch_each_other_and_the_ends_of_a_region() -> None:
    talk = ready()
    start = HIGH.frontend_addr
    used_size = 4 + 8 * 128
    assert talk.ack(Request.SET_VRING_NUM, vring_state(0, 128)) == 0
    payload = messages.vring_addr(0, start, start + 16 * 128, END - used_size)
    assert talk.ack(Request.SET_VRING_ADDR, payload) == 0

    assert talk.kick(0) == 0


def test_the_event_index_makes_parts_two_bytes_longer() -> None:
    talk = ready(SPLIT | VirtioFeature.RING_EVENT_IDX)
    talk.ack(Request.SET_VRING_NUM, vring_state(0, 128))
    payload = messages.vring_addr(0, DESC, AVAIL, END - 4 - 8 * 128)

    assert talk.ack(Request.SET_VRING_ADDR, payload) == 1


def test_ring_addresses_are_translated_to_the_guests() -> None:
    talk = ready()
    talk.set_up(1)
    talk.kick(1)

    assert started(talk).setup.addresses == guest(1)


def test_ring_addresses_are_the_guests_where_that_was_agreed_on() -> None:
    talk = Conversation()
    talk.negotiate(protocol_features=talk.offer.protocol_features)
    talk.add_memory(HIGH.but(frontend_addr=HIGH.guest_addr))
    talk.ack(Request.SET_VRING_NUM, vring_state(0, 128))
    there = guest(0)
    payload = messages.vring_addr(0, there.desc, there.avail, there.used)
    assert talk.ack(Request.SET_VRING_ADDR, payload) == 0
    talk.kick(0)

    assert started(talk).setup.addresses == there


def test_a_running_ring_stays_where_it_is() -> None:
    """H60."""
    talk = Conversation()
    talk.start()
    payload = messages.vring_addr(0, *ring_addresses(0, at=0x1000))

    assert talk.ack(Request.SET_VRING_ADDR, payload) == 1
    assert talk.ack(Request.SET_VRING_ADDR, messages.vring_addr(0, *ring_addresses(0))) == 0
    assert talk.ack(Request.SET_VRING_BASE, vring_state(0, 5)) == 1


# -- base ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [0, 1, 1000, 65535])
def test_a_split_ring_starts_at_its_base(base: int) -> None:
    """H61."""
    talk = ready()
    talk.set_up(0, base=base)
    talk.kick(0)

    assert started(talk).setup.position == RingPosition(next_avail=base)


@pytest.mark.parametrize("base", [65536, 0x8000_8000, 0xFFFF_FFFF])
def test_a_split_ring_has_no_wrap_bits(base: int) -> None:
    """H61."""
    talk = ready()

    assert talk.ack(Request.SET_VRING_BASE, vring_state(0, base)) == 1


@pytest.mark.parametrize(
    ("base", "position"),
    [
        (0x8000_8000, RingPosition(0, 0, 1, 1)),
        (0x0000_8000, RingPosition(0, 0, 1, 1)),
        (0x8005_0007, RingPosition(7, 5, 0, 1)),
        (0x0005_8007, RingPosition(7, 5, 1, 0)),
        (0x0000_8007, RingPosition(7, 7, 1, 1)),
        (0x0000_0007, RingPosition(7, 7, 0, 0)),
        (0x807F_807F, RingPosition(127, 127, 1, 1)),
    ],
)
def test_a_packed_ring_starts_at_index_and_wrap_of_both_sides(
    base: int, position: RingPosition
) -> None:
    """Spec, "Vring descriptor indices for packed virtqueues"; older front ends send 16 bits."""
    talk = ready(PACKED)
    talk.set_up(0, base=base)
    talk.kick(0)

    assert started(talk).setup.position == position


@pytest.mark.parametrize("base", [0x8000_8080, 0x8080_8000, 0x7FFF])
def test_a_packed_ring_has_no_index_beyond_its_size(base: int) -> None:
    """H61."""
    talk = ready(PACKED)
    talk.ack(Request.SET_VRING_NUM, vring_state(0, 128))

    assert talk.ack(Request.SET_VRING_BASE, vring_state(0, base)) == 1


@pytest.mark.parametrize(("features", "beginning"), [(SPLIT, 0), (PACKED, 0x8000_8000)])
def test_a_ring_without_a_base_starts_at_its_beginning(features: int, beginning: int) -> None:
    talk = ready(features)
    talk.set_up(0, base=None)

    assert talk.stop(0) == beginning
    talk.kick(0)
    assert started(talk).setup.position == position_of(beginning, 0, packed=features == PACKED)


@pytest.mark.parametrize(
    ("features", "position", "base"),
    [
        (SPLIT, RingPosition(next_avail=65535), 65535),
        (PACKED, RingPosition(7, 5, 1, 0), 0x0005_8007),
        (PACKED, RingPosition(0, 0, 1, 1), 0x8000_8000),
    ],
)
def test_a_stopped_ring_says_where_it_stands(
    features: int, position: RingPosition, base: int
) -> None:
    talk = Conversation(position=position)
    talk.start(features, rings=[0])

    assert talk.stop(0) == base
    assert talk.stop(0) == base, "asked twice, it stands where it stood"
    talk.take()
    assert talk.kick(0) == 0
    assert started(talk).setup.position == position


def test_a_stopped_ring_keeps_its_err_only() -> None:
    """QEMU sends SET_VRING_ERR once in the life of a connection, the others at each start."""
    talk = Conversation()
    talk.start(rings=[0])
    talk.ack(Request.SET_VRING_CALL, u64(0), [eventfd()])
    talk.ack(Request.SET_VRING_ERR, u64(0), [eventfd()])

    talk.stop(0)

    ring = talk.state.rings[0]
    assert (ring.kick, ring.call, ring.err) == (False, False, True)
