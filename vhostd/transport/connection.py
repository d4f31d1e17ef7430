"""A vhost-user connection: whole messages in, whole replies out.

Knows how a message is cut off a socket. The native worker watches the socket between messages, so
receive() says when there is nothing more instead of waiting for it. Must not know sessions.
"""

from __future__ import annotations

import socket

import trio

from vhostd.protocol.framing import Framer, Message
from vhostd.protocol.replies import Reply
from vhostd.transport.stream import Disconnected, UnixStream


class Connection:
    """Owns a connected socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._stream = UnixStream(sock)
        self._framer = Framer()

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

    def close(self) -> None:
        """Hang up and close the descriptors of a half-received message. Twice is fine."""
        self._framer.close()
        self._stream.close()

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

    async def wait_readable(self) -> None:
        """Wait until receive() has something to say, where no native worker watches the socket."""
        await self._stream.wait_readable()

    async def send(self, reply: Reply) -> None:
        """Send a reply with its descriptors, which are closed then.

        Cancelled half-way, the connection is no longer of use: every later send() raises.

        Raises:
            Disconnected: the peer is gone, or an earlier reply was cut short.
            HostError: its descriptors cannot be passed, or there is no memory.
        """
        try:
            await self._stream.send(reply.data, reply.fds)
        finally:
            for fd in reply.fds:
                fd.close()
