"""How a new driver is told from one that was stopped and continued: QEMU sends no reset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
from vhostd.session import actions
from vhostd.session.actions import RingPosition

from tests.fakes import messages
from tests.fakes.messages import Request, VirtioFeature, vring_state
from tests.session.conversation import PACKED, QUEUES, SPLIT, Conversation, ring_addresses

AT_WORK = {SPLIT: RingPosition(next_avail=9), PACKED: RingPosition(9, 9, 1, 1)}
AT_WORK_BASE = {SPLIT: 9, PACKED: 0x8009_8009}
BEGINNING = {SPLIT: RingPosition(), PACKED: RingPosition(0, 0, 1, 1)}
BEGINNING_BASE = {SPLIT: 0, PACKED: 0x8000_8000}

both = pytest.mark.parametrize("features", [SPLIT, PACKED], ids=["split", "packed"])


def stop(talk: Conversation) -> None:
    """As QEMU does."""
    for index in range(QUEUES):
        talk.enable(index, False)
    for index in range(QUEUES):
        talk.stop(index)
    talk.take()


def start(talk: Conversation, bases: Sequence[int], at: int = 0) -> int:
    """As QEMU does; returns how often the device was told of a new driver."""
    for index, base in enumerate(bases):
        talk.set_up(index, base=base, at=at)
        assert talk.kick(index) == 0
    for index in range(len(bases)):
        talk.enable(index)
    return told(talk)


def told(talk: Conversation) -> int:
    """How often a driver's reset was performed, always before the first ring was served."""
    performed = talk.take()
    resets = [at for at, action in enumerate(performed) if action == actions.DriverReset()]
    enables = [at for at, done in enumerate(performed) if isinstance(done, actions.EnableRing)]
    assert all(reset < enables[0] for reset in resets)
    return len(resets)


def running(features: int, position: RingPosition, *, taken: bool = True) -> Conversation:
    """A guest at work; its rings will stop there."""
    talk = Conversation(position=position, taken=taken)
    talk.start(features)
    assert told(talk) == 1, "the first driver of a connection is a new one"
    return talk


@both
def test_a_reboot_is_a_new_driver(features: int) -> None:
    """New rings at the old place: a Linux guest often gets the same pages again."""
    talk = running(features, AT_WORK[features])
    stop(talk)

    assert start(talk, [BEGINNING_BASE[features]] * QUEUES) == 1


@both
def test_stop_and_continue_are_none(features: int) -> None:
    talk = running(features, AT_WORK[features])
    stop(talk)

    assert start(talk, [AT_WORK_BASE[features]] * QUEUES) == 0


@both
def test_unused_rings_that_continue_are_none(features: int) -> None:
    talk = running(features, BEGINNING[features], taken=False)
    stop(talk)

    assert start(talk, [BEGINNING_BASE[features]] * QUEUES) == 0


@both
def test_a_reboot_is_seen_where_every_ring_is_back_at_its_beginning(features: int) -> None:
    """A packed ring after two rounds, a split one after 65536 chains."""
    talk = running(features, BEGINNING[features])
    stop(talk)

    assert start(talk, [BEGINNING_BASE[features]] * QUEUES) == 1


@both
def test_a_ring_back_at_its_beginning_says_nothing_beside_one_that_goes_on(features: int) -> None:
    talk = running(features, BEGINNING[features])
    stop(talk)

    bases = [BEGINNING_BASE[features]] * (QUEUES - 1) + [AT_WORK_BASE[features]]
    assert start(talk, bases) == 0


@both
def test_chains_are_remembered_over_a_stop_in_which_none_was_taken(features: int) -> None:
    talk = running(features, BEGINNING[features])
    for index in range(QUEUES):
        talk.enable(index, False)
    talk.stop(0)
    talk.take()
    talk.kick(0)
    talk.taken = False
    stop(talk)

    assert start(talk, [BEGINNING_BASE[features]] * QUEUES) == 1


def test_rings_elsewhere_are_a_new_driver() -> None:
    talk = running(SPLIT, RingPosition(), taken=False)
    stop(talk)

    assert start(talk, [0] * QUEUES, at=0x1000) == 1


@both
def test_one_reboot_is_told_once(features: int) -> None:
    """After it the rings are unused again: stop and continue then proves nothing."""
    talk = running(features, AT_WORK[features])
    stop(talk)
    start(talk, [BEGINNING_BASE[features]] * QUEUES)
    talk.position, talk.taken = BEGINNING[features], False
    stop(talk)

    assert start(talk, [BEGINNING_BASE[features]] * QUEUES) == 0


def test_a_packed_ring_at_index_0_of_another_round_goes_on() -> None:
    talk = running(PACKED, RingPosition(0, 0, 0, 0))
    stop(talk)

    assert start(talk, [0] * QUEUES) == 0


def test_a_ring_reset_alone_is_no_new_driver() -> None:
    """VIRTIO_F_RING_RESET: the others go on, so what the driver knows is still true."""
    talk = running(SPLIT, AT_WORK[SPLIT])
    talk.stop(1)
    talk.take()
    talk.set_up(1, base=0)
    talk.kick(1)

    assert told(talk) == 0


def test_a_ring_reset_alone_while_the_device_stops_is_none() -> None:
    talk = running(SPLIT, AT_WORK[SPLIT])
    talk.enable(0, False)
    talk.stop(1)
    talk.take()
    talk.set_up(1, base=0)
    talk.kick(1)
    talk.enable(0)

    assert told(talk) == 0


def test_a_driver_that_comes_from_another_host_is_none() -> None:
    """A migrated guest's rings start where the other host left them."""
    talk = Conversation()
    talk.start(rings=[])
    talk.take()

    assert start(talk, [500]) == 0


def test_one_that_came_from_another_host_and_took_nothing_here_reboots() -> None:
    talk = Conversation(position=RingPosition(next_avail=500), taken=False)
    talk.start(rings=[])
    start(talk, [500])
    talk.enable(0, False)
    talk.stop(0)
    talk.take()

    assert start(talk, [0]) == 1


def test_a_log_is_not_another_place() -> None:
    talk = Conversation(taken=False)
    talk.start(SPLIT | VirtioFeature.LOG_ALL, rings=[0])
    payload = messages.vring_addr(0, *ring_addresses(0), 1, 0x1000)
    assert talk.ack(Request.SET_VRING_ADDR, payload) == 0
    talk.stop(0)
    talk.take()
    talk.ack(Request.SET_VRING_BASE, vring_state(0, 0))
    talk.kick(0)

    assert told(talk) == 0


@both
@pytest.mark.parametrize("reboot", [True, False], ids=["reboot", "stop and continue"])
def test_a_successor_between_any_two_messages_comes_to_the_same_verdict(
    features: int, reboot: bool
) -> None:
    bases = BEGINNING_BASE if reboot else AT_WORK_BASE
    for death in range(4 * QUEUES + 1):
        talk = running(features, AT_WORK[features])
        for at, say in enumerate(_restart(talk, bases[features])):
            if at == death:
                talk.succeed()
            say()
        resets = [action for action in talk.take() if action == actions.DriverReset()]
        assert len(resets) == reboot, f"died before message {death}"


def _restart(talk: Conversation, base: int) -> Iterator[Callable[[], object]]:
    """What QEMU says; where the rings are is told together with the kick."""
    for index in range(QUEUES):
        yield partial(talk.enable, index, False)
    for index in range(QUEUES):
        yield partial(talk.stop, index)
    for index in range(QUEUES):
        talk.set_up(index, base=base)
        yield partial(talk.kick, index)
    for index in range(QUEUES):
        yield partial(talk.enable, index)
