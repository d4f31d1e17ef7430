"""H21 to H33: features, ownership, status, config space."""

from __future__ import annotations

import pytest
from vhostd.errors import HostError
from vhostd.protocol.features import BACKEND_PROTOCOL_FEATURES, ProtocolFeature
from vhostd.protocol.requests import RULES, Request
from vhostd.session import actions
from vhostd.session.machine import HANDLERS, SessionMachine
from vhostd.session.plan import Offer
from vhostd.session.state import SessionState

from tests.fakes.messages import VirtioFeature, u64
from tests.protocol.streams import Watched
from tests.session.conversation import (
    CONFIG_SIZE,
    OFFERED,
    PACKED,
    QUEUES,
    SPLIT,
    WITHOUT_BIT_30,
    Conversation,
    eventfd,
    fatal,
)

ALL = BACKEND_PROTOCOL_FEATURES


def test_features_offered_are_the_devices_and_vhost_users() -> None:
    talk = Conversation()
    offered = talk.ask(Request.GET_FEATURES)

    assert offered == OFFERED | VirtioFeature.PROTOCOL_FEATURES | VirtioFeature.LOG_ALL


def test_protocol_features_offered_have_a_device_side() -> None:
    """A bit offered blindly is acknowledged blindly by QEMU and its messages then come."""
    talk = Conversation()
    offered = ProtocolFeature(talk.ask(Request.GET_PROTOCOL_FEATURES))

    assert offered == ALL
    for request, rule in RULES.items():
        if rule.needs and rule.needs in offered:
            assert request in HANDLERS, request.name


def test_a_device_may_offer_other_protocol_features() -> None:
    """pmem withholds CONFIGURE_MEM_SLOTS: QEMU 11.1 crashes on it with shared memory regions."""
    offer = Offer(OFFERED, 1, 16, ALL & ~ProtocolFeature.CONFIGURE_MEM_SLOTS)
    talk = Conversation(offer)

    assert talk.ask(Request.GET_PROTOCOL_FEATURES) == offer.protocol_features


def test_qemus_first_messages_are_served_before_ownership_and_features() -> None:
    """H21: QEMU sends all of these before SET_OWNER or SET_FEATURES."""
    talk = Conversation()
    talk.ask(Request.GET_FEATURES)
    talk.ask(Request.GET_PROTOCOL_FEATURES)
    talk.send(Request.SET_PROTOCOL_FEATURES, u64(ALL))
    assert talk.ask(Request.GET_QUEUE_NUM) == QUEUES
    assert talk.ask(Request.GET_MAX_MEM_SLOTS) == 509
    for index in range(QUEUES):
        assert talk.ack(Request.SET_VRING_CALL, u64(index), [eventfd()]) == 0
        assert talk.ack(Request.SET_VRING_ERR, u64(index), [eventfd()]) == 0


@pytest.mark.parametrize("request_", list(RULES), ids=lambda request: request.name)
def test_any_first_message_leaves_a_connection_that_works(request_: Request) -> None:
    """H21."""
    talk = Conversation()
    rule = RULES[request_]
    fds = [eventfd() for _ in range(rule.fds_min)]
    talk.send(request_, bytes(rule.shape.SIZES[0]), fds)

    fresh = Conversation()
    assert talk.ask(Request.GET_FEATURES) == fresh.ask(Request.GET_FEATURES)
    if request_ != Request.SET_OWNER:
        talk.negotiate()


@pytest.mark.parametrize("bit", range(64))
def test_features_not_offered_are_refused(bit: int) -> None:
    """H22."""
    talk = Conversation()
    talk.send(Request.SET_PROTOCOL_FEATURES, u64(ALL))
    offered = talk.ask(Request.GET_FEATURES)
    before = talk.state

    verdict = talk.ack(Request.SET_FEATURES, u64(SPLIT | 1 << bit))

    assert (verdict == 0) == bool(offered >> bit & 1)
    assert talk.state.features_settled == (verdict == 0)
    assert verdict == 0 or talk.state == before


