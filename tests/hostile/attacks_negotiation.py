"""H22 to H33: features, ownership and status, out of order and out of range."""

from __future__ import annotations

import contextlib
import random
import select
import socket
from collections.abc import Iterator
from functools import partial

from tests.fakes import messages
from tests.fakes.balloon import BalloonDriver, BalloonQueue
from tests.fakes.channel import Channel, ConnectionLost
from tests.fakes.eventfd import new_eventfd
from tests.fakes.machine import Setup
from tests.fakes.memory import MIB, open_memfd
from tests.fakes.messages import Flags, ProtocolFeature, Request, Status, VirtioFeature, u64
from tests.hostile.attack import Attack, Verdict, closing, refused, serves

ONLY_ACKS = Setup(protocol_features=ProtocolFeature.REPLY_ACK | ProtocolFeature.MQ)
NO_ACKS = Setup(protocol_features=Setup().protocol_features & ~ProtocolFeature.REPLY_ACK)
RANDOM_STEPS = 32


def unoffered_features(guest: BalloonDriver) -> None:
    """H22: each bit the back end did not offer."""
    offered = guest.machine.offer.features
    for bit in range(64):
        if not offered >> bit & 1:
            refused(guest, Request.SET_FEATURES, u64(guest.machine.features | 1 << bit))


def unoffered_protocol_features(guest: BalloonDriver) -> None:
    """H24: each bit but INBAND, which has a rule of its own."""
    front = guest.machine.front
    for bit in range(64):
        unoffered = not guest.machine.offer.protocol_features >> bit & 1
        if unoffered and 1 << bit != ProtocolFeature.INBAND_NOTIFICATIONS:
            refused(guest, Request.SET_PROTOCOL_FEATURES, u64(front.protocol_features | 1 << bit))


def other_protocol_features_while_running(guest: BalloonDriver) -> None:
    """H25: the addresses' meaning and the acknowledgements may not change under a ring."""
    kept = guest.machine.front.protocol_features
    for bit in (ProtocolFeature.GPA_ADDRESSES, ProtocolFeature.CONFIG, ProtocolFeature.MQ):
        if bit in kept:
            refused(guest, Request.SET_PROTOCOL_FEATURES, u64(kept & ~bit))


def inband_without_its_companions(guest: BalloonDriver) -> None:
    """H26: the specification says close; refusing an unoffered bit is as safe."""
    front = guest.machine.front
    with contextlib.suppress(ConnectionLost):
        verdict = front.ack(
            Request.SET_PROTOCOL_FEATURES, u64(ProtocolFeature.INBAND_NOTIFICATIONS)
        )
        assert verdict != 0, "in-band notifications were accepted"
        drop_politely(guest)


def drop_politely(guest: BalloonDriver) -> None:
    """Hang up ourselves, so that the end of the connection can be waited for."""
    guest.machine.front.shutdown_writes()


def feature_not_acked(guest: BalloonDriver, request: Request, payload: bytes, fd: bool) -> None:
    """H27: the setter's feature bit was not acknowledged by the front end."""
    if fd:
        with closing(open_memfd(MIB)) as fds:
            refused(guest, request, payload, fds)
    else:
        refused(guest, request, payload)


def config_not_acked(guest: BalloonDriver) -> None:
    """H27: the reply says size 0."""
    reply = guest.machine.front.ask(Request.GET_CONFIG, messages.config(0, bytes(16)))
    assert messages.unpack_config(reply.payload)[1] == 0


def reply_wanted_but_not_agreed(guest: BalloonDriver) -> None:
    """H28: without REPLY_ACK the flag means nothing: the next reply is the next getter's."""
    front = guest.machine.front
    front.send(Request.SET_OWNER, flags=Flags.VERSION | Flags.NEED_REPLY)
    front.send(Request.SET_FEATURES, u64(guest.machine.features), (), 0x9)
    assert front.get_features() == guest.machine.offer.features


def second_backend_channel(guest: BalloonDriver) -> None:
    """H29: the new socket replaces the old one, which is closed."""
    front = guest.machine.front
    first = front.backend_requests
    assert first is not None
    front.backend_requests = None
    assert front.set_backend_req_fd() == 0
    assert first.wait_closed(), "the old channel is still held"
    first.close()


