"""Requests from us to the VMM, on the socket of SET_BACKEND_REQ_FD.

Knows how a request and its acknowledgement look. Must not know when a request is allowed: QEMU 11.1
crashes on one while its device is not started, so the session's gate decides that.

The gate alone is not enough: a request may lie unread in the socket when QEMU begins to stop, and
then it is read afterwards, and nothing takes it back. So only the first byte of each request is
sent at first. Once QEMU has read it, QEMU stands in its handler with its lock held and can't begin
to stop, so the rest is sent. If the stop comes before, the rest that is sent is another one: it
makes the request one of a number that does not exist. A VMM refuses that, and goes on with the
channel.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import trio

from vhostd.errors import FrontendError, HostError
from vhostd.fds import OwnedFd
from vhostd.protocol.requests import BACKEND_RULES, BackendRequest
from vhostd.protocol.wire import HEADER, U64, HeaderFlag
from vhostd.transport.stream import Disconnected, UnixStream

WITHDRAWN: Final = 0x100
"""Added to a request's number, it is that of no request; its first byte is the same."""

UNANSWERED_MAX: Final = 16
"""Requests given up while their answer is still due; a VMM further behind never answers."""

_ANSWER_SIZE: Final = HEADER.size + U64.LAYOUT.size
_ANSWER_FLAGS: Final = HeaderFlag.VERSION | HeaderFlag.REPLY


OUTBOX_SIZE_MAX: Final = 65536
"""Bytes sent before the outbox begins anew."""

LOOK_AGAIN_MIN_S: Final = 0.0001
LOOK_AGAIN_MAX_S: Final = 0.01


class NotAsked(Exception):
    """The request was not allowed any more before the VMM had begun to read it."""


class ChannelClosed(Exception):
    """No request can be made any more on this channel; the connection it belongs to goes on."""


