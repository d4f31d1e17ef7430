"""Requests from us to the VMM, on the socket of SET_BACKEND_REQ_FD.

Knows how a request and its acknowledgement look. Must not know when a request is allowed: QEMU 11.1
crashes on one while its device is not started, so the session's gate decides that.

The gate alone is not enough: a request may lie unread in the socket when QEMU begins to stop, and
then it is read afterwards, and nothing takes it back. So the last byte of each request is held back
until the rest was read. With the rest read, QEMU stands in its handler with its lock held and can't
begin to stop; until then the request can still be given up, with the channel, at the cost of later
requests but not of the VM.
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

UNANSWERED_MAX: Final = 16
"""Requests given up while their answer is still due; a VMM further behind never answers."""

_ANSWER_SIZE: Final = HEADER.size + U64.LAYOUT.size
_ANSWER_FLAGS: Final = HeaderFlag.VERSION | HeaderFlag.REPLY


OUTBOX_SIZE_MAX: Final = 65536
"""Bytes sent before the outbox begins anew."""

LOOK_AGAIN_MIN_S: Final = 0.0001
LOOK_AGAIN_MAX_S: Final = 0.01


class NotBegun(Exception):
    """The request was not allowed any more when its turn came; nothing was sent."""


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
        self._held_back = False  # of a request all but the last byte is under way
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
        """Send what is missing of a predecessor's last request, all but its last byte.

        Raises:
            Disconnected: the channel was hung up.
        """
        if self._stream.hung_up:
            raise Disconnected("hung up")
        outbox = self._outbox
        last = _last_request(outbox)
        sent = os.lseek(outbox.fileno(), 0, os.SEEK_CUR)
        if last is None or sent == last.end:
            return
        if sent == last.begin and not last.carries_fds:
            os.ftruncate(outbox.fileno(), sent)
            return
        if sent == last.begin:
            # Only sendfile() says that it sent. A VMM that has the first byte and gets no more
            # stands still for good; one that has not, and gets the rest, gives up the channel.
            sent = os.lseek(outbox.fileno(), 1, os.SEEK_CUR)
        sent += self._stream.send_from(outbox.fileno(), last.end - 1 - sent)
        self._held_back = sent == last.end - 1

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

        Closes the channel if there is such a request; nothing else takes it back.
        """
        if not self._held_back or self.closed:
            return
        try:
            if self._stream.unread:
                self.close()
            else:
                self._finish()
        except (Disconnected, HostError):
            self.close()  # the VMM has hung up this channel, and that alone

    def _finish(self) -> None:
        if self._stream.send_from(self._outbox.fileno(), 1) == 0:
            raise HostError(errno.ENOBUFS, "no room for one byte in an empty socket")
        self._held_back = False

    def _begin(self, data: bytes, fds: Sequence[OwnedFd]) -> bool:
        """Send all but the last byte; False: no room, nothing was sent."""
        outbox = self._outbox.fileno()
        start = os.lseek(outbox, 0, os.SEEK_CUR)
        if start > OUTBOX_SIZE_MAX and not self._stream.unread:
            # What was sent lies in the socket by reference until it is read.
            os.ftruncate(outbox, 0)
            start = os.lseek(outbox, 0, os.SEEK_SET)
        os.pwrite(outbox, data, start)
        first = 0
        if fds:
            if not self._stream.send_now(data[:1], fds):
                os.ftruncate(outbox, start)
                return False
            first = 1
            os.lseek(outbox, first, os.SEEK_CUR)
        wanted = len(data) - 1 - first
        sent = self._stream.send_from(outbox, wanted)
        if sent == wanted:
            self._held_back = True
            return True
        if sent or first:
            raise HostError(errno.ENOBUFS, "a short request was cut")
        os.ftruncate(outbox, start)
        return False

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
            ChannelClosed: the VMM hung up or answered nonsense, or began to stop before it read
                the request; the channel is closed.
            NotBegun: may_begin said no; nothing was sent.
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
                raise NotBegun
            if self._begin(data, fds):
                break
            await self._stream.wait_writable()
        await self._finish_once_read()

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


class _Request(NamedTuple):
    begin: int
    end: int
    carries_fds: bool


def _last_request(outbox: OwnedFd) -> _Request | None:
    """Where in the outbox the last request lies; they follow one another from its beginning."""
    found = None
    size, begin = os.fstat(outbox.fileno()).st_size, 0
    while begin < size:
        header = os.pread(outbox.fileno(), HEADER.size, begin)
        if len(header) < HEADER.size:
            break
        request, _flags, payload_size = HEADER.unpack(header)
        carries_fds = request in BACKEND_RULES and BACKEND_RULES[request].fds_max > 0
        found = _Request(begin, begin + HEADER.size + payload_size, carries_fds)
        begin = found.end
    return found
