"""Eventfds as both sides of a ring use them. Knows nothing else."""

from __future__ import annotations

import os
import select


def new_eventfd(initial: int = 0) -> int:
    """Return a non-blocking eventfd, as a VMM hands them out."""
    return os.eventfd(initial, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def wait_readable(fd: int, timeout_s: float) -> bool:
    """Wait until fd is readable; return False when it is not by then."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


def drain(fd: int) -> int:
    """Read a non-blocking eventfd to zero and return what it held."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0