@pytest.mark.parametrize("bit", range(64))
def test_protocol_features_not_offered_are_refused(bit: int) -> None:
    """H24."""
    talk = Conversation()
    before = talk.state
    if 1 << bit & (ALL | ProtocolFeature.INBAND_NOTIFICATIONS):
        return

    talk.send(Request.SET_PROTOCOL_FEATURES, u64(ALL | 1 << bit))

    assert talk.state == before
    assert talk.take() == []


def test_protocol_features_do_not_change_while_rings_run() -> None:
    """H25: acknowledgements and the meaning of addresses may not change under a ring."""
    talk = Conversation()
    talk.start()
    acked = talk.state.protocol_features

    assert talk.ack(Request.SET_PROTOCOL_FEATURES, u64(acked)) == 0
    assert talk.ack(Request.SET_PROTOCOL_FEATURES, u64(acked | ProtocolFeature.GPA_ADDRESSES))
    assert talk.ack(Request.SET_PROTOCOL_FEATURES, u64(acked & ~int(ProtocolFeature.MQ)))
    assert talk.state.protocol_features == acked


def test_protocol_features_can_be_corrected_before_a_ring_starts() -> None:
    talk = Conversation()
    talk.send(Request.SET_FEATURES, u64(SPLIT))
    talk.send(Request.SET_PROTOCOL_FEATURES, u64(0))

    talk.negotiate(protocol_features=ALL)

    assert talk.state.protocol_features == ALL


@pytest.mark.parametrize("others", [0, ProtocolFeature.REPLY_ACK, ProtocolFeature.BACKEND_REQ])
def test_inband_notifications_without_their_channel_end_the_connection(others: int) -> None:
    """H26."""
    payload = u64(ProtocolFeature.INBAND_NOTIFICATIONS | others)

    assert fatal(Conversation(), Request.SET_PROTOCOL_FEATURES, payload)


@pytest.mark.parametrize(
    "request_", [r for r, rule in RULES.items() if rule.needs], ids=lambda request: request.name
)
def test_messages_need_their_protocol_feature(request_: Request) -> None:
    """H27."""
    talk = Conversation()
    talk.negotiate(protocol_features=ProtocolFeature.REPLY_ACK)
    before, rule = talk.state, RULES[request_]
    talk.take()
    fds = [eventfd() for _ in range(rule.fds_min)]

    answer = talk.send(request_, bytes(rule.shape.SIZES[0]), fds, 0x9)

    expected = rule.reply.refusal(bytes(rule.shape.SIZES[0])) if rule.reply else u64(1)
    assert answer == expected
    assert talk.state == before
    assert talk.take() == []


@pytest.mark.parametrize(
    "request_", sorted(set(RULES) - set(HANDLERS)), ids=lambda request: request.name
)
def test_messages_without_a_device_side_are_refused_even_when_negotiated(
    request_: Request,
) -> None:
    every = ProtocolFeature(0)
    for rule in RULES.values():
        every |= rule.needs
    offer = Offer(OFFERED, QUEUES, CONFIG_SIZE, every | ProtocolFeature.REPLY_ACK)
    talk = Conversation(offer)
    talk.send(Request.SET_PROTOCOL_FEATURES, u64(offer.protocol_features))
    rule = RULES[request_]
    payload = bytes(rule.shape.SIZES[0])

    answer = talk.send(request_, payload, [eventfd() for _ in range(rule.fds_min)], 0x9)

    assert answer == (rule.reply.refusal(payload) if rule.reply else u64(1))


def test_need_reply_means_nothing_before_reply_ack() -> None:
    """H28."""
    talk = Conversation()
    talk.send(Request.SET_PROTOCOL_FEATURES, u64(ProtocolFeature.MQ))

    assert talk.send(Request.SET_OWNER, flags=0x9) is None
    assert talk.send(Request.SET_OWNER, flags=0x9) is None


