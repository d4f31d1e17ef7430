"""Bytes and descriptors in, whole messages out.

Knows headers and the shape column of RULES. Must not know sockets, nor what was negotiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vhostd.errors import FrontendError
from vhostd.fds import OwnedFd
from vhostd.protocol.requests import RULES, Request, Rule, request_name
from vhostd.protocol.wire import HEADER, PAYLOAD_SIZE_MAX, HeaderFlag


@dataclass(frozen=True, slots=True)
class Message:
    """One whole front-end message; whoever holds it owns its descriptors.

    Attributes:
        request: message number, perhaps one that does not exist.
        flags: header flags as sent.
        payload: its bytes, of a legal size when fault is None.
        fds: as many as its rule allows; none when there is a fault.
        fault: what its rule says against it, or None. The byte stream is in order either way, so
            the session refuses this message and goes on.
    """

    request: int
    flags: int
    payload: bytes = b""
    fds: tuple[OwnedFd, ...] = ()
    fault: str | None = None

    @property
    def name(self) -> str:
        """The spec's name of the message."""
        return request_name(self.request)

    @property
    def rule(self) -> Rule | None:
        """Its row in RULES; None for a number that does not exist."""
        return RULES[Request(self.request)] if self.request in RULES else None

    @property
    def needs_reply(self) -> bool:
        """The sender set need_reply."""
        return bool(self.flags & HeaderFlag.NEED_REPLY)

    def close_fds(self) -> None:
        """Close what nobody took."""
        for fd in self.fds:
            fd.close()


class Framer:
    """Cuts the byte stream of one connection into messages."""

    def __init__(self) -> None:
        self._buffer = b""
        self._fds: list[OwnedFd] = []
        self._fds_lost = False
        self._failed = False

    @property
    def at_boundary(self) -> bool:
        """True when no part of a message was received."""
        return not self._buffer

    def bytes_wanted(self) -> int:
        """How many bytes the header or payload being received still lacks; never 0."""
        if len(self._buffer) < HEADER.size:
            return HEADER.size - len(self._buffer)
        return HEADER.size + self._payload_size() - len(self._buffer)

    def receive(
        self, data: bytes, fds: Sequence[OwnedFd] = (), *, fds_lost: bool = False
    ) -> Message | None:
        """Take what one read returned; hand back a message once it is whole.

        Args:
            data: 1 to bytes_wanted() bytes. The kernel glues a message without descriptors to a
                following one with descriptors, so a greedy read misattributes them.
            fds: descriptors that came with them. Ours from here on: they leave in the returned
                Message or are closed. They count only with a message's first byte.
            fds_lost: the kernel could not hand over all of them (MSG_CTRUNC); the message they
                belong to is faulty.

        Raises:
            FrontendError: fatal; nothing after this point can be understood, and every later call
                raises too.
        """
        if self._failed:
            self._close(fds)
            raise self._fail("bytes after a protocol error")
        assert 0 < len(data) <= self.bytes_wanted(), "caller over-read"
        if self._buffer:
            self._close(fds)
        else:
            self._fds = list(fds)
            self._fds_lost = fds_lost
        header_was_whole = len(self._buffer) >= HEADER.size
        self._buffer += data
        if len(self._buffer) < HEADER.size:
            return None
        if not header_was_whole:
            self._check_header()
        if len(self._buffer) < HEADER.size + self._payload_size():
            return None
        return self._take_message()

    def end_of_stream(self) -> None:
        """Say that no byte will follow.

        Raises:
            FrontendError: fatal; a message was cut short.
        """
        if not self.at_boundary:
            raise self._fail(f"connection ended {self.bytes_wanted()} bytes before a message did")

    def close(self) -> None:
        """Close the descriptors of a message that is not whole."""
        self._close(self._fds)
        self._fds = []

    def _payload_size(self) -> int:
        _request, _flags, size = HEADER.unpack_from(self._buffer)
        return int(size)

    def _check_header(self) -> None:
        request, flags, size = HEADER.unpack_from(self._buffer)
        name = request_name(request)
        if flags & HeaderFlag.VERSION_MASK != HeaderFlag.VERSION:
            raise self._fail(f"{name}: protocol version {flags & HeaderFlag.VERSION_MASK}")
        if flags & HeaderFlag.REPLY:
            raise self._fail(f"{name}: a reply nobody asked for")
        if size > PAYLOAD_SIZE_MAX:
            raise self._fail(f"{name}: payload of {size} bytes")

    def _take_message(self) -> Message:
        request, flags, _size = HEADER.unpack_from(self._buffer)
        payload = self._buffer[HEADER.size :]
        fds, lost = self._fds, self._fds_lost
        self._buffer, self._fds, self._fds_lost = b"", [], False
        message = Message(request, flags, payload)
        rule = message.rule
        if rule is not None and rule.fds_max == 0:
            self._close(fds)
            fds, lost = [], False
        fault = _fault(rule, len(payload), len(fds), fds_lost=lost)
        if fault is not None:
            self._close(fds)
            return Message(request, flags, payload, fault=f"{message.name}: {fault}")
        return Message(request, flags, payload, tuple(fds))

    def _fail(self, text: str) -> FrontendError:
        self._failed = True
        self.close()
        return FrontendError(text, fatal=True)

    @staticmethod
    def _close(fds: Sequence[OwnedFd]) -> None:
        for fd in fds:
            fd.close()


def _fault(rule: Rule | None, size: int, fd_count: int, *, fds_lost: bool) -> str | None:
    if rule is None:
        return "no such message"
    if size not in rule.shape.SIZES:
        return f"payload of {size} bytes"
    if fds_lost:
        return "descriptors were lost on the way"
    if not rule.fds_min <= fd_count <= rule.fds_max:
        return f"{fd_count} descriptors, {rule.fds_min} to {rule.fds_max} are legal"
    return None
