"""H1 to H19: broken headers, lengths and ancillary data on a running connection."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import socket
from collections.abc import Callable, Iterator
from functools import partial

from tests.fakes import messages
from tests.fakes.balloon import BalloonDriver
from tests.fakes.channel import ConnectionLost
from tests.fakes.eventfd import new_eventfd
from tests.fakes.memory import MIB, open_memfd
from tests.fakes.messages import Flags, Request, WireRegion, u64, vring_state
from tests.hostile.attack import (
    Attack,
    Verdict,
    accepted,
    closing,
    fds_for,
    refused,
    refused_in_shape,
)

SPARE = WireRegion(1 << 40, MIB, 1 << 40, 0)  # legal beside the guest's RAM, GPA_ADDRESSES or not
NEED_REPLY = Flags.VERSION | Flags.NEED_REPLY


def shapes(guest: BalloonDriver) -> dict[Request, bytes]:
    """Legal payloads of the setters whose shape has one length."""
    features = guest.machine.features
    return {
        Request.SET_FEATURES: u64(features),
        Request.SET_PROTOCOL_FEATURES: u64(guest.machine.front.protocol_features),
        Request.SET_VRING_NUM: vring_state(4, 128),
        Request.SET_VRING_BASE: vring_state(4, 0),
        Request.SET_VRING_ADDR: messages.vring_addr(4, 0, 0, 0),
        Request.SET_VRING_KICK: u64(4),
        Request.SET_VRING_CALL: u64(4),
        Request.SET_VRING_ERR: u64(4),
        Request.SET_VRING_ENABLE: vring_state(4, 1),
        Request.SET_STATUS: u64(8),
        Request.ADD_MEM_REG: messages.memory_slot(SPARE),
        Request.REM_MEM_REG: messages.memory_slot(SPARE),
        Request.SET_MEM_TABLE: messages.memory_table([SPARE]),
        Request.SET_CONFIG: messages.config(0, bytes(16)),
    }


REPLIES = {  # getters with a reply of one length: legal payload, reply size
    Request.GET_FEATURES: (b"", 8),
    Request.GET_PROTOCOL_FEATURES: (b"", 8),
    Request.GET_QUEUE_NUM: (b"", 8),
    Request.GET_MAX_MEM_SLOTS: (b"", 8),
    Request.GET_STATUS: (b"", 8),
    Request.GET_VRING_BASE: (vring_state(4, 0), 8),
}


def drop(guest: BalloonDriver, data: bytes) -> None:
    """Send bytes after which the connection cannot be understood any more."""
    with contextlib.suppress(ConnectionLost):
        guest.machine.front.raw(data)


def cut_header(guest: BalloonDriver, length: int) -> None:
    """H1: end of file in the middle of a header."""
    drop(guest, messages.header(Request.GET_FEATURES, Flags.VERSION, 0)[:length])
    guest.machine.front.shutdown_writes()


def cut_payload(guest: BalloonDriver) -> None:
    """H1: end of file in the middle of a payload, a descriptor already received."""
    front = guest.machine.front
    with closing(open_memfd(MIB)) as fds:
        whole = messages.header(Request.ADD_MEM_REG, Flags.VERSION, 40)
        front.raw(whole + bytes(20), fds)
    front.shutdown_writes()


def byte_by_byte(guest: BalloonDriver) -> None:
    """H2: a header in twelve writes is a header."""
    front = guest.machine.front
    for byte in messages.header(Request.GET_FEATURES, Flags.VERSION, 0):
        front.raw(bytes([byte]))
    assert messages.unpack_u64(front.receive_reply(Request.GET_FEATURES).payload)


def resized(payload: bytes, change: int) -> bytes:
    """Add zero bytes, or cut some off."""
    return payload + bytes(change) if change > 0 else payload[:change]


def setter_of_wrong_length(guest: BalloonDriver, request: Request, change: int | None) -> None:
    """H4, H5, H6: change bytes added or cut off; None = no payload at all."""
    legal = shapes(guest)[request]
    payload = b"" if change is None else resized(legal, change)
    with fds_for(request) as fds:
        refused(guest, request, payload, fds)


def getter_of_wrong_length(guest: BalloonDriver, request: Request, change: int) -> None:
    """H4, H5: the reply keeps its shape."""
    legal, size = REPLIES[request]
    refused_in_shape(guest, request, resized(legal, change), size)


def unknown_flags(guest: BalloonDriver) -> None:
    """H10: reserved flag bits change nothing."""
    front = guest.machine.front
    reply = front.ask(Request.GET_FEATURES, flags=Flags.VERSION | 0xFFFF_FFF0)
    assert messages.unpack_u64(reply.payload)
    front.send(Request.SET_STATUS, u64(8), flags=NEED_REPLY | 0x1230)
    assert front.receive_ack(Request.SET_STATUS) == 0


def too_many_fds(guest: BalloonDriver, request: Request, payload: bytes) -> None:
    """H13: 32 descriptors where one belongs."""
    with closing(*(new_eventfd() for _ in range(32))) as fds:
        refused(guest, request, payload, fds)


def uninvited_fds(guest: BalloonDriver) -> None:
    """H14: descriptors on messages that carry none; closed, the message is served."""
    front = guest.machine.front
    with closing(*(new_eventfd() for _ in range(4))) as fds:
        assert messages.unpack_u64(front.ask(Request.GET_FEATURES, b"", fds).payload)
        front.send(Request.SET_STATUS, u64(8), fds, NEED_REPLY)
        front.receive_ack(Request.SET_STATUS)  # accepted or refused: none may leak
        front.get_config()


def flood_of_fds(guest: BalloonDriver) -> None:
    """H15: as many as one message can carry; a receiver with a small buffer sees MSG_CTRUNC."""
    with closing(new_eventfd()) as (fd,):
        refused(guest, Request.SET_VRING_CALL, u64(0), [fd] * 253)


def fds_on_the_payload(guest: BalloonDriver) -> None:
    """H16: descriptors that come with the payload's first byte belong to no message."""
    front = guest.machine.front
    with closing(new_eventfd()) as fds:
        front.raw(messages.header(Request.SET_STATUS, NEED_REPLY, 8))
        front.raw(u64(8), fds)
        front.receive_ack(Request.SET_STATUS)