def test_the_message_that_brings_reply_ack_is_acknowledged_itself_where_it_asks() -> None:
    """virtio_uml and rust-vmm wait for it; QEMU does not ask."""
    talk = Conversation()
    assert talk.send(Request.SET_PROTOCOL_FEATURES, u64(ALL), flags=0x9) == u64(0)
    assert talk.send(Request.SET_OWNER, flags=0x9) == u64(0)

    assert Conversation().send(Request.SET_PROTOCOL_FEATURES, u64(ALL)) is None


def test_and_so_is_its_refusal() -> None:
    talk = Conversation()
    unoffered = u64(ProtocolFeature.REPLY_ACK | ProtocolFeature.CROSS_ENDIAN)

    assert talk.send(Request.SET_PROTOCOL_FEATURES, unoffered, flags=0x9) == u64(1)
    assert talk.send(Request.SET_OWNER, flags=0x9) is None


def test_protocol_features_tell_the_worker_what_it_may_answer() -> None:
    talk = Conversation()
    talk.send(Request.SET_PROTOCOL_FEATURES, u64(ProtocolFeature.CONFIG))

    assert talk.take() == [actions.ConfigureConfigSpace(hot=True, reply_ack=False)]


def test_every_backend_channel_is_handed_on() -> None:
    """H29: the shell replaces the one it has."""
    talk = Conversation()
    talk.negotiate()
    talk.take()
    for _ in range(2):
        assert talk.ack(Request.SET_BACKEND_REQ_FD, b"", [eventfd()]) == 0

    first, second = talk.take()
    assert isinstance(first, actions.SetBackendChannel)
    assert isinstance(second, actions.SetBackendChannel)
    assert second.reply_ack
    assert first.file is not second.file


def test_a_second_owner_is_refused() -> None:
    """H33."""
    talk = Conversation()
    talk.negotiate()

    assert talk.ack(Request.SET_OWNER) == 1
    assert talk.ack(Request.RESET_OWNER) == 0
    assert talk.ack(Request.SET_OWNER) == 0


@pytest.mark.parametrize("status", [0, 1, 8, 0xF, 0x80, 0xFF])
def test_status_is_remembered_and_changes_nothing_else(status: int) -> None:
    """H30: QEMU's generic device never sends DRIVER_OK or 0, so neither may matter."""
    talk = Conversation()
    talk.start()
    rings = talk.state.rings
    talk.take()

    assert talk.ack(Request.SET_STATUS, u64(status)) == 0
    assert talk.ask(Request.GET_STATUS) == status
    assert talk.state.rings == rings
    assert talk.take() == []


@pytest.mark.parametrize("status", [0x100, 1 << 32, (1 << 64) - 1])
def test_status_beyond_a_byte_is_refused(status: int) -> None:
    """H30."""
    talk = Conversation()
    talk.negotiate()
    talk.ack(Request.SET_STATUS, u64(8))

    assert talk.ack(Request.SET_STATUS, u64(status)) == 1
    assert talk.ask(Request.GET_STATUS) == 8


@pytest.mark.parametrize("features", [PACKED, SPLIT | 2, 0])
def test_virtio_features_do_not_change_while_rings_run(features: int) -> None:
    talk = Conversation()
    talk.start()

    assert talk.ack(Request.SET_FEATURES, u64(features)) == 1
    assert talk.state.features == SPLIT


def test_dirty_logging_is_turned_on_and_off_while_rings_run() -> None:
    """Migration does this; the device's features are the same before and after."""
    talk = Conversation()
    talk.start()
    talk.take()

    assert talk.ack(Request.SET_FEATURES, u64(SPLIT | VirtioFeature.LOG_ALL)) == 0
    assert talk.ack(Request.SET_FEATURES, u64(SPLIT | VirtioFeature.LOG_ALL)) == 0
    assert talk.ack(Request.SET_FEATURES, u64(SPLIT)) == 0

    assert talk.take() == [actions.SetLogging(True), actions.SetLogging(False)]


