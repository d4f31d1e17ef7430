"""When back-end requests are allowed, and how a guest's reset is told from stop and continue."""

from __future__ import annotations

import pytest
from vhostd.protocol.requests import Request
from vhostd.session import actions
from vhostd.session.actions import DeviceStarted, DeviceStopped, EnableRing, RingPosition, StopRing

from tests.fakes import messages
from tests.fakes.messages import VirtioFeature, u64, vring_state
from tests.session.conversation import (
    PACKED,
    QUEUES,
    SPLIT,
    WITHOUT_BIT_30,
    Conversation,
    eventfd,
    ring_addresses,
)


def gate(talk: Conversation) -> list[str]:
    """Openings and closings since the last look."""
    names = {DeviceStarted: "started", DeviceStopped: "stopped"}
    return [names[type(action)] for action in talk.take() if type(action) in names]


def running() -> Conversation:
    talk = Conversation()
    talk.start()
    talk.take()
    return talk


def test_requests_are_allowed_from_the_first_live_ring_on() -> None:
    talk = Conversation()
    talk.start(rings=[])
    for index in range(QUEUES):
        talk.set_up(index)
        talk.kick(index)
    assert gate(talk) == []

    for index in range(QUEUES):
        talk.enable(index)

    assert gate(talk) == ["started"]


def test_the_gate_closes_before_anything_is_stopped() -> None:
    """QEMU 11.1 crashes on a back-end request that arrives when it has stopped the device."""
    talk = running()

    talk.enable(0, False)

    assert talk.take() == [DeviceStopped(), EnableRing(0, False)]


def test_disabling_a_ring_that_never_started_closes_the_gate_too() -> None:
    """QEMU disables queue by queue, those the driver left alone included."""
    talk = Conversation()
    talk.start(rings=[1])
    talk.enable(0)
    talk.take()

    talk.enable(0, False)

    assert talk.take() == [DeviceStopped()]


def test_stopping_a_live_ring_closes_the_gate_first() -> None:
    talk = running()

    talk.stop(1)

    assert talk.take() == [DeviceStopped(), StopRing(1)]


def test_qemus_whole_stop_closes_the_gate_once() -> None:
    talk = running()
    for index in range(QUEUES):
        talk.enable(index, False)
    for index in range(QUEUES):
        talk.stop(index)

    assert gate(talk) == ["stopped"]
    assert not talk.state.running


def test_stop_and_continue_open_it_again() -> None:
    talk = running()
    for index in range(QUEUES):
        talk.enable(index, False)
        talk.stop(index)
    for index in range(QUEUES):
        talk.set_up(index, base=None)
        talk.kick(index)
    gate(talk)
    talk.enable(0)

    assert gate(talk) == ["started"]


def test_one_ring_restarted_alone_opens_it_again() -> None:
    talk = running()
    talk.stop(1)
    gate(talk)

    talk.kick(1)

    assert gate(talk) == ["started"]


def test_state_says_whether_the_gate_is_open() -> None:
    talk = running()
    assert talk.state.device_started
    talk.enable(0, False)
    assert not talk.state.device_started


def test_a_gate_that_could_not_open_stays_shut() -> None:
    """No ring is live, whatever else is said."""
    talk = Conversation()
    talk.start(rings=[])
    for index in range(QUEUES):
        talk.enable(index)
    talk.ack(Request.SET_FEATURES, u64(WITHOUT_BIT_30))
    talk.ack(Request.SET_VRING_CALL, u64(0), [eventfd()])

    assert gate(talk) == []


# -- reset -----------------------------------------------------------------------------------------

AT_WORK = {SPLIT: RingPosition(next_avail=9), PACKED: RingPosition(9, 9, 1, 1)}
BEGINNING = {SPLIT: 0, PACKED: 0x8000_8000}


def restart(talk: Conversation, bases: list[int], at: int = 0) -> list[bool]:
    """Stop as QEMU does, start with these bases, and return every ring's verdict."""
    for index in range(QUEUES):
        talk.enable(index, False)
    for index in range(QUEUES):
        talk.stop(index)
    talk.take()
    for index, base in enumerate(bases):
        talk.set_up(index, base=base, at=at)
        assert talk.kick(index) == 0
    starts = [action for action in talk.take() if isinstance(action, actions.StartRing)]
    for index in range(QUEUES):
        talk.enable(index)
    return [start.evidence.fresh_driver for start in starts]


