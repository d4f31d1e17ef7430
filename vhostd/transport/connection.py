"""A vhost-user connection: whole messages in.

A message that is there as a whole is left in the socket until it has been answered, so that a
successor of a process that died meanwhile finds it. Knows how a message is cut off a socket. The
native worker watches the socket between messages, so receive() says when there is nothing more
instead of waiting for it. Must not know sessions.
"""

from __future__ import annotations

import socket
from enum import Enum
from typing import Final

import trio

from vhostd.fds import OwnedFd
from vhostd.protocol.framing import Framer, Message
from vhostd.protocol.wire import HEADER, PAYLOAD_SIZE_MAX
from vhostd.transport.foreign_fds import Closer
from vhostd.transport.stream import Disconnected, UnixStream

PEEK_SIZE: Final = 4 * (HEADER.size + PAYLOAD_SIZE_MAX)
"""Bytes; more than a message can have, since a sender may put several into one."""


class _Look(Enum):
    """What a look at the socket found."""

    NOTHING = "no byte"
    PART = "the beginning of a message"
    WHOLE = "a message"
    TAKE = "what can't be looked at as a whole, and must be taken out"


class Connection:
    """Owns a connected socket.

    Attributes:
        unread_size: bytes of the message received last that are still in the socket; 0: it came in
            pieces, and was taken out.
    """

    def __init__(self, sock: socket.socket, closer: Closer | None = None) -> None:
        """closer: of the descriptors that come; None: one for this connection alone."""
        self._stream = UnixStream(sock, closer)
        self._framer = Framer()
        self.unread_size = 0

    def fileno(self) -> int:
        """The socket's descriptor, borrowed; -1 once closed."""
        return self._stream.fileno()

    @property
    def peer_pid(self) -> int | None:
        """The process that made the connection; None where the kernel does not say."""
        return self._stream.peer_pid

    @property
    def hung_up(self) -> bool:
        """The peer has closed its end, or we ours; messages may still be there to be read."""
        return self._stream.hung_up

    def detach(self) -> OwnedFd:
        """Give the descriptor away, with all that lies in it; this object is closed."""
        self._framer.close()
        return self._stream.detach()

    def leave(self) -> None:
        """Close our descriptor only: somebody else goes on with the connection."""
        self._framer.close()
        self._stream.close()

    def close(self) -> None:
        """Hang up and close the descriptors of a half-received message. Twice is fine."""
        self._framer.close()
        self._stream.hang_up()

    async def receive(self) -> Message | None:
        """Read one message, waiting for its rest if only a part is there.

        Safe to cancel: the next call goes on where this one stopped.

        Returns:
            The message, or None when not even its first byte is there yet.

        Raises:
            FrontendError: fatal; the stream broke the protocol or ended inside a message.
            Disconnected: it ended between two messages.
            HostError: no memory to receive it with.
        """
        await trio.lowlevel.checkpoint()
        self.unread_size = 0
        if self._framer.at_boundary:
            look, message = self._look()
            if look is _Look.PART:
                look, message = await self._look_on()
            if look is not _Look.TAKE:
                return message
        while True:
            read = self._stream.try_read(self._framer.bytes_wanted())
            if read is None:
                if self._framer.at_boundary:
                    return None
                await self._stream.wait_readable()
            elif read.data:
                message = self._framer.receive(read.data, read.fds, fds_lost=read.fds_lost)
                if message is not None:
                    return message
            else:
                self._framer.end_of_stream()
                raise Disconnected("the VMM hung up")

    def _look(self) -> tuple[_Look, Message | None]:
        """What is there, and the next message if all of it is."""
        read = self._stream.peek(PEEK_SIZE)
        if read is None:
            return _Look.NOTHING, None
        size = _message_size(read.data)
        if size is None or len(read.data) < size:
            for fd in read.fds:
                fd.close()
            # No look goes past descriptors, and at the end of the stream none sees more.
            stuck = self._stream.unread_size > len(read.data) or self._stream.hung_up
            whole_header = len(read.data) >= HEADER.size
            return (_Look.TAKE if stuck or (whole_header and size is None) else _Look.PART), None
        fds, fds_lost = read.fds, read.fds_lost
        if (fds or fds_lost) and not self._stream.came_at_once(len(read.data)):
            for fd in fds:
                fd.close()  # a later message's, or only its payload's
            fds, fds_lost = (), False
        message = self._framer.receive(read.data[: HEADER.size], fds, fds_lost=fds_lost)
        if message is None:
            message = self._framer.receive(read.data[HEADER.size : size])
        self.unread_size = size
        return _Look.WHOLE, message

    async def _look_on(self) -> tuple[_Look, Message | None]:
        """Wait until a message of which a part is there is whole, or can't be looked at."""
        with self._stream.watch_arrivals() as arrivals:
            while True:
                arrivals.seen()
                look, message = self._look()
                if look is not _Look.PART:
                    return look, message
                await arrivals.wait()

    async def wait_hung_up(self) -> None:
        """Wait until the peer has closed its end; messages may still be there to be read.

        Raises:
            HostError: no descriptor or memory to watch it with.
        """
        await self._stream.wait_hung_up()

    async def wait_writable(self) -> None:
        """Wait until a reply may have room."""
        await self._stream.wait_writable()

    async def wait_readable(self) -> None:
        """Wait until receive() has something to say, where no native worker watches the socket."""
        await self._stream.wait_readable()


def _message_size(begin: bytes) -> int | None:
    """Bytes of the message that begins so; None: that can't be said, or is too much."""
    if len(begin) < HEADER.size:
        return None
    payload_size: int = HEADER.unpack_from(begin)[2]
    return None if payload_size > PAYLOAD_SIZE_MAX else HEADER.size + payload_size
