"""RULES against every message of the specification: shapes, descriptors, replies."""

from __future__ import annotations

import pytest
from vhostd.protocol import wire
from vhostd.protocol.features import ProtocolFeature, VirtioFeature, feature_names
from vhostd.protocol.framing import Framer, Message
from vhostd.protocol.replies import accept, refuse
from vhostd.protocol.requests import BACKEND_RULES, RULES, BackendRequest, Request

from tests.fakes import messages
from tests.fakes.messages import Flags
from tests.protocol.streams import encoded, feed, watched

REPLY_ACK = ProtocolFeature.REPLY_ACK

# The payload sizes of facts the specification states, request by request, in bytes.
SIZES: dict[str, set[int]] = {
    "nothing": {0},
    "u64": {8},
    "state": {8},
    "addr": {40},
    "table": {8 + 32 * count for count in range(1, 9)},
    "slot": {40},
    "log": {16},
    "iotlb": {32},
    "config": set(range(12, 12 + 256 + 1)),
    "inflight": set(range(20, 25)),
    "uuid": {16},
    "device state": {8},
}
SHAPES: dict[Request, str] = {
    Request.GET_FEATURES: "nothing",
    Request.SET_FEATURES: "u64",
    Request.SET_OWNER: "nothing",
    Request.RESET_OWNER: "nothing",
    Request.SET_MEM_TABLE: "table",
    Request.SET_LOG_BASE: "log",
    Request.SET_LOG_FD: "nothing",
    Request.SET_VRING_NUM: "state",
    Request.SET_VRING_ADDR: "addr",
    Request.SET_VRING_BASE: "state",
    Request.GET_VRING_BASE: "state",
    Request.SET_VRING_KICK: "u64",
    Request.SET_VRING_CALL: "u64",
    Request.SET_VRING_ERR: "u64",
    Request.GET_PROTOCOL_FEATURES: "nothing",
    Request.SET_PROTOCOL_FEATURES: "u64",
    Request.GET_QUEUE_NUM: "nothing",
    Request.SET_VRING_ENABLE: "state",
    Request.SEND_RARP: "u64",
    Request.NET_SET_MTU: "u64",
    Request.SET_BACKEND_REQ_FD: "nothing",
    Request.IOTLB_MSG: "iotlb",
    Request.SET_VRING_ENDIAN: "state",
    Request.GET_CONFIG: "config",
    Request.SET_CONFIG: "config",
    Request.CLOSE_CRYPTO_SESSION: "u64",
    Request.POSTCOPY_ADVISE: "nothing",
    Request.POSTCOPY_LISTEN: "nothing",
    Request.POSTCOPY_END: "nothing",
    Request.GET_INFLIGHT_FD: "inflight",
    Request.SET_INFLIGHT_FD: "inflight",
    Request.GPU_SET_SOCKET: "nothing",
    Request.RESET_DEVICE: "nothing",
    Request.VRING_KICK: "state",
    Request.GET_MAX_MEM_SLOTS: "nothing",
    Request.ADD_MEM_REG: "slot",
    Request.REM_MEM_REG: "slot",
    Request.SET_STATUS: "u64",
    Request.GET_STATUS: "nothing",
    Request.GET_SHARED_OBJECT: "uuid",
    Request.SET_DEVICE_STATE_FD: "device state",
    Request.CHECK_DEVICE_STATE: "nothing",
    Request.GET_SHMEM_CONFIG: "nothing",
}  # all but CREATE_CRYPTO_SESSION, whose size is the crypto device's affair
FIXED = sorted(SHAPES)

# Messages the specification always answers, and what says "no" to a waiting VMM.
REFUSALS: dict[Request, bytes] = {
    Request.GET_FEATURES: messages.u64(0),
    Request.SET_LOG_BASE: messages.u64(1),
    Request.GET_VRING_BASE: messages.vring_state(3, 0),
    Request.GET_PROTOCOL_FEATURES: messages.u64(0),
    Request.GET_QUEUE_NUM: messages.u64(0),
    Request.IOTLB_MSG: messages.u64(1),
    Request.GET_CONFIG: messages.config(3, b"", 0),
    Request.CREATE_CRYPTO_SESSION: b"\xff" * 8,
    Request.POSTCOPY_ADVISE: b"",
    Request.POSTCOPY_END: messages.u64(1),
    Request.GET_INFLIGHT_FD: bytes(20),
    Request.GET_MAX_MEM_SLOTS: messages.u64(0),
    Request.GET_STATUS: messages.u64(0),
    Request.GET_SHARED_OBJECT: b"",
    Request.SET_DEVICE_STATE_FD: messages.u64(0x101),
    Request.CHECK_DEVICE_STATE: messages.u64(1),
    Request.GET_SHMEM_CONFIG: bytes(2056),
}


