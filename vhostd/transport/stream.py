"""A connected UNIX stream socket with descriptors, without blocking. Knows no message."""

from __future__ import annotations

import array
import errno
import fcntl
import mmap
import os
import select
import socket
import termios
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from struct import Struct
from typing import Final

import trio

from vhostd.errors import FrontendError, HostError
from vhostd.fds import OwnedFd
from vhostd.transport.foreign_fds import PENDING_MAX, Closer, ForeignFd

FDS_PER_READ_MAX: Final = 253
"""SCM_MAX_FD, include/net/scm.h: with room for these no descriptor is ever cut off by our size."""

_INT: Final = Struct("=i")
_UCRED: Final = Struct("=iII")  # struct ucred: pid, uid, gid
_FD_SIZE: Final = array.array("i").itemsize
_ANCILLARY_SIZE: Final = socket.CMSG_SPACE(FDS_PER_READ_MAX * _FD_SIZE)


def _nowhere() -> mmap.mmap:
    """Memory behind the end of its file: the kernel fails to write to it, we must not try."""
    fd = os.memfd_create("nowhere", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        found = mmap.mmap(fd, mmap.PAGESIZE)
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)
    return found


_NOWHERE: Final = _nowhere()


class Disconnected(Exception):
    """The peer hung up between two messages, or this end can no longer be used."""


@dataclass(frozen=True, slots=True)
class Read:
    """What one read gave.

    Attributes:
        data: the bytes; empty at the end of the stream.
        fds: the descriptors that came with them.
        fds_lost: the kernel could not hand over all of them, for want of free descriptors here.
    """

    data: bytes
    fds: tuple[OwnedFd, ...] = ()
    fds_lost: bool = False


class Arrivals:
    """Made by UnixStream.watch_arrivals()."""

    def __init__(self, watch: select.epoll) -> None:
        self._watch = watch

    def seen(self) -> None:
        """What has come so far is known; call it before looking."""
        self._watch.poll(0)

    async def wait(self) -> None:
        """Wait until more came since seen(), or the peer hung up."""
        await trio.lowlevel.wait_readable(self._watch.fileno())


