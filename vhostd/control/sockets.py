"""The control sockets in the file system: made with the right mode, taken over from the dead only.

Knows paths and locks; must not know what is served on them.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from vhostd.errors import ConfigError, HostError
from vhostd.fds import OwnedFd

BACKLOG: Final = 128


class RuntimeDirLock:
    """Held by the one daemon of a runtime directory, and freed by the kernel when it dies.

    The lock file stays behind: removing it would let two daemons lock two files of one name.

    Raises:
        ConfigError: another daemon holds it.
        HostError: the directory or the file can't be made.
    """

    def __init__(self, runtime_dir: Path) -> None:
        path = runtime_dir / "control.lock"
        try:
            runtime_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = OwnedFd(os.open(path, flags, 0o600))
        except OSError as error:
            raise HostError(f"{path}: {error.strerror}") from error
        try:
            fcntl.flock(self._fd.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._fd.close()
            raise ConfigError(
                f"{runtime_dir}: another vhostd serves this runtime directory"
            ) from error

    def close(self) -> None:
        """Let another daemon in."""
        self._fd.close()


class ListeningSocket:
    """A listening UNIX socket and its name, which goes when this is closed.

    Attributes:
        socket: non-blocking and listening; whoever serves it may close it.

    Raises:
        ConfigError: the name is taken, by a live server or by something that is no socket.
        HostError: the host refuses.
    """

    def __init__(self, path: Path, mode: int) -> None:
        self._path = path
        _remove_stale(path)
        self.socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )
        try:
            self.socket.bind(os.fspath(path))
            # Nobody can connect before listen(), so the mode is right from the first moment.
            path.chmod(mode)
            self.socket.listen(BACKLOG)
            self._identity = _identity(path)
        except OSError as error:
            self.socket.close()
            raise HostError(f"{path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Remove the name, unless somebody put something else there meanwhile."""
        self.socket.close()
        if _identity(self._path) == self._identity:
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _remove_stale(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}") from error
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"{path}: is in the way and no socket; remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass  # its backlog is full: somebody lives there
        except OSError as error:
            raise HostError(f"{path}: {error.strerror}") from error
    raise ConfigError(f"{path}: a live server listens there")
