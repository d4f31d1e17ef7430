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

TURN_S: Final = 0.002
"""How long Python serves chains of one device before other VMs and timers get their turn. One that
has more waits as long as its turn took, so that it has half of the event loop at most."""


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
        self._first = 0  # the queue that comes first: none waits while another has ever more

    def serve(self) -> None:
        """Serve what waits, as much as is fair; serve_left() does the rest."""
        if not self._left.is_set():  # else it has not had its pause yet
            self._serve_turn()

    def _serve_turn(self) -> None:
        end_s = time.perf_counter() + TURN_S
        queues = [
            (index, role)
            for index, role in sorted(self._roles().items())
            if HANDLER_OF[role] in CONTROL_HANDLERS
        ]
        queues.sort(key=lambda queue: queue[0] < self._first)
        for index, role in queues:
            if not self._serve_queue(index, role, end_s):
                self._first = index + 1
                self._left.set()
                return

    def _serve_queue(self, index: int, role: Role, end_s: float) -> bool:
        """Whether it has no more, and there is time for another."""
        while time.perf_counter() < end_s:
            taken = self._native.take_chain(index)
            if taken is None:
                return True
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
        return False

    async def serve_left(self) -> None:
        """Serve what one turn left over, until cancelled."""
        while True:
            await self._left.wait()
            await trio.sleep(TURN_S)
            self._left = trio.Event()
            self._serve_turn()