class UnixStream:
    """Owns the socket and makes it non-blocking.

    Of a socket that a peer sent the peer can undo that at any time, so each call says it again.
    """

    def __init__(self, sock: socket.socket, closer: Closer | None = None) -> None:
        """closer: of the descriptors that come; None: one for this stream alone."""
        sock.setblocking(False)
        self._socket = sock
        self._closer = Closer() if closer is None else closer

    @classmethod
    def adopt(cls, fd: OwnedFd) -> UnixStream:
        """Take over a descriptor a peer sent.

        Raises:
            FrontendError: it is no connected UNIX stream socket. The descriptor is closed then.
        """
        try:
            sock = _checked_socket(fd)
        except FrontendError:
            fd.close()
            raise
        fd.take()
        return cls(sock)

    def fileno(self) -> int:
        """The socket's descriptor, borrowed; -1 once closed."""
        return self._socket.fileno()

    @property
    def named(self) -> bool:
        """One of its two ends has an address, so it is not from a socket pair."""
        return bool(self._socket.getsockname() or self._socket.getpeername())

    @property
    def peer_pid(self) -> int | None:
        """The process that connected (SO_PEERCRED, unix(7)); None if it can't be seen from here."""
        answer = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        return _UCRED.unpack(answer)[0] or None

    @property
    def closed(self) -> bool:
        """True once close() was called."""
        return self.fileno() < 0

    @property
    def hung_up(self) -> bool:
        """The peer has closed its end, or close() was called."""
        if self.closed:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    async def wait_hung_up(self) -> None:
        """Wait until the peer has closed its end, whatever lies unread.

        Raises:
            HostError: no descriptor or memory to watch it with.
        """
        try:
            watch = select.epoll()
        except OSError as error:
            raise HostError(error.errno, f"cannot watch a VMM: {error.strerror}") from error
        with watch:
            watch.register(self._socket, select.EPOLLRDHUP)
            await trio.lowlevel.wait_readable(watch.fileno())

    def hang_up(self) -> None:
        """Close the connection, whoever else has a descriptor of it: a service manager, maybe."""
        if not self.closed:
            with suppress(OSError):  # the peer has gone already
                self._socket.shutdown(socket.SHUT_RDWR)
        self.close()

    def detach(self) -> OwnedFd:
        """Give the descriptor away, unchanged; closed on this side."""
        if trio.lowlevel.in_trio_run():  # else nobody can wait for it
            trio.lowlevel.notify_closing(self._socket)
        return OwnedFd(self._socket.detach())

    def close(self) -> None:
        """Close our descriptor; tasks that wait for the socket get trio.ClosedResourceError."""
        if not self.closed:
            if trio.lowlevel.in_trio_run():  # else nobody can wait for it
                trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    def try_read(self, size: int) -> Read | None:
        """Read at most size bytes; None when there is nothing right now.

        Raises:
            Disconnected: the connection was reset, or close() was called.
            FrontendError: what came before can't be closed.
            HostError: no memory for it; nothing was lost.
        """
        return self._receive(size, 0, _ANCILLARY_SIZE)

    def try_read_bytes(self, size: int) -> bytes | None:
        """As try_read(), where no descriptors are due: the kernel drops those that come."""
        read = self._receive(size, 0, 0)
        return None if read is None else read.data

    def peek(self, size: int) -> Read | None:
        """As try_read(), but all stays where it is; descriptors are duplicates.

        It ends with what the first descriptors came with, even where that leaves room.
        """
        return self._receive(size, socket.MSG_PEEK, _ANCILLARY_SIZE)

    def came_at_once(self, size: int) -> bool:
        """Whether the next `size` bytes, which must be there, are of one send by the peer.

        Descriptors are with the first bytes of what was sent with them, but a look goes on over
        what came without any until it finds some, and does not say where. Source:
        unix_stream_read_generic(), net/unix/af_unix.c.

        Raises:
            HostError: no memory for it.
        """
        # What was sent at once is copied at once or not at all: so where the copy fails at the last
        # byte, which is not to be written to, the ones before are lost exactly then.
        room: list[bytearray | memoryview] = [bytearray(size - 1), memoryview(_NOWHERE)[:1]]
        try:
            self._socket.recvmsg_into(room, 0, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise HostError(error.errno, f"cannot receive: {error.strerror}") from error
            return True
        return False

    def _receive(self, size: int, flags: int, ancillary_size: int) -> Read | None:
        if self.closed:
            raise Disconnected("closed on this side")
        if self._closer.overrun:
            raise FrontendError(
                f"more than {PENDING_MAX} descriptors that the VMM sent can't be closed: the file"
                " system of one does not answer"
            )
        flags |= socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        try:
            data, ancillary, seen, _ = self._socket.recvmsg(size, ancillary_size, flags)
        except BlockingIOError:
            return None
        except ConnectionError as error:
            raise Disconnected(f"connection lost: {error.strerror}") from error
        except OSError as error:
            raise HostError(error.errno, f"cannot receive: {error.strerror}") from error
        fds = tuple(ForeignFd(fd, self._closer) for fd in _received_fds(ancillary))
        return Read(data, fds, bool(seen & socket.MSG_CTRUNC))

    @property
    def unread_size(self) -> int:
        """Bytes that are there to be read. Source: FIONREAD, unix(7)."""
        return int(_INT.unpack(fcntl.ioctl(self._socket, termios.FIONREAD, bytes(_INT.size)))[0])

    @contextmanager
    def watch_arrivals(self) -> Iterator[Arrivals]:
        """Tell of bytes that come, while others are left unread."""
        with select.epoll() as watch:
            watch.register(self._socket, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
            yield Arrivals(watch)

    @property
    def unread(self) -> bool:
        """The peer has not read all that was sent. The kernel announces no change of this.

        Raises:
            Disconnected: close() was called.
        """
        if self.closed:
            raise Disconnected("closed on this side")
        # SIOCOUTQ of unix(7) sockets: what waits in the peer's queue; the tty's name for it.
        answer = fcntl.ioctl(self._socket, termios.TIOCOUTQ, bytes(_INT.size))
        return bool(_INT.unpack(answer)[0])

    def send_now(self, data: bytes, fds: Sequence[OwnedFd] = ()) -> bool:
        """Send all of a few bytes at once, without a moment in between; False: no room for them.

        Raises:
            Disconnected: the peer is gone, or close() was called.
            HostError: the descriptors cannot be passed, or there is no memory.
        """
        if self.closed:
            raise Disconnected("closed on this side")
        try:
            flags = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT
            sent = self._socket.sendmsg([data], _sent_fds(fds), flags)
        except BlockingIOError:
            return False
        except ConnectionError as error:
            raise Disconnected(f"connection lost: {error.strerror}") from error
        except OSError as error:
            raise HostError(error.errno, f"cannot send: {error.strerror}") from error
        # A UNIX stream socket cuts a message only where it exceeds a buffer of many KiB.
        assert sent == len(data), "a short message was cut"
        return True

    def send_from(self, fd: int, size: int) -> int:
        """Send bytes of a file from its position on, which moves with them; how many, 0: no room.

        Raises:
            Disconnected: the peer is gone.
            HostError: they cannot be sent.
        """
        if self.closed:
            raise Disconnected("closed on this side")
        try:
            self._socket.setblocking(False)  # sendfile(2) has no flag that says so
            return os.sendfile(self.fileno(), fd, None, size)
        except BlockingIOError:
            return 0
        except ConnectionError as error:
            raise Disconnected(f"connection lost: {error.strerror}") from error
        except OSError as error:
            raise HostError(error.errno, f"cannot send: {error.strerror}") from error

    async def wait_writable(self) -> None:
        """Wait until send_now() may have room."""
        await trio.lowlevel.wait_writable(self._socket)

    async def wait_readable(self) -> None:
        """Wait until try_read() has something to say, the end of the stream included."""
        await trio.lowlevel.wait_readable(self._socket)


def _checked_socket(fd: OwnedFd) -> socket.socket:
    """The same descriptor as a socket; who closes it is left open.

    Raises:
        FrontendError: it is no connected UNIX stream socket.
    """
    try:
        sock = socket.socket(fileno=fd.fileno())
    except OSError as error:
        raise FrontendError(f"descriptor is no socket: {error.strerror}") from error
    try:
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise FrontendError("socket is no UNIX stream socket")
        sock.getpeername()
    except OSError as error:
        sock.detach()
        raise FrontendError(f"socket is not connected: {error.strerror}") from error
    except FrontendError:
        sock.detach()
        raise
    return sock


def _received_fds(ancillary: Sequence[tuple[int, int, bytes]]) -> array.array[int]:
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % _FD_SIZE])
    return fds


def _sent_fds(fds: Sequence[OwnedFd]) -> list[tuple[int, int, array.array[int]]]:
    if not fds:
        return []
    numbers = array.array("i", [fd.fileno() for fd in fds])
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)]
