"""Descriptors that a peer sent, of whatever file, closed where nobody waits for it.

close(2) asks the file system of the file (f_op->flush, fs/open.c), and may wait for the last data
of a socket (SO_LINGER, socket(7)). A file system that a VMM runs itself (FUSE) may never answer,
and who waits for it can't be killed. Must not know what the descriptors are for.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections import deque
from contextlib import suppress
from typing import Final

from vhostd.fds import OwnedFd

PENDING_MAX: Final = 64
"""Descriptors of one peer that wait to be closed; one with more is not listened to any more."""

_AT_ONCE: Final = ("anon_inode:[eventfd]", "pipe:[")
"""What /proc/self/fd has of files whose close asks nobody; memory is known by its seals."""


class Closer:
    """Closes what comes from one peer, in one thread, which lives as long as there is something.

    Storage that hangs costs its own peer the rest of this queue, and no other peer anything.
    """

    def __init__(self) -> None:
        """Nothing to do yet."""
        # Reentrant: a descriptor that the garbage collector finds comes at any moment.
        self._lock = threading.RLock()
        self._queue: deque[int] = deque()
        self._running = False

    @property
    def overrun(self) -> bool:
        """More wait than may: the file system of one of them does not answer."""
        return len(self._queue) > PENDING_MAX

    def close(self, fd: int) -> None:
        """Close a descriptor, now or later; ours no more."""
        if _closes_at_once(fd):
            os.close(fd)
            return
        self._queue.append(fd)
        with self._lock:
            if self._running:
                return
            self._running = True
            # A daemon thread: our own end must not wait for it.
            thread = threading.Thread(target=self._work, name="vhostd-close", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread to be had: the next descriptor tries again
                self._running = False

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._running = False
                    return
                fd = self._queue.popleft()
            with suppress(OSError):  # of what its sender wrote to it; it is closed all the same
                os.close(fd)


class ForeignFd(OwnedFd):
    """One that a peer sent."""

    __slots__ = ("_closer",)

    def __init__(self, fd: int, closer: Closer) -> None:
        super().__init__(fd)
        self._closer = closer

    def close(self) -> None:
        """Have it closed; a second call does nothing."""
        if not self.closed:
            self._closer.close(self.take())


def _closes_at_once(fd: int) -> bool:
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)  # only shmem and hugetlbfs have them
        return True
    link = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - a link to no path
    return link.startswith(_AT_ONCE)