def smallest_payload(request: Request) -> bytes:
    """A payload of the smallest legal size whose first number is 3."""
    size = RULES[request].shape.SIZES[0]
    return (b"\3" + bytes(size - 1)) if size else b""


def received(request: Request, payload: bytes, fd_count: int, flags: int = 1) -> Message:
    files = watched(fd_count)
    (message,) = feed(Framer(), encoded(request, payload, flags), [file.fd for file in files])
    if message.fault:
        assert all(file.closed for file in files), "descriptors of a faulty message stay open"
    message.close_fds()
    return message


def test_there_is_a_rule_for_every_message_of_the_specification() -> None:
    assert set(RULES) == set(Request)
    assert [int(request) for request in RULES] == list(range(1, 45))
    assert set(BACKEND_RULES) == set(BackendRequest)
    assert [int(request) for request in BACKEND_RULES] == list(range(1, 11))


@pytest.mark.parametrize("ours", [Request, BackendRequest], ids=["front end", "back end"])
def test_numbers_are_those_of_the_front_end_used_in_tests(
    ours: type[Request | BackendRequest],
) -> None:
    theirs = messages.Request if ours is Request else messages.BackendRequest
    assert {member.name: int(member) for member in ours} == {
        member.name: int(member) for member in theirs
    }


@pytest.mark.parametrize("request_", FIXED, ids=lambda request: request.name)
def test_payload_has_the_specified_sizes(request_: Request) -> None:
    assert set(RULES[request_].shape.SIZES) == SIZES[SHAPES[request_]]


@pytest.mark.parametrize("request_", FIXED, ids=lambda request: request.name)
def test_exact_shape_is_taken_and_its_neighbours_are_not(request_: Request) -> None:
    """H4, H5, H6."""
    rule = RULES[request_]
    sizes = rule.shape.SIZES
    good = received(request_, bytes(sizes[0]), rule.fds_min)
    assert good.fault is None
    for size in {sizes[0] - 1, sizes[-1] + 1, 0} - set(sizes) - {-1}:
        bad = received(request_, bytes(size), rule.fds_min)
        assert bad.fault == f"{request_.name}: payload of {size} bytes"


@pytest.mark.parametrize("request_", list(RULES), ids=lambda request: request.name)
def test_number_of_descriptors_is_checked(request_: Request) -> None:
    """H13, H14, H17."""
    rule = RULES[request_]
    payload = smallest_payload(request_)
    for count in (rule.fds_min, rule.fds_max):
        assert received(request_, payload, count).fault is None
    more = received(request_, payload, rule.fds_max + 1)
    assert (more.fault is None) == (rule.fds_max == 0)
    if rule.fds_min:
        assert received(request_, payload, rule.fds_min - 1).fault is not None


@pytest.mark.parametrize("request_", list(RULES), ids=lambda request: request.name)
@pytest.mark.parametrize("flags", [0x1, 0x9])
def test_refusal_has_the_shape_the_vmm_waits_for(request_: Request, flags: int) -> None:
    """QEMU stands still until a reply of its own has come."""
    message = received(request_, smallest_payload(request_), RULES[request_].fds_min, flags)

    reply = refuse(message, REPLY_ACK)

    if request_ in REFUSALS:
        expected: bytes | None = REFUSALS[request_]
    else:
        expected = messages.u64(1) if flags & Flags.NEED_REPLY else None
    if expected is None:
        assert reply is None
    else:
        assert reply is not None
        assert reply.data == messages.header(request_, 0x5, len(expected)) + expected
        assert reply.fds == ()


@pytest.mark.parametrize("request_", sorted(REFUSALS), ids=lambda request: request.name)
@pytest.mark.parametrize("size", [0, 1, 5, 13, 4096])
def test_even_a_malformed_request_is_answered_in_shape(request_: Request, size: int) -> None:
    reply = refuse(Message(request_, 0x1, bytes(size)), ProtocolFeature(0))

    assert reply is not None
    number, flags, stated = messages.unpack_header(reply.data[:12])
    assert (number, flags, stated) == (request_, 0x5, len(reply.data) - 12)