def same_backend_channel(guest: BalloonDriver) -> None:
    """A socket that the back end has already goes on: it must not be closed as the old one."""
    front = guest.machine.front
    ours, theirs = socket.socketpair()
    with theirs:
        for _ in range(2):
            assert front.tell(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()]) == 0
    assert not select.select([ours], [], [], 0)[0], "the channel was hung up on"
    if front.backend_requests is not None:
        front.backend_requests.close()
    front.backend_requests = Channel(ours, front.timeout_s)


def backend_channel_that_lies(guest: BalloonDriver) -> None:
    """The channel carries what no front end sends; only the channel may suffer."""
    front = guest.machine.front
    for garbage in (b"\0" * 12, b"\xff" * 64, messages.header(2, 5, 0xFFFF_FFFF)):
        assert front.set_backend_req_fd() == 0
        assert front.backend_requests is not None
        with contextlib.suppress(ConnectionLost):
            front.backend_requests.raw(garbage)
    assert front.backend_requests is not None
    front.backend_requests.close()
    serves(guest)
    assert front.set_backend_req_fd() == 0


def random_status(guest: BalloonDriver) -> None:
    """H30: any byte may come, 0 in mid-operation too; then the device starts again."""
    front = guest.machine.front
    source = random.Random(30)
    for _ in range(RANDOM_STEPS):
        front.ack(Request.SET_STATUS, u64(source.randrange(256)))
        front.get_status()
    guest.machine.restart_afresh()


def status_beyond_a_byte(guest: BalloonDriver) -> None:
    """H30."""
    for value in (0x100, 1 << 32, (1 << 64) - 1):
        refused(guest, Request.SET_STATUS, u64(value))


def status_zero_in_flight(guest: BalloonDriver) -> None:
    """H30: status 0 while the device holds a statistics buffer."""
    guest.give_stats(bytes(10))
    guest.machine.front.ack(Request.SET_STATUS, u64(0))
    guest.machine.restart_afresh()


def reset_in_flight(guest: BalloonDriver) -> None:
    """H31: RESET_DEVICE while the device holds a buffer; set-up afterwards is legal."""
    guest.give_stats(bytes(10))
    guest.machine.front.ack(Request.RESET_DEVICE)
    guest.machine.restart_afresh()
    serves(guest, BalloonQueue.STATS)
    guest.machine.restart_ring(BalloonQueue.STATS)


def second_owner(guest: BalloonDriver) -> None:
    """H33."""
    refused(guest, Request.SET_OWNER)


def lost_owner(guest: BalloonDriver) -> None:
    """RESET_OWNER is dead: ignored, or the rings are disabled; a new start works either way."""
    guest.machine.front.ack(Request.RESET_OWNER)
    guest.machine.restart_afresh()


def features_while_running(guest: BalloonDriver) -> None:
    """The ring layout may not change under running rings; the same set again is harmless."""
    features = guest.machine.features
    refused(guest, Request.SET_FEATURES, u64(features ^ VirtioFeature.RING_PACKED))
    assert guest.machine.front.ack(Request.SET_FEATURES, u64(features)) == 0


def requests_for_other_devices(guest: BalloonDriver, request: Request, size: int) -> None:
    """Messages of net, crypto and gpu devices."""
    with closing(new_eventfd()) as fds:
        refused(guest, request, bytes(size), fds)
    refused(guest, request, bytes(size))


