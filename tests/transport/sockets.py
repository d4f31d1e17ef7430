"""Socket pairs and a count of open descriptors. Knows no message."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from vhostd.transport.connection import Connection


def open_fds() -> int:
    """Descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counts, and paths are no use here


def link(fd: int) -> str:
    """What a descriptor is, as /proc tells it."""
    return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - a link to no path


@contextmanager
def no_leak() -> Iterator[None]:
    """Insist that as many descriptors are open afterwards as before."""
    gc.collect()
    before = open_fds()
    yield
    assert open_fds() == before


@contextmanager
def connected() -> Iterator[tuple[Connection, socket.socket]]:
    """A connection and the VMM's end of it."""
    ours, theirs = socket.socketpair()
    connection = Connection(ours)
    with theirs:
        yield connection, theirs
    connection.close()


def send_fds(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    """Send in one write and close our copies."""
    socket.send_fds(sock, [data], fds)
    for fd in fds:
        os.close(fd)
