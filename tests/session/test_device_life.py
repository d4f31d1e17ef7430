"""When back-end requests are allowed."""

from __future__ import annotations

from vhostd.protocol.requests import Request
from vhostd.session.actions import DeviceStarted, DeviceStopped, EnableRing, StopRing

from tests.fakes.messages import u64
from tests.session.conversation import (
    QUEUES,
    WITHOUT_BIT_30,
    Conversation,
    eventfd,
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
