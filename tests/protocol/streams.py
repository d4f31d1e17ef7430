"""Feeds a Framer as a socket would, and watches descriptors. Knows no rule."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vhostd.fds import OwnedFd
from vhostd.protocol.framing import Framer, Message

from tests.fakes import messages
from tests.fakes.messages import Flags


class Watched:
    """A descriptor to give away; it is the last holder of a pipe's write end."""

    def __init__(self) -> None:
        self._reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.fd = OwnedFd(writer)

    @property
    def closed(self) -> bool:
        """Nobody holds the descriptor any more: its pipe is at end of file."""
        try:
            return os.read(self._reader, 1) == b""
        except BlockingIOError:
            return False

    def __del__(self) -> None:
        """Close the reading end."""
        os.close(self._reader)


def watched(count: int) -> list[Watched]:
    """Several of them."""
    return [Watched() for _ in range(count)]


def feed(framer: Framer, data: bytes, fds: Sequence[OwnedFd] = ()) -> list[Message]:
    """Read data exactly as bytes_wanted() says, descriptors with the first byte."""
    found: list[Message] = []
    while data:
        part, data = data[: framer.bytes_wanted()], data[framer.bytes_wanted() :]
        message = framer.receive(part, fds)
        fds = ()
        if message is not None:
            found.append(message)
    return found


def encoded(request: int, payload: bytes = b"", flags: int = Flags.VERSION) -> bytes:
    """One message as a front end writes it."""
    return messages.header(request, flags, len(payload)) + payload