def stream_socket_pair_as_channel(guest: BalloonDriver) -> None:
    """A channel whose other end is gone already."""
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs:
        guest.machine.front.ack(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
    serves(guest)
    assert guest.machine.front.set_backend_req_fd() == 0


def status_word(guest: BalloonDriver) -> None:
    """What was written is read back, as far as a transport may tell."""
    assert guest.machine.front.ack(Request.SET_STATUS, u64(Status.FEATURES_OK)) == 0
    assert guest.machine.front.get_status() & Status.FEATURES_OK


def stop_and_start(guest: BalloonDriver) -> None:
    """QEMU's stop and cont between two attacks."""
    bases = guest.machine.stop()
    assert all(base is not None for base in bases)
    guest.machine.start(with_memory=False)


_UNACKED = (
    (Request.SET_CONFIG, messages.config(0, bytes(16)), False),
    (Request.GET_MAX_MEM_SLOTS, b"", False),
    (Request.ADD_MEM_REG, messages.memory_slot(messages.WireRegion(1 << 40, MIB, 0, 0)), True),
    (Request.REM_MEM_REG, messages.memory_slot(messages.WireRegion(0, MIB, 0, 0)), False),
    (Request.GET_INFLIGHT_FD, messages.inflight(0, 0, 5, 128), False),
    (Request.SET_INFLIGHT_FD, messages.inflight(MIB, 0, 5, 128), True),
    (Request.SET_STATUS, u64(8), False),
    (Request.SET_LOG_BASE, messages.log(MIB, 0), True),
    (Request.SET_DEVICE_STATE_FD, messages.device_state(0, 0), True),
    (Request.SET_BACKEND_REQ_FD, b"", True),
    (Request.RESET_DEVICE, b"", False),
    (Request.VRING_KICK, messages.vring_state(0, 0), False),
    (Request.POSTCOPY_LISTEN, b"", False),
)
_ALWAYS_ANSWERED = (  # their refusal has the reply's shape, not an acknowledgement's
    Request.GET_MAX_MEM_SLOTS,
    Request.GET_INFLIGHT_FD,
    Request.SET_LOG_BASE,
    Request.SET_DEVICE_STATE_FD,
)


def unacked_getter(guest: BalloonDriver, request: Request, payload: bytes, fd: bool) -> None:
    """H27: a refused getter is answered at all, and the connection is kept."""
    with closing(open_memfd(MIB)) as fds:
        reply = guest.machine.front.ask(request, payload, fds if fd else ())
    assert not reply.fds, "a refusal carries no descriptor"
    guest.machine.front.get_features()


def _attacks() -> Iterator[Attack]:
    refuse, ignore, drop = Verdict.REFUSE, Verdict.IGNORE, Verdict.DROP
    yield Attack(22, "features-unoffered", refuse, unoffered_features)
    yield Attack(22, "features-while-running", refuse, features_while_running)
    yield Attack(24, "protocol-features-unoffered", refuse, unoffered_protocol_features)
    yield Attack(25, "protocol-features-running", refuse, other_protocol_features_while_running)
    yield Attack(26, "inband", drop, inband_without_its_companions)
    for request, payload, fd in _UNACKED:
        answered = request in _ALWAYS_ANSWERED
        act = partial(
            unacked_getter if answered else feature_not_acked,
            request=request,
            payload=payload,
            fd=fd,
        )
        yield Attack(27, f"{request.name.lower()}-unacked", refuse, act, ONLY_ACKS)
    yield Attack(27, "get_config-unacked", refuse, config_not_acked, ONLY_ACKS)
    yield Attack(28, "need-reply-unacked", ignore, reply_wanted_but_not_agreed, NO_ACKS)
    yield Attack(29, "second-channel", ignore, second_backend_channel)
    yield Attack(29, "same-channel", ignore, same_backend_channel)
    yield Attack(29, "lying-channel", ignore, backend_channel_that_lies)
    yield Attack(29, "dead-channel", ignore, stream_socket_pair_as_channel)
    yield Attack(30, "status-random", ignore, random_status)
    yield Attack(30, "status-beyond-a-byte", refuse, status_beyond_a_byte)
    yield Attack(30, "status-0-in-flight", ignore, status_zero_in_flight)
    yield Attack(30, "status-is-kept", ignore, status_word)
    yield Attack(31, "reset-in-flight", ignore, reset_in_flight)
    yield Attack(33, "second-owner", refuse, second_owner)
    yield Attack(33, "reset-owner", ignore, lost_owner)
    yield Attack(33, "stop-and-start", ignore, stop_and_start)
    for request, size in (
        (Request.SEND_RARP, 8),
        (Request.NET_SET_MTU, 8),
        (Request.SET_VRING_ENDIAN, 8),
        (Request.CLOSE_CRYPTO_SESSION, 8),
        (Request.GPU_SET_SOCKET, 0),
    ):
        act = partial(requests_for_other_devices, request=request, size=size)
        yield Attack(11, f"{request.name.lower()}-of-another-device", refuse, act)


ATTACKS = list(_attacks())
