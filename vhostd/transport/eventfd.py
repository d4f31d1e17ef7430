"""Is a descriptor an eventfd, as every kick, call and err must be? Must not know rings."""

from __future__ import annotations

import os
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
