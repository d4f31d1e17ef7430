"""A scriptable vhost-user back end to put under a real VMM: it records, answers, and misbehaves.

It does no device's work: rings stay untouched. A test reads what the VMM sent, and chooses what
goes back to it, and when. Must not import vhostd, and must not know what VMM is at the other end.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
import termios
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from tests.fakes.channel import ConnectionLost, Message
from tests.fakes.messages import (
    HEADER_SIZE,
    BackendRequest,
    Flags,
    ProtocolFeature,
    Request,
    VirtioFeature,
    config,
    header,
    u64,
    unpack_config,
    unpack_header,
    unpack_vring_state,
    vring_state,
)

FEATURES = VirtioFeature.PROTOCOL_FEATURES | VirtioFeature.VERSION_1
PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.BACKEND_SEND_FD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
SHMEM_REGIONS_MAX = 256
_FDS_MAX = 253  # SCM_MAX_FD


@dataclass(frozen=True)
class Offer:
    """What the back end answers; sizes in bytes.

    Attributes:
        config: the whole config space. Its length is the device's config_size.
        shmem_sizes: shared memory regions of GET_SHMEM_CONFIG, by number.
    """

    features: int = FEATURES
    protocol_features: int = PROTOCOL_FEATURES
    queue_count: int = 5
    memory_slots: int = 32
    config: bytes = bytes(16)
    shmem_sizes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Seen:
    """One message of the front end as it came; its descriptors are counted and gone."""

    request: int
    flags: int
    payload: bytes
    fd_count: int

    @property
    def need_reply(self) -> bool:
        """Whether an answer is owed because the header says so."""
        return bool(self.flags & Flags.NEED_REPLY)

    @property
    def number(self) -> int:
        """The payload of a message that carries one u64."""
        (value,) = struct.unpack("=Q", self.payload)
        return int(value)

    @property
    def ring(self) -> tuple[int, int]:
        """Index and number, for messages that carry a vring state."""
        return unpack_vring_state(self.payload)


Hook = Callable[[Seen], None]


@dataclass
class BackEnd:
    """Serves one connection. Made by listening().

    Attributes:
        seen: every message so far; a test may clear it.
        unanswered: requests that get no reply, however much one is owed, until answer_late().
        before_answer: called with each message before its answer goes out, so that what it does
            is done while the front end still waits.
        lost: why the connection is over, None while it is up or not yet made.
    """

    offer: Offer
    seen: list[Seen] = field(default_factory=list)
    unanswered: set[int] = field(default_factory=set)
    before_answer: Hook | None = None
    lost: str | None = None
    _changed: trio.Event = field(default_factory=trio.Event)
    _bases: dict[int, int] = field(default_factory=dict)
    _owed: list[Seen] = field(default_factory=list)
    _connection: socket.socket | None = None
    _channel: socket.socket | None = None

    def requests(self) -> list[int]:
        """The numbers of all messages seen, in order."""
        return [message.request for message in self.seen]

    def of(self, request: Request) -> list[Seen]:
        """The messages of one kind, in order."""
        return [message for message in self.seen if message.request == request]

    async def until(self, holds: Callable[[], bool], timeout_s: float = 30) -> None:
        """Wait until it holds; looked at after every message, and when the connection ends.

        Raises:
            TooSlowError: it did not in time.
        """
        with trio.fail_after(timeout_s):
            while not holds():
                await self._changed.wait()

    async def wait_for(self, request: Request, count: int = 1, timeout_s: float = 30) -> None:
        """Wait until `count` messages of one kind have been seen (since seen was cleared)."""
        await self.until(lambda: len(self.of(request)) >= count, timeout_s)

    def send(
        self,
        request: BackendRequest,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        flags: int = Flags.VERSION,
    ) -> None:
        """Put one message of our own on the front end's back-end channel, at once, as it is.

        Raises:
            AssertionError: the front end has given no channel yet.
        """
        self.send_bytes(header(request, flags, len(payload)) + payload, fds)

    def send_bytes(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Put bytes on the back-end channel, a part of a message for example."""
        socket.send_fds(self._the_channel(), [data], list(fds))

    def unread(self) -> bool:
        """Whether the front end has yet to read something of what was put on the channel."""
        queued = fcntl.ioctl(self._the_channel(), termios.TIOCOUTQ, bytes(4))
        return queued != bytes(4)

    async def next_answer(self, timeout_s: float = 10) -> Message:
        """The front end's next answer on the back-end channel.

        Raises:
            TooSlowError: none came in time.
            ConnectionLost: the front end closed the channel.
        """
        with trio.fail_after(timeout_s):
            return await _receive(self._the_channel())

    def answer_late(self) -> None:
        """Send every answer that was held back, and hold back no more."""
        self.unanswered.clear()
        owed, self._owed = self._owed, []
        for seen in owed:
            self._answer(seen)

    def hang_up(self) -> None:
        """End the connection as a back end that dies does."""
        assert self._connection is not None, "the front end has not connected"
        self._connection.shutdown(socket.SHUT_RDWR)

    async def serve(self, connection: socket.socket) -> None:
        """Record and answer until either side hangs up."""
        self._connection = connection
        try:
            while True:
                message = await _receive(connection)
                seen = Seen(message.request, message.flags, message.payload, len(message.fds))
                self.seen.append(seen)
                self._keep(message)
                self._wake()
                if self.before_answer is not None:
                    self.before_answer(seen)
                self._answer(seen)
        except (ConnectionLost, BrokenPipeError) as error:
            self.lost = str(error)
            self._wake()

    def close(self) -> None:
        """Close the back-end channel, if there is one."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _the_channel(self) -> socket.socket:
        assert self._channel is not None, "the front end has sent no SET_BACKEND_REQ_FD"
        return self._channel

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _keep(self, message: Message) -> None:
        """Take what later answers need; close every descriptor but the channel's."""
        fds = message.fds
        if message.request == Request.SET_BACKEND_REQ_FD:
            self.close()
            self._channel = socket.socket(fileno=fds[0])
            self._channel.setblocking(False)
            fds = fds[1:]
        elif message.request == Request.SET_VRING_BASE:
            index, base = unpack_vring_state(message.payload)
            self._bases[index] = base
        for fd in fds:
            os.close(fd)

    def _answer(self, seen: Seen) -> None:
        assert self._connection is not None
        if seen.request in self.unanswered:
            self._owed.append(seen)
            return
        reply = self._reply_to(seen)
        if reply is None and seen.need_reply:
            reply = u64(0)
        if reply is not None:
            answer = header(seen.request, Flags.VERSION | Flags.REPLY, len(reply)) + reply
            # Smaller than any socket buffer, to a front end that waits for nothing else.
            self._connection.send(answer)

    def _reply_to(self, seen: Seen) -> bytes | None:
        """The payload of a reply that is owed without being asked for; None if none is."""
        offer = self.offer
        numbers: dict[int, int] = {
            Request.GET_FEATURES: offer.features,
            Request.GET_PROTOCOL_FEATURES: offer.protocol_features,
            Request.GET_QUEUE_NUM: offer.queue_count,
            Request.GET_MAX_MEM_SLOTS: offer.memory_slots,
            Request.GET_STATUS: 0,
        }
        if seen.request in numbers:
            return u64(numbers[seen.request])
        if seen.request == Request.GET_VRING_BASE:
            index, _ = seen.ring
            return vring_state(index, self._bases.get(index, 0))
        if seen.request == Request.GET_CONFIG:
            offset, size, _, _ = unpack_config(seen.payload)
            return config(offset, offer.config[offset : offset + size])
        if seen.request == Request.GET_SHMEM_CONFIG:
            return shmem_config(offer.shmem_sizes)
        return None


