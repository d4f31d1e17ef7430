"""When a VMM has something to say. Must not know what that is.

Between messages the native worker watches the connection, which answers some of them itself.
"""

from __future__ import annotations

from typing import Final

import trio

from vhostd import _native
from vhostd.transport.connection import Connection
from vhostd.transport.stream import Disconnected

HANG_UP_TIMEOUT_S: Final = 1.0
"""From a VMM's hang-up until we act on it without hearing of it from the worker."""


class SocketNews:
    """Of one connection."""

    def __init__(
        self, connection: Connection, native: _native.Device, *, from_worker: bool
    ) -> None:
        """from_worker: it watches; it does not where it may be in a sync and hears nothing."""
        self._connection = connection
        self._native = native
        self._from_worker = from_worker
        self._news = trio.Event()
        self._unheard = False

    def tell(self) -> None:
        """The worker has left a message, or the VMM's end, to us."""
        self._news.set()

    async def wait(self) -> None:
        """Wait until there may be something to read, where there is nothing now.

        Raises:
            Disconnected: the VMM hung up, and the worker did not tell.
        """
        if not self._from_worker:
            await self._connection.wait_readable()
            return
        self._news = trio.Event()
        if not self._unheard:
            self._native.arm_socket()
            await self._news.wait()
        if self._unheard:
            raise Disconnected("the VMM hung up, and the worker does not come back")

    async def watch_hang_up(self) -> None:
        """Hear of a hang-up also where the worker waits for the VMM itself, and hears nothing."""
        await self._connection.wait_hung_up()
        await trio.sleep(HANG_UP_TIMEOUT_S)
        self._unheard = True
        self._news.set()
