"""One device of a VM behind its socket: VMMs come, one at a time, and go.

Promise: nothing of a connection is left when it ends, and the device outlives it. Must not know
messages, the VM's other devices, or what the device does.
"""

from __future__ import annotations

import trio

from vhostd.backend.connection import DeviceConnection
from vhostd.backend.storage import StoragePolicy
from vhostd.backend.surroundings import Surroundings
from vhostd.backend.worker import VmWorker
from vhostd.devices.base import Device, Effects
from vhostd.log import LogEvent
from vhostd.transport.connection import Connection
from vhostd.transport.listener import Listener


class DeviceSeat:
    """A device, and the VMM that sits on it.

    Attributes:
        name: of the device in its VM.
        connection: the VMM being served, or None.
        connections: VMM connections ever accepted, those that were turned away not counted.
        connections_refused: turned away because one was there already.
    """

    def __init__(
        self,
        name: str,
        device: Device,
        source: Listener | Connection,
        shared: Surroundings,
        policy: StoragePolicy | None = None,
    ) -> None:
        """policy: of a device with an image."""
        self.name = name
        self.device = device
        self.connection: DeviceConnection | None = None
        self.connections = 0
        self.connections_refused = 0
        self._source = source
        self._shared = shared
        self._policy = policy
        self._idle = trio.Event()  # set when the connection has ended

    async def run(self, worker: VmWorker) -> None:
        """Serve VMMs until cancelled, or until the one connection we were handed has ended."""
        try:
            if isinstance(self._source, Connection):
                self.connection = self._new_connection(worker, self._source)
                await self._run_connection(self.connection)
            else:
                await self._accept(worker, self._source)
        finally:
            self._source.close()

    async def _accept(self, worker: VmWorker, listener: Listener) -> None:
        journal = self._shared.journal
        async with trio.open_nursery() as nursery:
            while True:
                connection = await listener.accept()
                if self.connection is not None and self.connection.hung_up:
                    await self._idle.wait()
                if self.connection is not None:
                    self._turn_away(connection)
                    continue
                try:
                    self.connection = self._new_connection(worker, connection)
                except OSError as error:
                    connection.close()
                    journal.guest_caused("open", LogEvent.HOST_ERROR, error=str(error))
                    continue
                nursery.start_soon(self._run_connection, self.connection)

    def _turn_away(self, connection: Connection) -> None:
        connection.close()
        self.connections_refused += 1
        self._shared.journal.guest_caused(
            "second",
            LogEvent.FRONTEND_ERROR,
            device=self.name,
            error="a second VMM connected and was turned away: one is being served",
        )

    def _new_connection(self, worker: VmWorker, connection: Connection) -> DeviceConnection:
        # Here and not in its task: somebody may wait for its end before that task first runs.
        self._idle = trio.Event()
        return DeviceConnection(connection, self.device, worker, self._shared, self._policy)

    async def _run_connection(self, connection: DeviceConnection) -> None:
        journal = self._shared.journal
        self.connections += 1
        journal.log.info(LogEvent.VM_CONNECTED, device=self.name)
        journal.publish(LogEvent.VM_CONNECTED, {"device": self.name})
        self._shared.connected()
        try:
            await connection.run()
        finally:
            self.connection = None
            self._idle.set()
            journal.log.info(LogEvent.VM_DISCONNECTED, device=self.name)
            journal.publish(LogEvent.VM_DISCONNECTED, {"device": self.name})

    @property
    def state(self) -> str:
        """waiting, connected, running, stopped or quarantined."""
        if self.connection is None:
            return "waiting"
        if self.connection.faults:
            return "quarantined"
        session = self.connection.state
        if any(ring.live for ring in session.rings):
            return "running"
        return "stopped" if any(ring.started_at for ring in session.rings) else "connected"

    def perform(self, effects: Effects) -> None:
        """Carry out what an operator's wish made the device ask for.

        Without a VMM only the device's own state changes; the next connection publishes it.
        """
        if self.connection is not None:
            self.connection.effects.perform(effects)
