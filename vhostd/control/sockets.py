"""The control sockets in the file system: made with the right mode, taken over from the dead only.

Knows paths and locks; must not know what is served on them.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from pathlib import Path
from struct import Struct
from types import TracebackType
from typing import Final, Self

from vhostd.errors import ConfigError, HostError
from vhostd.fds import OwnedFd

BACKLOG: Final = 128

_LOCK_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_UCRED: Final = Struct("=iII")  # struct ucred: pid, uid, gid; of who called listen(2)


class RuntimeDirLock:
    """Held by the one daemon of a runtime directory, and freed by the kernel when it dies.

    The lock file stays behind: removing it would let two daemons lock two files of one name. It is
    replaced only where its holder was killed while a thread of it waits in the kernel, maybe for
    ever: that daemon does nothing any more, but holds the lock.

    Raises:
        ConfigError: another daemon holds it.
        HostError: the directory or the file can't be made.
    """

    def __init__(self, runtime_dir: Path) -> None:
        path = runtime_dir / "control.lock"
        try:
            runtime_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._fd = OwnedFd(os.open(path, _LOCK_FLAGS, 0o600))
            if not _lock(self._fd):
                if not _is_killed(_holder(self._fd)):
                    raise ConfigError(
                        f"{runtime_dir}: another vhostd (PID {_holder(self._fd)}) serves this"
                        " runtime directory; end it when its VMs have ended, or choose another one"
                    )
                path.unlink()
                self._fd.close()
                self._fd = OwnedFd(os.open(path, _LOCK_FLAGS | os.O_EXCL, 0o600))
                if not _lock(self._fd):
                    raise ConfigError(f"{runtime_dir}: another vhostd has just been started there")
            os.ftruncate(self._fd.fileno(), 0)
            os.pwrite(self._fd.fileno(), str(os.getpid()).encode(), 0)
        except OSError as error:
            raise HostError(f"{path}: {error.strerror}") from error

    def close(self) -> None:
        """Let another daemon in."""
        self._fd.close()


def _lock(fd: OwnedFd) -> bool:
    try:
        fcntl.flock(fd.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(fd: OwnedFd) -> int | None:
    content = os.pread(fd.fileno(), 20, 0)
    return int(content) if content.isdigit() else None


def _is_killed(pid: int | None) -> bool:
    """Its main thread has ended, and another one waits in the kernel: proc_pid_stat(5)."""
    try:
        stat_line = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return pid is not None and stat_line.rpartition(") ")[2].startswith("Z")


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
        else:
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            if _is_killed(_UCRED.unpack(credentials)[0]):
                path.unlink(missing_ok=True)
                return
    raise ConfigError(f"{path}: a live server listens there")