class BackendChannel:
    """Owns the socket; one request is under way at a time."""

    def __init__(
        self, stream: UnixStream, *, reply_ack: bool, outbox: OwnedFd | None = None
    ) -> None:
        """Take over a connected socket.

        Args:
            reply_ack: REPLY_ACK was acknowledged, so that requests can be answered.
            outbox: a predecessor's; None: this channel is new.

        Raises:
            OSError: no memory or descriptor for it.
        """
        self._stream = stream
        self._reply_ack = reply_ack
        self._turn = trio.Lock()
        self._received = b""
        self._given_up: deque[BackendRequest] = deque()
        self._outbox = _new_outbox() if outbox is None else outbox
        self._held_back = False  # of a request the first byte is under way
        self._withdrawn = False  # the latest request was
        self._begin_at = 0  # in the outbox: of the latest request, or of one before it
        self._stale_answers = outbox is not None  # to a predecessor, how many nobody knows

    @classmethod
    def adopt(cls, fd: OwnedFd, *, reply_ack: bool, connection_fd: int) -> BackendChannel:
        """Take over the descriptor a VMM sent: one end of a socket pair, as every VMM makes it.

        A socket with a name is refused: it may be connected to any server on this host, this
        one included, and a VMM must not make us write there in its place.

        Args:
            fd: what the VMM sent.
            reply_ack: REPLY_ACK was acknowledged.
            connection_fd: socket of the connection it came on.

        Raises:
            FrontendError: it is no UNIX stream socket, not connected, has or meets a name, or is
                the connection itself. The descriptor is closed then.
        """
        stream = UnixStream.adopt(fd)  # first: fstat(2) of a file may never come back
        is_connection = os.path.sameopenfile(stream.fileno(), connection_fd)
        if is_connection or stream.named:
            stream.close()
            raise FrontendError("back-end request socket is not from a socket pair of its own")
        return cls(stream, reply_ack=reply_ack)

    @classmethod
    def resume(cls, fd: OwnedFd, outbox: OwnedFd, *, reply_ack: bool) -> BackendChannel:
        """Go on with a predecessor's channel; a request of which nothing went out is forgotten.

        One that was hung up, by the VMM or by the predecessor, is closed.
        """
        channel = cls(UnixStream.adopt(fd), reply_ack=reply_ack, outbox=outbox)
        try:
            channel._go_on()
        except Disconnected:
            channel.close()
        return channel

    def _go_on(self) -> None:
        """Take up a predecessor's last request.

        Raises:
            Disconnected: the channel was hung up.
        """
        if self._stream.hung_up:
            raise Disconnected("hung up")
        outbox = self._outbox.fileno()
        under_way = _under_way(outbox, self._begin_at)
        if under_way is None:
            return
        if under_way.sent == 0 and not under_way.carries_fds:
            os.ftruncate(outbox, under_way.begin)
            return
        if under_way.sent == 0:
            # Only sendfile() says that it sent. A VMM that has the first byte and gets no more
            # stands still for good; one that has not, and gets the rest, gives up the channel.
            os.lseek(outbox, 1, os.SEEK_CUR)
        self._held_back = True

    @property
    def outbox_fd(self) -> int:
        """The memfd requests go out of, borrowed: a successor needs it with the socket."""
        return self._outbox.fileno()

    @property
    def closed(self) -> bool:
        """No request can be made any more."""
        return self._stream.closed

    def fileno(self) -> int:
        """The socket's descriptor, borrowed; -1 once closed."""
        return self._stream.fileno()

    def close(self) -> None:
        """Hang up; a request under way raises ChannelClosed. Twice is fine."""
        self._stream.hang_up()
        self._outbox.close()

    def leave(self) -> None:
        """Close our descriptors only: a successor goes on with the channel."""
        self._stream.close()
        self._outbox.close()

    def on_stopping(self) -> None:
        """The VMM begins to stop the device: a request it has not begun to read must not be read.

        It is made one that the VMM refuses, so that the channel goes on.
        """
        if not self._held_back or self.closed:
            return
        try:
            self._withdraw()
        except (Disconnected, HostError):
            self.close()  # the VMM has hung up this channel, and that alone

    def _withdraw(self) -> None:
        outbox = self._outbox.fileno()
        under_way = _under_way(outbox, self._begin_at)
        assert under_way is not None, "one is held back"
        if under_way.sent == 1:
            # What is written here first, a successor sends as well.
            refused = HEADER.pack(under_way.number | WITHDRAWN, HeaderFlag.VERSION, 0)
            os.pwrite(outbox, refused[1:], under_way.begin + 1)
        elif self._stream.unread:
            # Of a predecessor of an older release, which held back its last byte only.
            raise Disconnected("a stop met a request")
        self._finish()
        self._withdrawn = True

    def _finish(self) -> None:
        outbox = self._outbox.fileno()
        under_way = _under_way(outbox, self._begin_at)
        assert under_way is not None, "one is held back"
        os.ftruncate(outbox, under_way.end)  # a withdrawn one has become shorter
        rest = under_way.end - under_way.begin - under_way.sent
        if self._stream.send_from(outbox, rest) != rest:
            raise HostError(errno.ENOBUFS, "a short request was cut")
        self._held_back = False

    def _begin(self, data: bytes, fds: Sequence[OwnedFd]) -> bool:
        """Send the first byte, with the descriptors; False: no room, nothing was sent."""
        outbox = self._outbox.fileno()
        start = os.lseek(outbox, 0, os.SEEK_CUR)
        if start > OUTBOX_SIZE_MAX and not self._stream.unread:
            # What was sent lies in the socket by reference until it is read.
            os.ftruncate(outbox, 0)
            start = os.lseek(outbox, 0, os.SEEK_SET)
        os.pwrite(outbox, data, start)
        self._begin_at = start
        if fds:
            sent = self._stream.send_now(data[:1], fds)
            os.lseek(outbox, int(sent), os.SEEK_CUR)
        else:
            sent = self._stream.send_from(outbox, 1) == 1
        if not sent:
            os.ftruncate(outbox, start)
        self._held_back = sent
        self._withdrawn = False
        return sent

    async def _finish_once_read(self) -> None:
        pause_s = LOOK_AGAIN_MIN_S
        while self._held_back and self._stream.unread:
            # Nothing announces that a peer has read: look again, less and less often.
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, LOOK_AGAIN_MAX_S)
        if self._held_back:
            self._finish()

    async def request(
        self,
        request: BackendRequest,
        payload: bytes = b"",
        fds: Sequence[OwnedFd] = (),
        may_begin: Callable[[], bool] = lambda: True,
    ) -> int | None:
        """Send one request and wait for its acknowledgement if REPLY_ACK was acknowledged.

        A VMM may take long to answer or never do it, so callers set their own time limit. Once
        the request is sent whole, cancelling only gives up its answer, which is skipped when it
        comes late. Cancelled before that, the channel is closed.

        Args:
            request: which.
            payload: of the shape BACKEND_RULES has for it.
            fds: stay the caller's.
            may_begin: asked at the last moment, with no other task in between.

        Returns:
            The VMM's verdict, 0 = done; None where none was asked for.

        Raises:
            ChannelClosed: the VMM hung up or answered nonsense; the channel is closed.
            NotAsked: may_begin said no, or the VMM began to stop before it read the request.
        """
        rule = BACKEND_RULES[request]
        assert len(payload) in rule.shape.SIZES, "payload of another request"
        assert rule.fds_min <= len(fds) <= rule.fds_max, "descriptors of another request"
        async with self._turn:
            try:
                await self._finish_once_read()  # what a predecessor began
                return await self._request(request, payload, fds, may_begin)
            except (Disconnected, FrontendError, HostError, trio.ClosedResourceError) as error:
                self.close()
                raise ChannelClosed(f"back-end requests: {error}") from error

    async def _send_in_two(
        self, data: bytes, fds: Sequence[OwnedFd], may_begin: Callable[[], bool]
    ) -> None:
        while True:
            if not may_begin():
                raise NotAsked
            if self._begin(data, fds):
                break
            await self._stream.wait_writable()
        await self._finish_once_read()
        if self._withdrawn:
            raise NotAsked

    async def _request(
        self,
        request: BackendRequest,
        payload: bytes,
        fds: Sequence[OwnedFd],
        may_begin: Callable[[], bool],
    ) -> int | None:
        if self.closed:
            raise Disconnected("closed on this side")
        if len(self._given_up) >= UNANSWERED_MAX:
            raise FrontendError(f"{len(self._given_up)} requests are unanswered")
        asks = self._reply_ack or BACKEND_RULES[request].reply is not None
        flags = HeaderFlag.VERSION | (HeaderFlag.NEED_REPLY if asks else HeaderFlag(0))
        data = HEADER.pack(request, flags, len(payload)) + payload
        try:
            await self._send_in_two(data, fds, may_begin)
        except trio.Cancelled:
            if self._held_back:
                self.leave()  # for a successor to finish, or the VMM is gone
            raise
        if not asks:
            return None
        self._given_up.append(request)
        while len(self._given_up) > 1:
            await self._answer(self._given_up[0])
            self._given_up.popleft()
        verdict = await self._answer(request)
        self._given_up.popleft()
        return verdict

    async def _answer(self, request: BackendRequest) -> int:
        """Wait for the answer to request; what was read is kept when this is cancelled."""
        while not self._has_answer_to(request):
            data = self._stream.try_read_bytes(_ANSWER_SIZE - len(self._received))
            if data is None:
                await self._stream.wait_readable()
                continue
            if not data:
                raise Disconnected("the VMM hung up")
            self._received += data
        answer, self._received = self._received, b""
        return U64.parse(answer[HEADER.size :]).value

    def _has_answer_to(self, request: BackendRequest) -> bool:
        """Whether its answer was received whole; one to a predecessor's request is dropped.

        Raises:
            FrontendError: what was received is no answer to it.
        """
        if len(self._received) < HEADER.size:
            return False
        number, flags, size = HEADER.unpack_from(self._received)
        fits = (flags, size) == (_ANSWER_FLAGS, U64.LAYOUT.size)
        if not fits or (number != request and not self._stale_answers):
            raise FrontendError(f"answer {number} flags {flags:#x} size {size} to {request.name}")
        if len(self._received) < _ANSWER_SIZE:
            return False
        if number != request:
            self._received = b""
            return False
        return True


def _new_outbox() -> OwnedFd:
    return OwnedFd(os.memfd_create("vhostd-outbox", os.MFD_CLOEXEC))


class _UnderWay(NamedTuple):
    number: int
    begin: int  # in the outbox
    end: int
    sent: int  # bytes of it
    carries_fds: bool


def _under_way(outbox: int, begin: int) -> _UnderWay | None:
    """The request of which not all was sent; from begin on they follow one another."""
    position = os.lseek(outbox, 0, os.SEEK_CUR)
    while len(header := os.pread(outbox, HEADER.size, begin)) == HEADER.size:
        number, _flags, payload_size = HEADER.unpack(header)
        end = begin + HEADER.size + payload_size
        if position < end:
            carries_fds = number in BACKEND_RULES and BACKEND_RULES[number].fds_max > 0
            return _UnderWay(number, begin, end, position - begin, carries_fds)
        begin = end
    return None
