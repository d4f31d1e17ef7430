"""Config-change messages to the VMM: only while it bears them, one under way at most.

QEMU 11.1's generic vhost-user device crashes on one that arrives while the device is not started
(it has no VirtIODevice to notify then), so a wish waits behind a gate until the device runs.
Knows the back-end channel. Must not know why anybody wants a message sent.
"""

from __future__ import annotations

import trio

from vhostd.backend.journal import Journal
from vhostd.log import LogEvent
from vhostd.protocol.requests import BackendRequest
from vhostd.transport.backend_channel import BackendChannel, ChannelClosed, NotBegun


class ConfigNotifier:
    """Coalesces wishes into CONFIG_CHANGE messages.

    Attributes:
        sent: messages that went out. A VMM that answers with an error has them all the same: there
            is nothing to do about it, and the next wish asks again.
    """

    def __init__(self, journal: Journal) -> None:
        self.sent = 0
        self._journal = journal
        self._wanted = False
        self._open = False
        self._channel: BackendChannel | None = None
        self._changed = trio.Event()

    def want(self) -> None:
        """Ask for one message; several wishes before it goes out are one."""
        self._wanted = True
        self._changed.set()

    def open(self) -> None:
        """The device is started."""
        self._open = True
        self._changed.set()

    def close(self) -> None:
        """The VMM begins to stop the device: from this moment nothing may be sent."""
        self._open = False
        if self._channel is not None:
            self._channel.on_stopping()

    def use(self, channel: BackendChannel | None) -> None:
        """Send through this channel from now on; the old one is closed."""
        old, self._channel = self._channel, channel
        if old is not None:
            old.close()
        self._changed.set()

    async def run(self) -> None:
        """Send what is wanted, until cancelled. A channel the VMM breaks is given up alone."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            while self._wanted and self._open and self._channel is not None:
                channel = self._channel
                try:
                    await channel.request(
                        BackendRequest.CONFIG_CHANGE_MSG, may_begin=self._take_wish
                    )
                except NotBegun:
                    break
                except ChannelClosed as error:
                    self._lose(channel, error)
                    continue
                self.sent += 1

    def _take_wish(self) -> bool:
        if not self._open:
            return False
        self._wanted = False
        return True

    def _lose(self, channel: BackendChannel, error: ChannelClosed) -> None:
        self._wanted = True  # it did not get through; a VMM with a new channel will be told
        if self._channel is channel:
            self._journal.log.warning(
                LogEvent.CHANNEL_LOST,
                reason=str(error),
                consequence="the guest learns a new target only when its driver starts again",
            )
            self.use(None)