@pytest.mark.parametrize("request_", list(RULES), ids=lambda request: request.name)
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("acked", [ProtocolFeature(0), REPLY_ACK], ids=["", "reply-ack"])
def test_consent_is_said_only_where_it_is_due(
    request_: Request, asked: bool, acked: ProtocolFeature
) -> None:
    """H28: need_reply means nothing before REPLY_ACK."""
    message = Message(request_, 0x9 if asked else 0x1)

    reply = accept(message, acked, b"own reply")

    if request_ in REFUSALS and not (request_ == Request.SET_LOG_BASE and asked and acked):
        assert reply is not None
        assert reply.data[12:] == b"own reply"
    elif asked and acked:
        assert reply is not None
        assert reply.data[12:] == messages.u64(0)
    else:
        assert reply is None


def test_an_unknown_request_is_refused_when_asked_to() -> None:
    """H11."""
    reply = refuse(Message(45, 0x9, fault="no such message"), REPLY_ACK)

    assert reply is not None
    assert reply.data == messages.header(45, 0x5, 8) + messages.u64(1)
    assert refuse(Message(45, 0x1, fault="no such message"), REPLY_ACK) is None


def test_needed_features_are_those_of_the_specification() -> None:
    feature = ProtocolFeature
    expected = {
        Request.GET_QUEUE_NUM: feature.MQ,
        Request.SET_LOG_BASE: feature.LOG_SHMFD,
        Request.SEND_RARP: feature.RARP,
        Request.NET_SET_MTU: feature.MTU,
        Request.SET_BACKEND_REQ_FD: feature.BACKEND_REQ,
        Request.SET_VRING_ENDIAN: feature.CROSS_ENDIAN,
        Request.GET_CONFIG: feature.CONFIG,
        Request.SET_CONFIG: feature.CONFIG,
        Request.CREATE_CRYPTO_SESSION: feature.CRYPTO_SESSION,
        Request.CLOSE_CRYPTO_SESSION: feature.CRYPTO_SESSION,
        Request.POSTCOPY_ADVISE: feature.PAGEFAULT,
        Request.POSTCOPY_LISTEN: feature.PAGEFAULT,
        Request.POSTCOPY_END: feature.PAGEFAULT,
        Request.GET_INFLIGHT_FD: feature.INFLIGHT_SHMFD,
        Request.SET_INFLIGHT_FD: feature.INFLIGHT_SHMFD,
        Request.RESET_DEVICE: feature.RESET_DEVICE,
        Request.VRING_KICK: feature.INBAND_NOTIFICATIONS,
        Request.GET_MAX_MEM_SLOTS: feature.CONFIGURE_MEM_SLOTS,
        Request.ADD_MEM_REG: feature.CONFIGURE_MEM_SLOTS,
        Request.REM_MEM_REG: feature.CONFIGURE_MEM_SLOTS,
        Request.SET_STATUS: feature.STATUS,
        Request.GET_STATUS: feature.STATUS,
        Request.GET_SHARED_OBJECT: feature.SHARED_OBJECT,
        Request.SET_DEVICE_STATE_FD: feature.DEVICE_STATE,
        Request.CHECK_DEVICE_STATE: feature.DEVICE_STATE,
        Request.GET_SHMEM_CONFIG: feature.SHMEM_MAP,
    }
    assert {request: rule.needs for request, rule in RULES.items() if rule.needs} == expected


def test_feature_masks_are_those_of_the_front_end_used_in_tests() -> None:
    for ours, theirs in (
        (ProtocolFeature, messages.ProtocolFeature),
        (VirtioFeature, messages.VirtioFeature),
    ):
        known = {member.name: int(member) for member in ours}
        assert known.items() >= {member.name: int(member) for member in theirs}.items()


def test_features_are_named_lowest_first_and_unknown_ones_in_hex() -> None:
    features = ProtocolFeature.STATUS | ProtocolFeature.MQ | 1 << 63

    assert feature_names(features, ProtocolFeature) == ["MQ", "STATUS", "0x8000000000000000"]


def test_back_end_messages_have_the_sizes_seen_on_the_wire() -> None:
    assert BACKEND_RULES[BackendRequest.SHMEM_MAP].shape is wire.ShmemMapping
    assert list(wire.ShmemMapping.SIZES) == [40]
    assert list(BACKEND_RULES[BackendRequest.CONFIG_CHANGE_MSG].shape.SIZES) == [0]
