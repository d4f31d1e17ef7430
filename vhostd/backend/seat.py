"""One device of a VM behind its socket: VMMs come, one at a time, and go.

Promise: nothing of a connection is left when it ends, and the device outlives it. Must not know
messages, the VM's other devices, or what the device does.
"""

from __future__ import annotations

import trio

from vhostd.backend.connection import DeviceConnection
from vhostd.backend.keeping import LISTEN
from vhostd.backend.left import Left
from vhostd.backend.storage import StoragePolicy
from vhostd.backend.surroundings import Surroundings
from vhostd.backend.worker import VmWorker
from vhostd.devices.base import Device, Effects
from vhostd.errors import PauseVm
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
        settled: set once nothing more is wanted of what a predecessor left.
    """

    def __init__(
        self,
        name: str,
        device: Device,
        source: Listener | Connection,
        shared: Surroundings,
        policy: StoragePolicy | None = None,
        left: Left | None = None,
    ) -> None:
        """Nobody sits on it yet, but whom a predecessor left.

        Args:
            source: where VMMs come from.
            policy: of a device with an image.
            left: a connection that a predecessor served.
        """
        self.name = name
        self.device = device
        self.connection: DeviceConnection | None = None
        self.connections = 0
        self.connections_refused = 0
        self._source = source
        self._shared = shared
        self._policy = policy
        self._left = left
        self.settled = trio.Event()
        self._kept = shared.keeping.of_device(name)
        self._idle = trio.Event()  # set when the connection has ended

    @property
    def listening(self) -> dict[str, int]:
        """The listening socket by its name in the store, if there is one."""
        if isinstance(self._source, Connection):
            return {}
        self._kept.adopt(LISTEN)
        return {self._kept.name(LISTEN): self._source.fileno()}

    async def run(self, worker: VmWorker) -> None:
        """Serve VMMs until cancelled, or until the one connection we were handed has ended."""
        try:
            if isinstance(self._source, Connection):
                self.settled.set()
                self._shared.files.enter()
                self.connection = self._new_connection(worker, self._source)
                await self._run_connection(self.connection)
            else:
                await self._accept(worker, self._source)
        finally:
            self._source.close()

    async def _accept(self, worker: VmWorker, listener: Listener) -> None:
        journal = self._shared.journal
        async with trio.open_nursery() as nursery:
            if (resumed := self._resume(worker)) is not None:
                self.connection = resumed
                nursery.start_soon(self._run_connection, resumed)
            while True:
                connection = await listener.accept()
                if self.connection is not None and self.connection.hung_up:
                    await self._idle.wait()
                if self.connection is not None:
                    self._turn_away(connection)
                    continue
                self._enter(connection)
                try:
                    self.connection = self._new_connection(worker, connection)
                except OSError as error:
                    self._shared.files.leave()
                    connection.close()
                    journal.guest_caused("open", LogEvent.HOST_ERROR, error=str(error))
                    continue
                nursery.start_soon(self._run_connection, self.connection)

    def _enter(self, connection: Connection) -> None:
        try:
            self._shared.files.enter()
        except PauseVm:
            connection.close()
            raise

    def _resume(self, worker: VmWorker) -> DeviceConnection | None:
        """The connection a predecessor left, if it can be served."""
        left, self._left = self._left, None
        connection = None if left is None else left.connection()
        if connection is None:
            self.settled.set()
            return None
        try:
            resumed = self._new_connection(worker, connection, left)
        except Exception:
            self._shared.keeping.pause()
            self._shared.keeping.leave_connection(connection)
            raise
        self._shared.files.enter(resumed=True)
        return resumed

    def _turn_away(self, connection: Connection) -> None:
        connection.close()
        self.connections_refused += 1
        self._shared.journal.guest_caused(
            "second",
            LogEvent.FRONTEND_ERROR,
            device=self.name,
            error="a second VMM connected and was turned away: one is being served",
        )

    def _new_connection(
        self, worker: VmWorker, connection: Connection, left: Left | None = None
    ) -> DeviceConnection:
        # Here and not in its task: somebody may wait for its end before that task first runs.
        self._idle = trio.Event()
        return DeviceConnection(
            self.name,
            connection,
            self.device,
            worker,
            self._shared,
            self._kept,
            self._policy,
            left,
            self.settled,
        )

    async def _run_connection(self, connection: DeviceConnection) -> None:
        journal = self._shared.journal
        self.connections += 1
        news = LogEvent.TAKEN_OVER if connection.resumed else LogEvent.VM_CONNECTED
        journal.log.info(news, device=self.name)
        journal.publish(news, {"device": self.name})
        self._shared.connected(resumed=connection.resumed)
        try:
            await connection.run()
            if connection.ended:
                # And not we: nobody will want what it had.
                self._kept.forget_all(but=LISTEN)
                self.connection = None
                self.commit()
        finally:
            self.connection = None
            self._shared.files.leave()
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
        if self.connection is None or not effects:
            self.commit()

    def commit(self) -> None:
        """Record what the device has become."""
        if self.connection is not None:
            self.connection.commit()
            return
        shared, left = self._shared, self._left
        if left is None:
            shared.keeping.commit(self.name, self.device, None, None, shared.next_event())
            return
        # Not taken over yet: who dies now leaves to the next what was left to us.
        record = left.record
        shared.keeping.commit(
            self.name, self.device, left.session, record.owed, shared.next_event(), record.outside
        )
