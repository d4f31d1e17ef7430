"""One vhost-user socket, blocking, with a time limit on every wait.

Carries headers, payloads and descriptors in both directions and nothing else: it knows no message
by name and checks nothing a front end would be wrong to send.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tests.fakes.messages import HEADER_SIZE, Flags, header, unpack_header

FDS_PER_MESSAGE_MAX = 253  # SCM_MAX_FD
PAYLOAD_SIZE_MAX = 1 << 16  # nothing legal is larger; a bigger answer is a broken back end


class ConnectionLost(Exception):
    """The peer closed the connection."""


@dataclass(frozen=True, slots=True)
class Message:
    """One whole message as it came; the receiver owns fds."""

    request: int
    flags: int
    payload: bytes
    fds: tuple[int, ...] = ()

    def close_fds(self) -> None:
        """Close every descriptor that came along."""
        for fd in self.fds:
            os.close(fd)


class Channel:
    """A connected UNIX stream socket that speaks headers and payloads."""

    def __init__(self, sock: socket.socket, timeout_s: float = 10.0) -> None:
        """Take ownership of sock; timeout_s limits every single send and receive."""
        self._sock = sock
        self.timeout_s = timeout_s
        sock.settimeout(timeout_s)

    def __enter__(self) -> Self:
        """Return the channel itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the socket."""
        self.close()

    def close(self) -> None:
        """Close the socket; twice is fine."""
        self._sock.close()

    def fileno(self) -> int:
        """Return the socket's descriptor, -1 when closed."""
        return self._sock.fileno()

    def shutdown_writes(self) -> None:
        """Send end of file and keep reading."""
        self._sock.shutdown(socket.SHUT_WR)

    def raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are; fds ride with the first of them.

        Raises:
            ConnectionLost: the peer is gone.
            TimeoutError: the peer did not read.
        """
        try:
            sent = socket.send_fds(self._sock, [data], list(fds)) if fds else 0
            if sent < len(data):
                self._sock.sendall(data[sent:])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ConnectionLost(str(error)) from error

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        flags: int = Flags.VERSION,
        size: int | None = None,
    ) -> None:
        """Send one message in one write; size overrides what the header claims."""
        stated = len(payload) if size is None else size
        self.raw(header(request, flags, stated) + payload, fds)

    def receive(self, timeout_s: float | None = None) -> Message:
        """Read one whole message; timeout_s overrides the channel's own limit.

        Raises:
            ConnectionLost: end of file, or a reset.
            TimeoutError: nothing came in time.
            AssertionError: the peer sent a header no back end may send.
        """
        self._sock.settimeout(self.timeout_s if timeout_s is None else timeout_s)
        data, fds = self._read(HEADER_SIZE, want_fds=True)
        request, flags, size = unpack_header(data)
        assert size <= PAYLOAD_SIZE_MAX, f"the back end announced {size} bytes"
        payload = self._read(size, want_fds=False)[0] if size else b""
        return Message(request, flags, payload, fds)

    def wait_closed(self, timeout_s: float | None = None) -> bool:
        """Wait for the peer to close; return False when it has not by then.

        Answers that are still on their way are read and thrown away.
        """
        self._sock.settimeout(self.timeout_s if timeout_s is None else timeout_s)
        try:
            while self._sock.recv(PAYLOAD_SIZE_MAX):
                continue
        except TimeoutError:
            return False
        except ConnectionResetError:
            return True
        finally:
            self._sock.settimeout(self.timeout_s)
        return True

    def silent(self, timeout_s: float) -> bool:
        """Return True when the peer neither sent a byte nor closed within timeout_s."""
        self._sock.settimeout(timeout_s)
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        except ConnectionResetError:
            return False
        finally:
            self._sock.settimeout(self.timeout_s)
        return False

    def _read(self, size: int, *, want_fds: bool) -> tuple[bytes, tuple[int, ...]]:
        """Read exactly size bytes, and the descriptors that ride with the first of them."""
        data = b""
        fds: list[int] = []
        space = socket.CMSG_SPACE(FDS_PER_MESSAGE_MAX * array.array("i").itemsize)
        while len(data) < size:
            try:
                part, ancillary, _flags, _addr = self._sock.recvmsg(
                    size - len(data), space if want_fds else 0, socket.MSG_CMSG_CLOEXEC
                )
            except ConnectionResetError as error:
                raise ConnectionLost(str(error)) from error
            for level, kind, body in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds += struct.unpack(f"={len(body) // 4}i", body)
            if not part:
                raise ConnectionLost(f"end of file after {len(data)} of {size} bytes")
            data += part
        return data, tuple(fds)
