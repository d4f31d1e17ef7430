"""Requests to the VMM: only while it bears them, one under way at a time.

QEMU 11.1's generic vhost-user device crashes on one that arrives while the device is not started
(it has no VirtIODevice then), so a wish waits behind a gate until the device runs. Knows the
back-end channel. Must not know why anybody wants something.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from vhostd._native import identify_file
from vhostd.backend.journal import Journal
from vhostd.fds import OwnedFd
from vhostd.log import LogEvent
from vhostd.protocol.requests import BackendRequest
from vhostd.transport.backend_channel import BackendChannel, ChannelClosed, NotAsked


@dataclass(frozen=True, slots=True, eq=False)
class _Wish:
    """A request; on_answer gets the VMM's verdict, 0 = done, None = none was to be had."""

    request: BackendRequest
    payload: bytes = b""
    files: tuple[OwnedFd, ...] = ()
    on_answer: Callable[[int | None], None] = lambda verdict: None


_CONFIG_CHANGE: Final = _Wish(BackendRequest.CONFIG_CHANGE_MSG)


NO_CHANNEL: Final = "the VMM has given no channel for requests, or a predecessor lost it"


class BackendRequests:
    """What is to be asked of the VMM of one device.

    Attributes:
        config_changes: messages of that kind that went out. A VMM that answers with an error has
            them all the same: there is nothing to do about it, and the next wish asks again.
    """

    def __init__(self, device: str, journal: Journal) -> None:
        self.config_changes = 0
        self._device = device
        self._no_channel = NO_CHANNEL
        self._journal = journal
        self._config_changed = False
        self._mapping: _Wish | None = None
        self._open = False
        self._channel: BackendChannel | None = None
        self._changed = trio.Event()

    @property
    def untold(self) -> str | None:
        """Why the guest of a started device can't be told of anything; None: it can."""
        if not self._open or self._channel is not None:
            return None
        return f"the guest can't be told of a change: {self._no_channel}"

    @property
    def possible(self) -> bool:
        """The VMM gave us a channel."""
        return self._channel is not None

    def want_config_change(self) -> None:
        """Ask for one CONFIG_CHANGE message; several wishes before it goes out are one."""
        self._config_changed = True
        self._changed.set()

    def want_mapping(
        self, payload: bytes, file: OwnedFd, on_answer: Callable[[int | None], None]
    ) -> None:
        """Ask for one SHMEM_MAP, forgotten when the device stops before it went out.

        Args:
            payload: a ShmemMapping.
            file: what to map; stays the caller's.
            on_answer: gets the VMM's verdict, 0 = mapped; None: none was to be had.
        """
        self._mapping = _Wish(BackendRequest.SHMEM_MAP, payload, (file,), on_answer)
        self._changed.set()

    def open(self) -> None:
        """The device is started."""
        self._open = True
        self._changed.set()

    def close(self) -> None:
        """The VMM begins to stop the device: from this moment nothing may be sent."""
        self._open = False
        self._mapping = None
        if self._channel is not None:
            self._channel.on_stopping()

    def uses(self, file: OwnedFd) -> bool:
        """This is the socket of the channel in use, by whatever descriptor."""
        channel = self._channel
        if channel is None or channel.closed:
            return False
        # Not fstat(2): the file system of a file may never answer.
        try:
            return identify_file(file.fileno()) == identify_file(channel.fileno())
        except OSError:
            return False

    def use(self, channel: BackendChannel | None) -> None:
        """Send through this channel from now on; the old one is closed."""
        old, self._channel = self._channel, channel
        if old is not None:
            old.close()
        self._changed.set()

    def leave(self) -> None:
        """Let go of the channel, which a successor goes on with."""
        if self._channel is not None:
            self._channel.leave()
            self._channel = None

    async def run(self) -> None:
        """Send what is wanted, until cancelled. A channel the VMM breaks is given up alone."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            while self._open and self._channel is not None and (wish := self._next()) is not None:
                try:
                    await self._send(self._channel, wish)
                except NotAsked:
                    # The gate was shut, or another wish has come instead.
                    self._config_changed |= wish is _CONFIG_CHANGE

    def _next(self) -> _Wish | None:
        # The guest may use its region at once, so that mapping it comes first.
        if self._mapping is not None:
            return self._mapping
        return _CONFIG_CHANGE if self._config_changed else None

    async def _send(self, channel: BackendChannel, wish: _Wish) -> None:
        try:
            verdict = await channel.request(
                wish.request, wish.payload, wish.files, may_begin=lambda: self._take(wish)
            )
        except ChannelClosed as error:
            self._forget(wish)
            wish.on_answer(None)
            self._lose(channel, error)
            return
        if wish is _CONFIG_CHANGE:
            self.config_changes += 1
        self._forget(wish)
        wish.on_answer(verdict)

    def _take(self, wish: _Wish) -> bool:
        # Asked again after each wait for room, so that nothing may be lost if it says no then.
        if wish is not _CONFIG_CHANGE:
            # Else it was taken back, or there is another by now.
            return self._open and wish is self._mapping
        self._config_changed = not self._open
        return self._open

    def _forget(self, mapping: _Wish) -> None:
        """It is over, unless there is another by now."""
        if self._mapping is mapping:
            self._mapping = None

    def _lose(self, channel: BackendChannel, error: ChannelClosed) -> None:
        self._config_changed = True  # maybe lost; a VMM with a new channel will be told
        if self._channel is channel:
            told = {"device": self._device, "reason": str(error)}
            self._journal.log.warning(
                LogEvent.CHANNEL_LOST,
                **told,
                consequence="the guest learns of a change only when its driver starts again",
            )
            self._journal.publish(LogEvent.CHANNEL_LOST, told)
            self._no_channel = f"the VMM's channel for requests was lost ({error})"
            self.use(None)
