"""The socket a service speaks to: datagrams to notifications. Must not know what they lead to.

Promise: only the service itself is heard (NotifyAccess=main), a message is taken whole or not at
all, and no descriptor that came with a refused one stays open.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from pathlib import Path
from typing import Final, Self

from vhostd.errors import HostError
from vhostd.fds import OwnedFd
from vhostd.systemd import FDS_PER_MESSAGE_MAX

MESSAGE_SIZE_MAX: Final = 4096
"""NOTIFY_BUFFER_MAX of systemd."""

_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid; unix(7)
_ANCILLARY_SIZE: Final = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(
    FDS_PER_MESSAGE_MAX * array.array("i").itemsize
)


class Refused(Exception):
    """A message that is dropped; the text is one of a few, for a rate limit to tell apart."""


class Notification:
    """One message of the service.

    Attributes:
        assignments: the first value of each key, as systemd reads them.
        fds: what came along; whoever takes one out owns it.
    """

    __slots__ = ("assignments", "fds")

    def __init__(self, assignments: dict[str, str], fds: list[OwnedFd]) -> None:
        self.assignments = assignments
        self.fds = fds

    def says(self, key: str, value: str = "1") -> bool:
        """Whether it has this assignment."""
        return self.assignments.get(key) == value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Close what nobody took."""
        for fd in self.fds:
            fd.close()


class NotifySocket:
    """A datagram socket in a directory of its own that only our user may enter."""

    def __init__(self, parent: Path) -> None:
        """Make it below `parent`.

        Raises:
            HostError: the host does not let us.
        """
        # mkdir() never takes what is there already: nobody can have laid it out for us. (tempfile
        # does no more, and costs as much to import as all the rest of the keeper.)
        self._directory = parent / f"vhostd-keeper-{os.urandom(8).hex()}"
        self.path = self._directory / "notify"
        self._socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )
        try:
            self._directory.mkdir(mode=0o700)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._socket.bind(str(self.path))
        except OSError as error:
            self.close()
            raise HostError(f"{self.path}: cannot be made: {error.strerror or error}") from error

    def fileno(self) -> int:
        """Readable when there is something to receive()."""
        return self._socket.fileno()

    def close(self) -> None:
        """Take it off the file system."""
        self._socket.close()
        self.path.unlink(missing_ok=True)
        if self._directory.is_dir():
            self._directory.rmdir()

    def receive(self, sender: int | None) -> Notification:
        """Take one message off the queue.

        Args:
            sender: the process that is listened to; None: nobody is.

        Raises:
            BlockingIOError: there is none.
            Refused: there was one, but not from `sender`, or not a proper one; it is gone.
        """
        data, ancillary, flags, _ = self._socket.recvmsg(
            MESSAGE_SIZE_MAX, _ANCILLARY_SIZE, socket.MSG_CMSG_CLOEXEC
        )
        pid, fds = _taken(ancillary)
        # Where we raise, the descriptors close themselves: nobody holds them any more.
        if sender is None or pid != sender:
            raise Refused("refused a message from another process")
        if flags & socket.MSG_TRUNC:
            raise Refused("refused a message that is too long")
        if flags & socket.MSG_CTRUNC:
            raise Refused("refused a message whose descriptors were lost on the way")
        return Notification(_parsed(data), fds)


def _taken(ancillary: list[tuple[int, int, bytes]]) -> tuple[int, list[OwnedFd]]:
    pid, fds = 0, []
    for level, kind, data in ancillary:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            fds += [OwnedFd(number) for number in numbers]
        elif kind == socket.SCM_CREDENTIALS and len(data) == _CREDENTIALS.size:
            pid = _CREDENTIALS.unpack(data)[0]
    return pid, fds


def _parsed(data: bytes) -> dict[str, str]:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise Refused("refused a message that is no UTF-8") from None
    assignments: dict[str, str] = {}
    for line in text.split("\n"):
        key, equals, value = line.partition("=")
        if line and not (equals and key):
            raise Refused("refused a message with a line that assigns nothing")
        if "\0" in line:
            raise Refused("refused a message with a NUL in it")
        if line:
            assignments.setdefault(key, value)
    if not assignments:
        raise Refused("refused an empty message")
    return assignments