def test_giving_up_protocol_features_enables_all_rings() -> None:
    """H23."""
    talk = Conversation()
    talk.start(rings=[0, 1])
    talk.enable(1, False)
    talk.take()

    assert talk.ack(Request.SET_FEATURES, u64(WITHOUT_BIT_30)) == 0

    assert all(ring.enabled for ring in talk.state.rings)
    assert talk.take() == [actions.EnableRing(1, True), actions.DeviceStarted()]
    assert talk.enable(1, False) == 1


def test_taking_protocol_features_up_again_disables_what_does_not_run() -> None:
    """Spec, "Ring states": with bit 30 a ring begins disabled; one that runs goes on."""
    talk = Conversation()
    talk.start(rings=[1])
    talk.ack(Request.SET_FEATURES, u64(WITHOUT_BIT_30))
    talk.take()

    assert talk.ack(Request.SET_FEATURES, u64(SPLIT)) == 0

    assert [ring.enabled for ring in talk.state.rings] == [False, True, False]
    assert talk.take() == []


def test_each_start_settles_the_features_for_the_device() -> None:
    talk = Conversation()
    talk.negotiate(PACKED)

    assert actions.FeaturesSettled(PACKED) in talk.take()


@pytest.mark.parametrize("packed", [False, True])
def test_reset_stops_everything_and_keeps_memory_and_negotiation(packed: bool) -> None:
    """H31."""
    talk = Conversation()
    talk.start(PACKED if packed else SPLIT, rings=[0, 2])
    for index in range(QUEUES):
        talk.ack(Request.SET_VRING_CALL, u64(index), [eventfd()])
        talk.ack(Request.SET_VRING_ERR, u64(index), [eventfd()])
    held = [(False, False, True), (False, True, True), (False, False, True)]
    before = talk.state
    talk.take()

    assert talk.ack(Request.RESET_DEVICE) == 0

    assert talk.take() == [
        actions.DeviceStopped(),
        actions.StopRing(0),
        actions.StopRing(2),
        actions.DriverReset(),
    ]
    assert talk.state.regions == before.regions
    assert talk.state.features == before.features
    assert not any(ring.started or ring.enabled for ring in talk.state.rings)
    assert [(ring.kick, ring.call, ring.err) for ring in talk.state.rings] == held
    assert talk.stop(0) == (0x8000_8000 if packed else 0)
    assert talk.kick(0) == 1, "a ring needs a new set-up after a reset"
    talk.set_up(0, base=None)
    assert talk.kick(0) == 0


def test_a_refused_action_leaves_no_trace() -> None:
    talk = Conversation()
    talk.negotiate()
    before = talk.state
    talk.refuse_next = HostError("out of memory")

    assert talk.ack(Request.SET_BACKEND_REQ_FD, b"", [eventfd()]) == 1
    assert talk.state == before


def test_descriptor_of_a_refused_message_is_closed_at_once() -> None:
    talk = Conversation()
    file = Watched()

    talk.send(Request.SET_BACKEND_REQ_FD, b"", [file.fd.take()])

    assert file.closed


def test_a_machine_goes_on_from_a_predecessors_state() -> None:
    talk = Conversation()
    talk.start()
    successor = SessionMachine(talk.offer, talk.state)

    assert successor.state == talk.state
    assert successor.close()[0] == actions.DeviceStopped()


def test_a_state_of_another_device_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        SessionMachine(Offer(OFFERED, 2, 16), SessionState.initial(3))


def test_closing_stops_exactly_the_rings_that_run() -> None:
    talk = Conversation()
    assert talk.machine.close() == ()
    talk.start(rings=[1])

    assert talk.machine.close() == (actions.DeviceStopped(), actions.StopRing(1))