def shmem_config(sizes: Sequence[int]) -> bytes:
    """Pack the reply to GET_SHMEM_CONFIG: u32 count, u32 padding, 256 u64 sizes in bytes."""
    filled = [*sizes, *[0] * (SHMEM_REGIONS_MAX - len(sizes))]
    return struct.pack(f"=2I{SHMEM_REGIONS_MAX}Q", len(sizes), 0, *filled)


def shmem_map(region: int, fd_offset: int, offset: int, size: int, *, writable: bool) -> bytes:
    """Pack SHMEM_MAP and SHMEM_UNMAP: u8 region, 7 of padding, u64 file offset, u64 offset in the
    region, u64 size in bytes, u64 flags (1 = writable)."""
    return struct.pack("=B7x4Q", region, fd_offset, offset, size, int(writable))


async def _receive(sock: socket.socket) -> Message:
    """Read one whole message. Raises ConnectionLost."""
    start, fds = await _read(sock, HEADER_SIZE)
    request, flags, size = unpack_header(start)
    payload, more = await _read(sock, size)
    return Message(request, flags, payload, fds + more)


async def _read(sock: socket.socket, size: int) -> tuple[bytes, tuple[int, ...]]:
    data = b""
    fds: tuple[int, ...] = ()
    space = socket.CMSG_SPACE(_FDS_MAX * array.array("i").itemsize)
    while len(data) < size:
        await trio.lowlevel.wait_readable(sock)
        try:
            part, ancillary, _, _ = sock.recvmsg(size - len(data), space, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError as error:
            raise ConnectionLost(str(error)) from error
        for level, kind, body in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds += struct.unpack(f"={len(body) // 4}i", body)
        if not part:
            raise ConnectionLost(f"end of file after {len(data)} of {size} bytes")
        data += part
    return data, fds


@asynccontextmanager
async def listening(path: Path, offer: Offer | None = None) -> AsyncIterator[BackEnd]:
    """A back end that listens at path and serves the first connection."""
    back = BackEnd(offer or Offer())

    async def accept_and_serve(listener: socket.socket) -> None:
        await trio.lowlevel.wait_readable(listener)
        connection, _ = listener.accept()
        with connection:
            connection.setblocking(False)
            await back.serve(connection)

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(accept_and_serve, listener)
                try:
                    yield back
                finally:
                    nursery.cancel_scope.cancel()
                    back.close()
        except BaseExceptionGroup as group:
            # What a test raises comes out as it was raised.
            if len(group.exceptions) > 1:
                raise
            raise group.exceptions[0] from None
