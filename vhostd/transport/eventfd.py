"""Is a descriptor one that a kick, call or err can be? Must not know rings."""

from __future__ import annotations

import os
import socket
from typing import Final

from vhostd.errors import FrontendError
from vhostd.fds import OwnedFd

_EVENTFD_LINK: Final = "anon_inode:[eventfd]"
"""What /proc/PID/fd/N points to, fs/eventfd.c."""


def is_eventfd_link(target: str) -> bool:
    """Whether a /proc/PID/fd link is that of an eventfd."""
    return target == _EVENTFD_LINK


def check_eventfd(fd: OwnedFd, what: str) -> None:
    """Make sure fd is an eventfd.

    Whether it blocks is not changed: that is a property the VMM's end shares, and it may rely on
    reading its call eventfd blockingly. The native worker never needs it.

    Args:
        fd: stays the caller's.
        what: for the error, "kick".

    Raises:
        FrontendError: it is something else.
    """
    target = os.readlink(f"/proc/self/fd/{fd.fileno()}")  # noqa: PTH115 - a link to no path
    if not is_eventfd_link(target):
        raise FrontendError(f"{what} is no eventfd but {target}")


def check_call(fd: OwnedFd, what: str) -> None:
    """Make sure fd is an eventfd or an end of a UNIX socket pair, to which 8 bytes can be written.

    Linux' virtio_uml has a socket pair, because an eventfd raises no SIGIO. A connection to a
    socket with a name is refused: it can be the VMM's end of its own connection to us. We would
    keep that end open, and its hang-up would never be seen.

    Args:
        fd: stays the caller's.
        what: for the error, "call".

    Raises:
        FrontendError: it is something else.
    """
    try:
        found = socket.socket(fileno=fd.fileno())
    except OSError:
        check_eventfd(fd, what)
        return
    try:
        if (found.family, found.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            raise FrontendError(f"{what} is a socket, and no UNIX stream socket")
        if _has_name(found):
            raise FrontendError(f"{what} is a connection to a named socket, and no socket pair")
    finally:
        found.detach()


def _has_name(found: socket.socket) -> bool:
    try:
        return bool(found.getsockname() or found.getpeername())
    except OSError:  # ENOTCONN: the other end is gone, or never was
        return False
