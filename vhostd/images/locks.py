"""The byte-range locks by which QEMU, qemu-img and vhostd see that an image is in use.

Source: QEMU's block/file-posix.c and its locking documentation: byte 100+n is locked by who uses
permission n, byte 200+n by who lets nobody else use it; open file description locks, all shared,
so that they belong to the open file and not to a process.
"""

from __future__ import annotations

import errno
import fcntl
import os
from enum import IntEnum
from struct import Struct
from typing import Final

_USED_BASE: Final = 100
_UNSHARED_BASE: Final = 200
_FLOCK: Final = Struct("=hhxxxxqqixxxx")
"""struct flock: type, whence, start, length, pid (of 64 bit machines)."""

_NOT_SUPPORTED: Final = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Permission(IntEnum):
    """QEMU's BLK_PERM_ bits, by their number."""

    CONSISTENT_READ = 0
    WRITE = 1
    RESIZE = 3


class ImageInUse(Exception):
    """Another open file has it in a way that does not go together with ours; says which."""


class LocksNotSupported(Exception):
    """The file system has no such locks."""


def lock_image(fd: int, *, writable: bool) -> None:
    """Lock an image for as long as the open file lives; nobody else may write or resize it.

    Raises:
        ImageInUse: somebody does, or (writable) forbids it.
        LocksNotSupported: the file system can't do it; nothing is locked.
    """
    used = {Permission.CONSISTENT_READ} | ({Permission.WRITE} if writable else set())
    unshared = {Permission.WRITE, Permission.RESIZE}
    for permission in used:
        _take(fd, _USED_BASE + permission)
    for permission in unshared:
        _take(fd, _UNSHARED_BASE + permission)
    # Only then look at the others: of two that do this at once, one at least sees the other.
    for permission in used:
        if _taken_by_other(fd, _UNSHARED_BASE + permission):
            raise ImageInUse(f"another program does not let it be used ({permission.name.lower()})")
    for permission in unshared:
        if _taken_by_other(fd, _USED_BASE + permission):
            verb = "writes" if permission is Permission.WRITE else "resizes"
            raise ImageInUse(f"another program {verb} it")


def _take(fd: int, byte: int) -> None:
    request = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, request)
    except BlockingIOError as error:
        raise ImageInUse("another program has it for itself") from error
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        raise LocksNotSupported(os.strerror(error.errno)) from error


def _taken_by_other(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK
