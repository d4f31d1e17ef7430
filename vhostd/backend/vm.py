"""One VM: its native worker and the devices it has, each behind its socket.

Promise: one VMM connection a device at a time, and nothing of it left when it ends. Must not know
messages or what a device does.
"""

from __future__ import annotations

from typing import Any

import trio

from vhostd.backend.connection import NO_COUNTERS, NO_COUNTS, DeviceConnection
from vhostd.backend.journal import Journal
from vhostd.backend.worker import VmWorker
from vhostd.config import BalloonConfig, VmConfig
from vhostd.devices.balloon import Balloon
from vhostd.devices.balloon_features import BalloonOptions
from vhostd.devices.base import Effects
from vhostd.log import LogEvent
from vhostd.memory.registry import MemoryRegistry
from vhostd.transport.connection import Connection
from vhostd.transport.listener import Listener

JsonObject = dict[str, Any]


def balloon_of(config: BalloonConfig) -> Balloon:
    """The device a configuration describes."""
    return Balloon(
        BalloonOptions(
            free_page_reporting=config.free_page_reporting,
            free_page_hinting=config.free_page_hinting,
            deflate_on_oom=config.deflate_on_oom,
            page_poison=config.page_poison,
            packed=config.packed,
            in_order=config.in_order,
            stats_interval_s=config.stats_interval_s,
        )
    )


class Vm:
    """A VM's balloon and what serves it.

    Attributes:
        balloon: the device; it outlives connections, as an operator's target does.
        connections: VMM connections ever accepted, those that were turned away not counted.
        connections_refused: turned away because one was there already.
    """

    def __init__(
        self, config: VmConfig, source: Listener | Connection, registry: MemoryRegistry,
        journal: Journal,
    ) -> None:  # fmt: skip
        assert config.balloon is not None, "a VM without a device is a mistake of the configuration"
        self.name = config.name
        self.config = config
        self.balloon = balloon_of(config.balloon)
        self._source = source
        self._registry = registry
        self._journal = journal
        self._connection: DeviceConnection | None = None
        self._idle = trio.Event()  # set when the connection has ended
        self.connections = 0
        self.connections_refused = 0

    async def run(self) -> None:
        """Serve VMMs until cancelled, or until the one connection we were handed has ended."""
        try:
            async with VmWorker.open(self.name) as worker:
                if isinstance(self._source, Connection):
                    await self._serve(worker, self._source)
                else:
                    await self._accept(worker, self._source)
        finally:
            self._source.close()

    async def _accept(self, worker: VmWorker, listener: Listener) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                connection = await listener.accept()
                if self._connection is not None and self._connection.hung_up:
                    await self._idle.wait()
                if self._connection is not None:
                    self._turn_away(connection)
                    continue
                try:
                    self._connection = self._new_connection(worker, connection)
                except OSError as error:
                    connection.close()
                    self._journal.guest_caused("open", LogEvent.HOST_ERROR, error=str(error))
                    continue
                nursery.start_soon(self._run_connection, self._connection)

    def _turn_away(self, connection: Connection) -> None:
        connection.close()
        self.connections_refused += 1
        self._journal.guest_caused(
            "second",
            LogEvent.FRONTEND_ERROR,
            error="a second VMM connected and was turned away: one is being served",
        )

    async def _serve(self, worker: VmWorker, connection: Connection) -> None:
        self._connection = self._new_connection(worker, connection)
        await self._run_connection(self._connection)

    def _new_connection(self, worker: VmWorker, connection: Connection) -> DeviceConnection:
        # Here and not in its task: somebody may wait for its end before that task first runs.
        self._idle = trio.Event()
        return DeviceConnection(
            self.name, connection, self.balloon, worker, self._registry, self._journal
        )

    async def _run_connection(self, connection: DeviceConnection) -> None:
        self.connections += 1
        self._journal.log.info(LogEvent.VM_CONNECTED)
        self._journal.publish(LogEvent.VM_CONNECTED, {})
        try:
            await connection.run()
        finally:
            self._connection = None
            self._idle.set()
            self._journal.log.info(LogEvent.VM_DISCONNECTED)
            self._journal.publish(LogEvent.VM_DISCONNECTED, {})

    # -- what an operator sees and wants -------------------------------------------------------

    @property
    def state(self) -> str:
        """waiting, connected, running, stopped or quarantined."""
        if self._connection is None:
            return "waiting"
        if self._connection.faults:
            return "quarantined"
        session = self._connection.state
        if any(ring.live for ring in session.rings):
            return "running"
        return "stopped" if any(ring.started_at for ring in session.rings) else "connected"

    def status(self) -> JsonObject:
        """The object of `vhostctl --json status VM`; sizes in bytes."""
        connection = self._connection
        counters = NO_COUNTERS if connection is None else connection.balloon_counters()
        balloon = self.balloon.status(counters)
        balloon["queues"] = {} if connection is None else connection.queues()
        return {
            "vm": self.name,
            "state": self.state,
            "balloon": balloon,
            "mem": [],
            "pmem": [],
            "connections": self.connections,
            "connections_refused": self.connections_refused,
            "faults": {} if connection is None else connection.faults,
            **(NO_COUNTS if connection is None else connection.counts()),
        }

    def perform(self, effects: Effects) -> None:
        """Carry out what an operator's wish made the balloon ask for.

        Without a VMM only the balloon's own state changes; the next connection publishes it.
        """
        if self._connection is not None:
            self._connection.effects.perform(effects)
