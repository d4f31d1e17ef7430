"""H17 to H19 and H62 to H65: a ring's descriptors, starting, stopping and enabling it."""

from __future__ import annotations

import pytest
from vhostd.errors import FrontendError
from vhostd.protocol.requests import Request
from vhostd.session import actions

from tests.fakes import messages
from tests.fakes.messages import VRING_NO_FD, VirtioFeature, u64, vring_state
from tests.protocol.streams import Watched, watched
from tests.session.conversation import (
    HIGH,
    LOW,
    QUEUES,
    SPLIT,
    WITHOUT_BIT_30,
    Conversation,
    eventfd,
    ring_addresses,
)

FILES = [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR]


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


# -- descriptors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", FILES, ids=lambda request: request.name)
def test_descriptor_and_flag_must_agree(request_: Request) -> None:
    """H17."""
    talk = ready()
    talk.set_up(0)
    before, file = talk.state, Watched()

    assert talk.ack(request_, u64(0)) == 1
    assert talk.ack(request_, u64(VRING_NO_FD), [file.fd.take()]) == 1

    assert file.closed
    assert talk.state == before


def test_polling_instead_of_kicks_is_refused() -> None:
    talk = ready()
    talk.set_up(0)

    assert talk.ack(Request.SET_VRING_KICK, u64(VRING_NO_FD)) == 1


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (Request.SET_VRING_CALL, actions.SetRingCall),
        (Request.SET_VRING_ERR, actions.SetRingErr),
    ],
)
def test_call_and_err_come_and_go_at_any_time(
    request_: Request, kind: type[actions.SetRingCall | actions.SetRingErr]
) -> None:
    talk = Conversation()
    talk.start(rings=[0])
    talk.take()
    for index in (0, 1):
        assert talk.ack(request_, u64(index), [eventfd()]) == 0
        assert talk.ack(request_, u64(index | VRING_NO_FD)) == 0

    performed = talk.take()
    assert [type(action) for action in performed] == [kind] * 4
    assert [getattr(action, "file", None) is None for action in performed] == [False, True] * 2


def test_a_second_kick_restarts_the_ring_where_it_stands() -> None:
    """H62."""
    talk = Conversation()
    talk.start(rings=[0])
    before = talk.state
    talk.take()

    assert talk.kick(0) == 0

    (restart,) = talk.take()
    assert isinstance(restart, actions.RestartRing)
    assert restart.kick is not None
    assert restart.setup.enabled
    assert talk.state == before


@pytest.mark.parametrize("request_", FILES, ids=lambda request: request.name)
def test_a_descriptor_the_shell_refuses_changes_nothing(request_: Request) -> None:
    """H18, H19, H63: what is no eventfd is told by the descriptor alone."""
    talk = ready()
    talk.set_up(0)
    before, file = talk.state, Watched()
    talk.refuse_next = FrontendError("no eventfd")

    assert talk.ack(request_, u64(0), [file.fd.take()]) == 1

    assert talk.state == before
    assert file.closed


@pytest.mark.parametrize("missing", ["size", "addresses", "memory", "features"])
def test_a_ring_starts_only_when_everything_is_known(missing: str) -> None:
    talk = Conversation()
    talk.send(Request.SET_PROTOCOL_FEATURES, u64(talk.offer.protocol_features & ~(1 << 21)))
    if missing != "features":
        talk.ack(Request.SET_FEATURES, u64(SPLIT))
    if missing != "memory":
        talk.add_memory(HIGH)
    if missing != "size":
        talk.ack(Request.SET_VRING_NUM, vring_state(0, 128))
    if missing != "addresses":
        talk.ack(Request.SET_VRING_ADDR, messages.vring_addr(0, *ring_addresses(0)))

    assert talk.kick(0) == 1
    assert not talk.state.running


def test_descriptors_of_many_refusals_are_all_closed() -> None:
    talk = ready()
    files = watched(200)

    for file in files:
        talk.ack(Request.SET_VRING_KICK, u64(0), [file.fd.take()])

    assert all(file.closed for file in files)


# -- enabling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [2, 0xFFFF_FFFF])
def test_enabling_knows_yes_and_no(num: int) -> None:
    """H65."""
    talk = Conversation()
    talk.start(rings=[0])

    assert talk.ack(Request.SET_VRING_ENABLE, vring_state(0, num)) == 1
    assert talk.state.rings[0].enabled


def test_a_ring_that_is_not_set_up_can_be_enabled() -> None:
    """H65: QEMU enables all queues of the device, also those the driver left alone."""
    talk = ready()

    assert talk.enable(2) == 0
    assert talk.take() == []
    talk.set_up(2)
    assert talk.kick(2) == 0
    assert started(talk).setup.enabled


def test_saying_the_same_again_does_nothing() -> None:
    """H65: a flood of them costs nothing."""
    talk = Conversation()
    talk.start(rings=[0])
    talk.take()
    for _ in range(1000):
        assert talk.enable(0) == 0

    assert talk.take() == []


def test_without_protocol_features_rings_are_served_from_their_kick_on() -> None:
    """H23."""
    talk = ready(WITHOUT_BIT_30)
    talk.set_up(0)
    talk.take()

    assert talk.kick(0) == 0

    start, *served = talk.take()
    assert isinstance(start, actions.StartRing)
    assert served == [
        actions.DriverReset(),
        actions.EnableRing(0, True),
        actions.DeviceStarted(),
    ]
    assert talk.enable(0, False) == 1


def test_features_in_force_reach_the_ring() -> None:
    features = SPLIT | VirtioFeature.RING_EVENT_IDX | VirtioFeature.RING_INDIRECT_DESC
    talk = ready(features)
    talk.set_up(QUEUES - 1)
    talk.kick(QUEUES - 1)

    assert started(talk).setup.features == features
