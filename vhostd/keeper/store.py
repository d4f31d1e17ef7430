"""The fd store: what a service wants its successor to have. Knows no protocol and no process.

Promise: as systemd's (https://systemd.io/FILE_DESCRIPTOR_STORE/), except that the order is kept.
"""

from __future__ import annotations

import resource
import select
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from vhostd.fds import OwnedFd
from vhostd.keeper.same_file import OpenFiles
from vhostd.keeper.speech import say
from vhostd.systemd import FDS_PER_MESSAGE_MAX

STORE_MAX: Final = 16384
"""Descriptors by default; a VM needs about 40."""

RESERVED_FDS: Final = FDS_PER_MESSAGE_MAX + 32
"""Left free beside the store: one message's descriptors and the keeper's own few."""

NAMES_LENGTH_MAX: Final = 131072 - len("LISTEN_FDNAMES=") - 1
"""MAX_ARG_STRLEN, execve(2): a longer LISTEN_FDNAMES, and no successor could be started at all."""


class StoreFull(Exception):
    """There is no room for one more; the text says which room."""


class AlreadyStored(Exception):
    """The same open file is in the store.

    Attributes:
        name: the name it has there.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"stored already as {name}")
        self.name = name


def raise_fd_limit() -> int:
    """Allow this process, and what it starts, as many descriptors as it may have; that number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


class FdStore:
    """Descriptors by name, in the order they came.

    fileno() is readable when drop_hung_up() has something to do.
    """

    def __init__(self, count_max: int = STORE_MAX) -> None:
        self._count_max = count_max
        self._stored: dict[int, tuple[str, OwnedFd]] = {}  # by number; a dict keeps the order
        self._names_length = 0
        self._files = OpenFiles()
        # Not the caller's selector: that refuses to watch for nothing but hang-ups.
        self._hang_ups = select.epoll()
        self._polled: set[int] = set()

    def __len__(self) -> int:
        return len(self._stored)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Each name and its descriptor, which stays the store's."""
        return ((name, fd.fileno()) for name, fd in self._stored.values())

    def fileno(self) -> int:
        """Readable when a stored descriptor hung up."""
        return self._hang_ups.fileno()

    def add(self, name: str, fd: OwnedFd, *, poll: bool = True) -> None:
        """Keep a descriptor; it is closed if we raise.

        Args:
            name: as systemd.is_fd_name wants it.
            poll: drop it when it reports POLLHUP or POLLERR (FDPOLL of sd_notify(3)).

        Raises:
            AlreadyStored: it is a duplicate of one we have, whatever that one's name. systemd
                keeps the first only, so we do: what works here must work there.
            StoreFull: there are count_max, or a successor's LISTEN_FDNAMES would be too long.
        """
        number = fd.fileno()
        if len(self._stored) >= self._count_max:
            fd.close()
            raise StoreFull(f"{self._count_max} descriptors")
        if self._names_length + len(name) + 1 > NAMES_LENGTH_MAX:
            fd.close()
            raise StoreFull(f"{NAMES_LENGTH_MAX} bytes of names")
        duplicate = self._files.duplicate_of(number)
        if duplicate is not None:
            fd.close()
            raise AlreadyStored(self._stored[duplicate][0])
        self._stored[number] = (name, fd)
        self._names_length += len(name) + 1
        if poll:
            with suppress(PermissionError):  # epoll_ctl(2): a file that cannot hang up
                self._hang_ups.register(number, 0)  # EPOLLHUP and EPOLLERR are reported unasked
                self._polled.add(number)

    def remove(self, name: str) -> int:
        """Close every descriptor of that name; how many there were."""
        numbers = [number for number, (stored, _) in self._stored.items() if stored == name]
        for number in numbers:
            self._drop(number)
        return len(numbers)

    def drop_hung_up(self) -> list[str]:
        """Close what hung up since; their names."""
        return [self._drop(number) for number, _ in self._hang_ups.poll(0)]

    def _drop(self, number: int) -> str:
        name, fd = self._stored.pop(number)
        self._names_length -= len(name) + 1
        self._files.discard(number)
        if number in self._polled:
            # close() alone would not do: epoll watches the open file, which others hold as well.
            self._polled.remove(number)
            self._hang_ups.unregister(number)
        fd.close()
        return name

    def close(self) -> None:
        """Close all of them."""
        for number in list(self._stored):
            self._drop(number)
        self._hang_ups.close()


def room_for(store_max: int) -> int:
    """Of the store, with as many open files as we may have."""
    room = raise_fd_limit() - RESERVED_FDS
    if room < store_max:
        say(f"storing {room} descriptors at most, not {store_max}: the limit of open files")
    return min(room, store_max)
