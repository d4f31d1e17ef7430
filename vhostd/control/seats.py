"""Who may be connected to one server, and which of them may wait. Knows no HTTP and no VM.

A request that waits for a guest or a disk may take an hour. It gives up its place among the
connections, so that however many wait, others are served.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import trio

CONNECTIONS_MAX: Final = 256
"""Of one server; further clients wait in its backlog."""
WAITING_MAX: Final = 256
"""Beside them; each keeps a descriptor open."""
WAITING_PER_VM_MAX: Final = 64
"""So that one VM's hung disk can't use up what the operators of others need."""


class Seats:
    """The places of one server."""

    def __init__(self) -> None:
        self._free = trio.Semaphore(CONNECTIONS_MAX)
        self._waiting: Counter[str] = Counter()

    async def reserve(self) -> None:
        """Wait until one more may connect."""
        await self._free.acquire()

    def give_back(self) -> None:
        """Let another one have what was reserved."""
        self._free.release()


class Seat:
    """One connection's place, reserved before; it is left once."""

    def __init__(self, seats: Seats) -> None:
        self._seats = seats
        self._waits_for: str | None = None

    def wait(self, vm: str) -> bool:
        """Go over to those that wait, until the connection ends.

        vm: whose guest or disk is waited for; "": everybody's, and no VM's share is used.
        Returns False where too many wait already.
        """
        waiting = self._seats._waiting
        if self._waits_for is None:
            if waiting.total() >= WAITING_MAX or (vm and waiting[vm] >= WAITING_PER_VM_MAX):
                return False
            self._waits_for = vm
            waiting[vm] += 1
            self._seats.give_back()
        return True

    def leave(self) -> None:
        """The connection has ended."""
        waiting, vm = self._seats._waiting, self._waits_for
        if vm is None:
            self._seats.give_back()
            return
        waiting[vm] -= 1
        if not waiting[vm]:
            del waiting[vm]
