"""Where VMMs connect: a socket at a path, or one that was handed to us.

Knows paths, modes and stale sockets. Must not know how many connections a device bears.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

import trio

from vhostd.errors import ConfigError
from vhostd.fds import OwnedFd
from vhostd.transport.connection import Connection
from vhostd.transport.foreign_fds import Closer

SOCKET_MODE: Final = 0o660
"""The VMM's user reaches us through the group; nobody else does."""

_BACKLOG: Final = 16

_PASSING: Final = frozenset({errno.ECONNABORTED, errno.EINTR, errno.EPROTO})
"""accept(2): the connection was gone before we took it."""

_SHORT_OF: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""accept(2): nothing free right now."""

_RETRY_S: Final = 0.1  # how soon to look whether something became free again


class Listener:
    """Owns a listening socket."""

    def __init__(self, sock: socket.socket, path: Path | None = None) -> None:
        """Take over a listening socket. path: remove it at the end, if it is still ours."""
        sock.setblocking(False)
        self._socket = sock
        self._closer = Closer()  # outlives connections, as a file system that hangs does
        self._path = path
        self._identity = _identity(path) if path is not None else None

    @classmethod
    def bind(cls, path: Path, mode: int = SOCKET_MODE) -> Self:
        """Listen at path; a socket nobody serves any more is replaced.

        Raises:
            ConfigError: something else is at path, another process serves it, or the socket
                cannot be made.
        """
        _remove_stale(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.bind(os.fspath(path))
            # Nobody can connect before listen(), so nobody sees the mode umask gave it.
            path.chmod(mode)
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            raise ConfigError(f"{path}: cannot listen: {error.strerror or error}") from error
        return cls(sock, path)

    def fileno(self) -> int:
        """The socket's descriptor, borrowed; -1 once closed."""
        return self._socket.fileno()

    async def accept(self) -> Connection:
        """Wait for the next VMM.

        Without a free descriptor it goes on waiting: the VMM waits too, in the backlog.

        Raises:
            trio.ClosedResourceError: close() was called.
        """
        while True:
            if self._socket.fileno() < 0:
                raise trio.ClosedResourceError
            await trio.lowlevel.wait_readable(self._socket)
            try:
                sock, _address = self._socket.accept()
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno in _SHORT_OF:
                    # The socket stays readable meanwhile, and no event tells when one is free.
                    await trio.sleep(_RETRY_S)
                elif error.errno not in _PASSING:
                    raise
                continue
            return Connection(sock, self._closer)

    def close(self) -> None:
        """Stop listening and remove the path, unless it is somebody else's by now."""
        if self._socket.fileno() < 0:
            return
        if trio.lowlevel.in_trio_run():  # else nobody can wait for it
            trio.lowlevel.notify_closing(self._socket)
        self._socket.close()
        if self._path is not None and _identity(self._path) == self._identity:
            self._path.unlink()

    @classmethod
    def adopt(cls, fd: OwnedFd, path: Path) -> Self | None:
        """Go on with a predecessor's socket; None if it listens elsewhere, and is closed."""
        sock = socket.socket(fileno=fd.take())
        if sock.getsockname() != os.fspath(path) or not path.is_socket():
            sock.close()
            return None
        return cls(sock, path)

    @staticmethod
    def discard(fd: OwnedFd) -> None:
        """Close a predecessor's socket, and remove its path: nobody serves it."""
        with socket.socket(fileno=fd.take()) as sock:
            path = Path(sock.getsockname())
            with suppress(OSError):  # then it is there, and refuses whoever comes
                if path.is_socket():
                    path.unlink()


def from_passed_fd(fd: int) -> Listener | Connection:
    """Take over a socket that was passed by number (--fd, LISTEN_FDS): listening or connected.

    Raises:
        ConfigError: it is no UNIX stream socket.
    """
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(f"fd {fd}: is no socket: {error.strerror}") from error
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise ConfigError(f"fd {fd}: is no UNIX stream socket")
    os.set_inheritable(fd, False)
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return Listener(sock)
    return Connection(sock)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def _remove_stale(path: Path) -> None:
    """Make room for bind().

    Raises:
        ConfigError: path is in use, or is no socket.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if not stat.S_ISSOCK(status.st_mode):
        raise ConfigError(f"{path}: exists and is no socket; name another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # its backlog is full, so somebody listens
        except OSError as error:
            raise ConfigError(f"{path}: cannot be probed: {error.strerror or error}") from error
    raise ConfigError(f"{path}: another process serves this socket; stop it or name another path")
