"""Chains that Python serves: from the worker's inbox to the device, a few at a time.

Must not know what a device makes of a chain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

import trio

from vhostd import _native
from vhostd.backend.effects import EffectPerformer
from vhostd.backend.journal import Journal
from vhostd.backend.rings import CONTROL_HANDLERS, HANDLER_OF
from vhostd.devices.base import Chain, Device, Role
from vhostd.errors import GuestError
from vhostd.log import LogEvent

CHAINS_PER_TURN_MAX: Final = 64
"""Chains of one queue that Python serves before other queues, VMs and timers get their turn."""


class ChainServer:
    """One connection's chains."""

    def __init__(
        self,
        device: Device,
        native: _native.Device,
        effects: EffectPerformer,
        roles: Callable[[], Mapping[int, Role]],
        journal: Journal,
    ) -> None:
        """roles: what each started queue is for, now."""
        self._device = device
        self._native = native
        self._effects = effects
        self._roles = roles
        self._journal = journal
        self._left = trio.Event()

    def serve(self) -> None:
        """Serve what waits, as much as is fair; serve_left() does the rest."""
        for index, role in self._roles().items():
            if HANDLER_OF[role] in CONTROL_HANDLERS:
                self._serve_queue(index, role)

    def _serve_queue(self, index: int, role: Role) -> None:
        for _ in range(CHAINS_PER_TURN_MAX):
            taken = self._native.take_chain(index)
            if taken is None:
                return
            chain = Chain(
                queue_index=index,
                role=role,
                token=taken.token,
                position=taken.position,
                data=taken.data,
                readable_size=taken.readable_size,
                writable_count=taken.writable_count,
                writable_size=taken.writable_size,
                writable_addr=taken.writable_addr,
            )
            try:
                effects = self._device.on_chain(chain, time.time())
            except GuestError as error:
                self._effects.refuse_chain(chain)
                self._journal.guest_caused(
                    (index, "chain"), LogEvent.CHAIN_REJECTED, queue=index, error=str(error)
                )
            else:
                self._effects.perform(effects)
        self._left.set()

    async def serve_left(self) -> None:
        """Serve what one turn left over, until cancelled."""
        while True:
            await self._left.wait()
            self._left = trio.Event()
            self.serve()
            await trio.lowlevel.checkpoint()