@pytest.mark.parametrize("features", [SPLIT, PACKED])
def test_a_reboot_looks_fresh(features: int) -> None:
    """New rings at the old place: a Linux guest often gets the same pages again."""
    talk = Conversation(position=AT_WORK[features])
    talk.start(features)

    assert restart(talk, [BEGINNING[features]] * QUEUES) == [True] * QUEUES


@pytest.mark.parametrize("features", [SPLIT, PACKED])
def test_stop_and_continue_do_not_look_fresh(features: int) -> None:
    talk = Conversation(position=AT_WORK[features])
    talk.start(features)
    base = 9 if features == SPLIT else 0x8009_8009

    assert restart(talk, [base] * QUEUES) == [False] * QUEUES


@pytest.mark.parametrize("features", [SPLIT, PACKED])
def test_unused_rings_that_continue_do_not_look_fresh(features: int) -> None:
    unused = RingPosition() if features == SPLIT else RingPosition(0, 0, 1, 1)
    talk = Conversation(position=unused)
    talk.start(features)

    assert restart(talk, [BEGINNING[features]] * QUEUES) == [False] * QUEUES


def test_unused_rings_elsewhere_look_fresh() -> None:
    talk = Conversation()
    talk.start()

    assert restart(talk, [0] * QUEUES, at=0x1000) == [True] * QUEUES


def test_one_reset_is_told_once() -> None:
    """After the reboot the rings are unused again: stop and continue then proves nothing."""
    talk = Conversation(position=AT_WORK[SPLIT])
    talk.start()
    restart(talk, [0] * QUEUES)
    talk.position = RingPosition()

    assert restart(talk, [0] * QUEUES) == [False] * QUEUES


def test_a_packed_ring_back_at_index_0_has_not_begun_anew() -> None:
    """Its wrap counter tells: an odd number of rounds leaves it at 0."""
    talk = Conversation(position=RingPosition(0, 0, 0, 0))
    talk.start(PACKED)

    assert restart(talk, [0] * QUEUES) == [False] * QUEUES


def test_a_packed_ring_that_stood_at_index_0_of_another_round_had_moved() -> None:
    talk = Conversation(position=RingPosition(0, 0, 0, 0))
    talk.start(PACKED)

    assert restart(talk, [BEGINNING[PACKED]] * QUEUES) == [True] * QUEUES


def test_a_ring_reset_alone_is_no_fresh_driver() -> None:
    """VIRTIO_F_RING_RESET: the others go on, so what the driver knows is still true."""
    talk = Conversation(position=AT_WORK[SPLIT])
    talk.start()
    talk.stop(1)
    talk.take()
    talk.set_up(1, base=0)
    talk.kick(1)

    (start,) = [action for action in talk.take() if isinstance(action, actions.StartRing)]
    assert start.evidence.others_live
    assert not start.evidence.fresh_driver


def test_the_first_start_is_a_fresh_driver() -> None:
    talk = Conversation()
    talk.start()
    starts = [action for action in talk.take() if isinstance(action, actions.StartRing)]

    assert [start.evidence.fresh_driver for start in starts] == [True] * QUEUES


def test_a_driver_taken_over_in_the_middle_is_not_fresh() -> None:
    """A migrated guest's rings start where the other host left them."""
    talk = Conversation()
    talk.start(rings=[])
    talk.set_up(0, base=500)
    talk.kick(0)

    (start,) = [action for action in talk.take() if isinstance(action, actions.StartRing)]
    assert not start.evidence.fresh_driver


def test_a_used_log_does_not_count_as_another_place() -> None:
    talk = Conversation()
    talk.start(SPLIT | VirtioFeature.LOG_ALL, rings=[0])
    payload = messages.vring_addr(0, *ring_addresses(0), 1, 0x1000)
    assert talk.ack(Request.SET_VRING_ADDR, payload) == 0
    talk.stop(0)
    talk.take()
    talk.ack(Request.SET_VRING_BASE, vring_state(0, 0))
    talk.kick(0)

    (start,) = [action for action in talk.take() if isinstance(action, actions.StartRing)]
    assert start.setup.log_used
    assert not start.evidence.addresses_changed