def late_fd_is_no_fd(guest: BalloonDriver) -> None:
    """H16: a message that needs a descriptor does not find it behind its header."""
    front = guest.machine.front
    with closing(open_memfd(MIB)) as fds:
        front.raw(messages.header(Request.ADD_MEM_REG, NEED_REPLY, 40))
        front.raw(messages.memory_slot(SPARE), fds)
        assert front.receive_ack(Request.ADD_MEM_REG) != 0


def without_its_fd(guest: BalloonDriver, request: Request) -> None:
    """H17."""
    payload = b"" if request is Request.SET_BACKEND_REQ_FD else shapes(guest)[request]
    refused(guest, request, payload)


# -- H18: descriptors of the wrong kind ---------------------------------------------------------


@contextlib.contextmanager
def a_socket() -> Iterator[int]:
    """Hold a datagram socket: nothing a vhost-user message ever carries."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        yield sock.fileno()


@contextlib.contextmanager
def a_pipe() -> Iterator[int]:
    """Hold the reading end of a pipe."""
    with closing(*os.pipe()) as (reader, _writer):
        yield reader


@contextlib.contextmanager
def a_terminal() -> Iterator[int]:
    """Hold a pseudo terminal."""
    with closing(*pty.openpty()) as (_controller, terminal):
        yield terminal


@contextlib.contextmanager
def an_epoll() -> Iterator[int]:
    """Hold an epoll set."""
    with select.epoll() as poller:
        yield poller.fileno()


@contextlib.contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    """Hold whatever opening path gives."""
    with closing(os.open(path, flags | os.O_CLOEXEC)) as (fd,):
        yield fd


WRONG_KINDS: dict[str, Callable[[], contextlib.AbstractContextManager[int]]] = {
    "directory": partial(opened, "/", os.O_RDONLY | os.O_DIRECTORY),
    "dev-null": partial(opened, "/dev/null", os.O_RDWR),
    "dev-zero": partial(opened, "/dev/zero", os.O_RDWR),
    "o-path": partial(opened, "/", os.O_PATH),
    "proc-mem": partial(opened, "/proc/self/mem", os.O_RDWR),
    "pipe": a_pipe,
    "socket": a_socket,
    "epoll": an_epoll,
    "terminal": a_terminal,
}


def memory_of_wrong_kind(guest: BalloonDriver, kind: str) -> None:
    """H18: guest memory that is no file with pages."""
    with WRONG_KINDS[kind]() as fd:
        refused(guest, Request.ADD_MEM_REG, messages.memory_slot(SPARE), [fd])


def channel_of_wrong_kind(guest: BalloonDriver, kind: str) -> None:
    """H18: a back-end request channel that is no stream socket."""
    with WRONG_KINDS[kind]() as fd:
        refused(guest, Request.SET_BACKEND_REQ_FD, b"", [fd])


def eventfd_of_wrong_kind(guest: BalloonDriver, request: Request, kind: str) -> None:
    """H18: what epoll or write cannot handle is refused, and the old eventfd stays in use."""
    with WRONG_KINDS[kind]() as fd:
        refused(guest, request, u64(0), [fd])


def own_socket(guest: BalloonDriver, request: Request, payload: bytes) -> None:
    """H19: our end of the very connection; holding it would keep the connection alive for ever."""
    refused(guest, request, payload, [guest.machine.front.fileno()])


def unknown_request(guest: BalloonDriver, request: int) -> None:
    """H11."""
    refused(guest, request)
    refused(guest, request, bytes(64))


def spare_memory_comes_and_goes(guest: BalloonDriver) -> None:
    """The shapes used above are legal: nothing was refused for a second reason."""
    slot = messages.memory_slot(SPARE)
    with closing(open_memfd(MIB)) as fds:
        accepted(guest, Request.ADD_MEM_REG, slot, fds)
    accepted(guest, Request.REM_MEM_REG, slot)


def _attacks() -> Iterator[Attack]:
    for length in range(1, messages.HEADER_SIZE):
        act = partial(cut_header, length=length)
        yield Attack(1, f"header-cut-at-{length}", Verdict.DROP, act)
    yield Attack(1, "payload-cut", Verdict.DROP, cut_payload)
    yield Attack(2, "header-byte-by-byte", Verdict.IGNORE, byte_by_byte)
    huge = messages.header(Request.SET_MEM_TABLE, Flags.VERSION, 0xFFFF_FFFF)
    yield Attack(3, "size-4-gib", Verdict.DROP, partial(drop, data=huge))
    setters = [request for request in Request if request in _SETTER_NAMES]
    for request in setters:
        for number, word, change in ((4, "long", 8), (5, "short", -1), (6, "empty", None)):
            name = f"{request.name.lower()}-{word}"
            act = partial(setter_of_wrong_length, request=request, change=change)
            yield Attack(number, name, Verdict.REFUSE, act)
    for request in REPLIES:
        act = partial(getter_of_wrong_length, request=request, change=8)
        yield Attack(4, f"{request.name.lower()}-long", Verdict.REFUSE, act)
    act = partial(getter_of_wrong_length, request=Request.GET_VRING_BASE, change=-4)
    yield Attack(5, "get_vring_base-short", Verdict.REFUSE, act)
    for version in (0, 2, 3):
        data = messages.header(Request.GET_FEATURES, version, 0)
        yield Attack(8, f"version-{version}", Verdict.DROP, partial(drop, data=data))
    data = messages.header(Request.GET_FEATURES, Flags.VERSION | Flags.REPLY, 0)
    yield Attack(9, "reply-bit", Verdict.DROP, partial(drop, data=data))
    yield Attack(10, "unknown-flags", Verdict.IGNORE, unknown_flags)
    for number in (0, 45, 0x7FFF_FFFF, 0xFFFF_FFFF):
        act = partial(unknown_request, request=number)
        yield Attack(11, f"request-{number}", Verdict.REFUSE, act)
    for request in (Request.SET_VRING_CALL, Request.SET_VRING_KICK, Request.SET_VRING_ERR):
        act = partial(too_many_fds, request=request, payload=u64(0))
        yield Attack(13, f"{request.name.lower()}-32-fds", Verdict.REFUSE, act)
    yield Attack(14, "fds-uninvited", Verdict.IGNORE, uninvited_fds)
    yield Attack(15, "253-fds", Verdict.REFUSE, flood_of_fds)
    yield Attack(16, "fds-on-payload", Verdict.IGNORE, fds_on_the_payload)
    yield Attack(16, "needed-fd-on-payload", Verdict.REFUSE, late_fd_is_no_fd)
    for request in _NEEDS_FD:
        act = partial(without_its_fd, request=request)
        yield Attack(17, f"{request.name.lower()}-without-fd", Verdict.REFUSE, act)
    yield from _wrong_kinds()
    yield Attack(18, "spare-memory-is-legal", Verdict.IGNORE, spare_memory_comes_and_goes)


def _wrong_kinds() -> Iterator[Attack]:
    for kind in WRONG_KINDS:
        act = partial(memory_of_wrong_kind, kind=kind)
        yield Attack(18, f"memory-is-{kind}", Verdict.REFUSE, act)
        act = partial(channel_of_wrong_kind, kind=kind)
        yield Attack(18, f"channel-is-{kind}", Verdict.REFUSE, act)
    for kind in ("directory", "o-path", "proc-mem"):
        for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
            act = partial(eventfd_of_wrong_kind, request=request, kind=kind)
            yield Attack(18, f"{request.name.lower()}-is-{kind}", Verdict.REFUSE, act)
    slot = messages.memory_slot(SPARE)
    for request, payload in (
        (Request.ADD_MEM_REG, slot),
        (Request.SET_BACKEND_REQ_FD, b""),
        (Request.SET_VRING_KICK, u64(0)),
        (Request.SET_VRING_CALL, u64(0)),
        (Request.SET_VRING_ERR, u64(0)),
    ):
        act = partial(own_socket, request=request, payload=payload)
        yield Attack(19, f"{request.name.lower()}-own-socket", Verdict.REFUSE, act)


_NEEDS_FD = (
    Request.ADD_MEM_REG,
    Request.SET_MEM_TABLE,
    Request.SET_BACKEND_REQ_FD,
    Request.SET_VRING_KICK,
    Request.SET_VRING_CALL,
    Request.SET_VRING_ERR,
)
_SETTER_NAMES = frozenset(
    {
        Request.SET_FEATURES,
        Request.SET_PROTOCOL_FEATURES,
        Request.SET_VRING_NUM,
        Request.SET_VRING_BASE,
        Request.SET_VRING_ADDR,
        Request.SET_VRING_KICK,
        Request.SET_VRING_CALL,
        Request.SET_VRING_ERR,
        Request.SET_VRING_ENABLE,
        Request.SET_STATUS,
        Request.ADD_MEM_REG,
        Request.REM_MEM_REG,
        Request.SET_MEM_TABLE,
        Request.SET_CONFIG,
    }
)
ATTACKS = list(_attacks())
