"""Connections that nobody serves, watched for their ends. What lies in them stays where it is."""

from __future__ import annotations

import select
from collections.abc import Iterable

import trio

from vhostd.fds import OwnedFd


class HangUps:
    """Owns the connections. Each is closed, on our side only, once its peer has hung up.

    Raises:
        OSError: no descriptor or memory to watch them with.
    """

    def __init__(self, connections: Iterable[OwnedFd]) -> None:
        self._connections = {connection.fileno(): connection for connection in connections}
        # Not for reading: a peer that waits for an answer has sent something, and lives.
        self._watch = select.epoll()
        for number in self._connections:
            self._watch.register(number, select.EPOLLRDHUP)

    async def wait(self) -> None:
        """Wait until all peers have hung up."""
        while self._connections:
            await trio.lowlevel.wait_readable(self._watch.fileno())
            for number, _ in self._watch.poll(0):
                self._watch.unregister(number)
                self._connections.pop(number).close()

    def close(self) -> None:
        """Let go of all of them, without hanging up."""
        self._watch.close()
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
