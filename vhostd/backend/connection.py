"""One VMM connection of one device, from accept to hang-up.

The way of a message: transport hands it in, the session makes a step of it, the performer does what
the step says, the reply goes out. Must not know what any message means.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Final

import trio

from vhostd import _native
from vhostd.backend.backend_requests import BackendRequests
from vhostd.backend.chains import ChainServer
from vhostd.backend.effects import EffectPerformer, HostWork
from vhostd.backend.faults import Faults
from vhostd.backend.left import Left
from vhostd.backend.memory_table import DeviceMemory
from vhostd.backend.offer import new_native, offer_of
from vhostd.backend.performer import ActionPerformer
from vhostd.backend.rings import Rings
from vhostd.backend.socket_news import SocketNews
from vhostd.backend.storage import Storage, StoragePolicy
from vhostd.backend.surroundings import Surroundings
from vhostd.backend.window import NoHostWork, Window
from vhostd.backend.worker import VmWorker
from vhostd.devices.base import Device, MemorySlot, Role
from vhostd.devices.mem import Mem
from vhostd.devices.pmem import Pmem
from vhostd.errors import FrontendError, HostError
from vhostd.handover.fd_store import DeviceKeeping
from vhostd.handover.vm_record import Owed
from vhostd.images.image_file import ImageUnusable
from vhostd.log import LogEvent
from vhostd.protocol.framing import Message
from vhostd.session.machine import SessionMachine
from vhostd.session.state import SessionState
from vhostd.transport.connection import Connection
from vhostd.transport.stream import Disconnected

_VMM_GONE: Final = (errno.EPIPE, errno.ECONNRESET, errno.EPROTO)
"""What vhd_reply_finish() says where the connection is of no use any more."""


class DeviceConnection:
    """Everything that exists for one connection, and no longer than it.

    Attributes:
        effects: performs what the device wants done, also when an operator is the cause.
        requests: what is asked of the VMM.
        storage: the device's image, if it has one.
        messages_refused: requests of the VMM that were refused.
        resumed: a predecessor served it.
        ended: it is over, and a successor gets nothing of it.
    """

    def __init__(
        self,
        name: str,
        connection: Connection,
        device: Device,
        worker: VmWorker,
        shared: Surroundings,
        kept: DeviceKeeping,
        policy: StoragePolicy | None = None,
        left: Left | None = None,
        settled: trio.Event | None = None,
    ) -> None:
        """Serve a VMM that has just connected, or one that a predecessor served.

        Args:
            name: of the device; kept: where a successor finds its descriptors.
            policy: of a device with an image.
            left: what a predecessor left of this connection.
            settled: to be set once that was used.

        Raises:
            OSError: no memory or descriptor, or what was left is of no use.
        """
        self.name = name
        self._connection = connection
        self._shared = shared
        self._kept = kept
        self._left = left
        self._settled = trio.Event() if settled is None else settled
        self._owed = None if left is None else left.record.owed
        self._sequence = 0 if self._owed is None else self._owed.sequence
        self._device = device
        self._worker = worker
        journal = self._journal = shared.journal
        self._native = new_native(device) if left is None else left.native(device)
        self._machine = SessionMachine(
            offer_of(device, memory_slots=shared.memory_slots),
            None if left is None else left.session,
        )
        self._rings = Rings(self._native, device.queue_count)
        self.requests = BackendRequests(name, journal)
        memory = self._memory = self._new_memory(shared)
        self._window = None
        host_work: HostWork = NoHostWork()
        if isinstance(device, Mem):
            host_work = self._window = Window(device, memory, journal)
        self.effects = EffectPerformer(
            self._native, self.requests, host_work, shared.stop_vm, self.commit, journal
        )
        self.storage = None
        if isinstance(device, Pmem):
            self.storage = self._new_storage(device, policy or StoragePolicy(), shared)
        self._performer = self._new_performer(device, memory)
        self._news = SocketNews(connection, self._native, from_worker=self.storage is None)
        self._chains = ChainServer(device, self._native, self.effects, self._roles, journal)
        self._faults = Faults(self._native, self._rings, journal, left)
        self.messages_refused = 0
        self.resumed = left is not None
        self.ended = False

    def _new_memory(self, shared: Surroundings) -> DeviceMemory:
        return DeviceMemory(
            shared.registry, self._worker, self._native, shared.journal, shared.preallocated
        )

    def _new_storage(self, device: Pmem, policy: StoragePolicy, shared: Surroundings) -> Storage:
        return Storage(
            device,
            policy,
            self._native,
            self._memory,
            shared.registry,
            self.requests,
            shared.stop_vm,
            self._connection.peer_pid,
            self.effects.perform,
            self._kept,
            shared.journal,
            shared.pause,
        )

    def _new_performer(self, device: Device, memory: DeviceMemory) -> ActionPerformer:
        return ActionPerformer(
            self._worker,
            self._native,
            device,
            memory,
            self._rings,
            self.requests,
            self.effects,
            self.storage,
            self._kept,
            self._connection.fileno(),
        )

    def _roles(self) -> Mapping[int, Role]:
        return self._device.roles(self._performer.features, self._rings.started)

    def commit(self) -> None:
        """Record what the device and the session have become."""
        shared = self._shared
        shared.keeping.commit(
            self.name,
            self._device,
            self._machine.state,
            self._owed,
            shared.next_event(),
            self._faults.refused,
        )

    @property
    def state(self) -> SessionState:
        """What was negotiated."""
        return self._machine.state

    @property
    def hung_up(self) -> bool:
        """The VMM has gone, though what it left behind may still be being cleared away."""
        return self._connection.hung_up

    @property
    def faults(self) -> dict[int, str]:
        """Quarantined rings and what was wrong with them."""
        return self._faults.now()

    @property
    def outside(self) -> int | None:
        """See Faults.outside()."""
        return self._faults.outside(live=any(ring.live for ring in self.state.rings))

    @property
    def memory_slots(self) -> Sequence[MemorySlot]:
        """Where the VMM's memory is."""
        return self._memory.slots

    def counters(self) -> dict[str, int]:
        """Counters of the native data plane, named as in c_src/vhd_api.h."""
        if self.storage is not None:
            return self.storage.counters()
        return self._native.balloon_counters().as_dict()

    def counts(self) -> dict[str, int]:
        """What else was counted on this connection, by the names of vm_status.NO_COUNTS."""
        reads, writes = self._native.config_counters()
        return {
            "messages_refused": self.messages_refused,
            "chains_refused": self.effects.chains_refused,
            "config_changes": self.requests.config_changes,
            "config_reads": reads,
            "config_writes": writes,
        }

    def queues(self) -> dict[str, dict[str, int]]:
        """Counters of every started queue, by its role, or its index while that is not known."""
        roles = self._roles()
        return {
            roles[index].value if index in roles else str(index): self._native.ring_statistics(
                index
            ).counters()
            for index in sorted(self._rings.started)
        }

    async def run(self) -> None:
        """Serve until the VMM hangs up or breaks the protocol; everything is released then.

        Where we end, or an error ends it, a successor goes on with it.
        """
        attached = False
        try:
            await self._worker.attach(self._native, self._on_events)
            attached = True
            try:
                async with self._image_open():
                    await self._serve()
                self.ended = True
            except ImageUnusable as error:
                if self.resumed:
                    raise
                assert self.storage is not None, "only these have an image"
                self.storage.refuse(error)
                self.ended = True
            finally:
                if not self.ended:
                    self._shared.keeping.pause()  # before anything is settled or released
                self._settled.set()
                with trio.CancelScope(shield=True):
                    await self._worker.detach(self._native)
                    attached = False
        finally:
            if not attached:  # else the worker may use all of it, so that it must stay
                self._let_go()

    def _let_go(self) -> None:
        """Release everything, whatever a part of it raises."""
        keeping = self._shared.keeping
        with ExitStack() as release:
            if self.ended and keeping.active:
                release.callback(self._connection.close)
            else:
                release.callback(keeping.leave_connection, self._connection)
            release.callback(self._native.close)
            release.callback(self._performer.close, leave=not self.ended or not keeping.active)
            self._device.on_disconnected()

    @asynccontextmanager
    async def _image_open(self) -> AsyncIterator[None]:
        if self.storage is None:
            yield
            return
        async with self.storage.opened(self._worker, self._left):
            yield

    async def _serve(self) -> None:
        async with self._worker.parked():
            self._native.set_socket(self._connection.fileno())
        if self._left is None:
            self.commit()
        # The connection last: a successor serves one only with all the rest.
        self._kept.keep("shared", self._native.shared_fd)
        self._kept.keep("reply", self._native.reply_fd)
        self._kept.keep("connection", self._connection.fileno(), apart=True)
        if self._left is not None:
            try:
                await self._resume(self._left)
            except Disconnected:
                return
        self._settled.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.requests.run)
            nursery.start_soon(self._keep_time)
            nursery.start_soon(self._news.watch_hang_up)
            nursery.start_soon(self._chains.serve_left)
            if self._window is not None:
                nursery.start_soon(self._window.run, self.effects.perform)
            if self.storage is not None:
                nursery.start_soon(self.storage.run)
            await self._serve_messages()
            nursery.cancel_scope.cancel()

    async def _resume(self, left: Left) -> None:
        """Go on where a predecessor stopped.

        Raises:
            FrontendError, HostError, OSError: it can't be.
            Disconnected: the VMM has gone.
        """
        await self._performer.resume(self._machine.state, left)
        owed = self._owed
        if owed is not None and owed.sequence not in self._native.reply_numbers:
            # Recorded, and then death came before the worker's memory said so too.
            await self._finish_reply()
            self._native.prepare_reply(owed.sequence, owed.request_size, owed.reply)
        await self._finish_reply()

    async def _finish_reply(self) -> None:
        try:
            while not self._native.finish_reply():
                await self._connection.wait_writable()
        except OSError as error:
            if error.errno not in _VMM_GONE:
                raise
            raise Disconnected(f"the VMM took no answer: {error.strerror}") from error

    # -- messages ------------------------------------------------------------------------------

    async def _serve_messages(self) -> None:
        """Serve until the VMM hangs up or breaks the protocol. Errors of the host are raised."""
        try:
            while True:
                await self._serve_next()
        except Disconnected:
            return
        except FrontendError as error:
            self._journal.log.error(
                LogEvent.FRONTEND_ERROR,
                error=str(error),
                consequence="connection closed; the guest's next reboot will end QEMU",
            )

    async def _serve_next(self) -> None:
        """Serve a message if there is one, else wait until there may be."""
        if (message := await self._connection.receive()) is not None:
            await self._handle(message)
        else:
            await self._news.wait()

    async def _handle(self, message: Message) -> None:
        step = self._machine.on_message(message)
        refusal: Exception | None = step.refusal
        try:
            outcomes = [await self._performer.perform(action) for action in step.actions]
        except (FrontendError, HostError) as error:
            refusal = error
            reply = self._machine.refuse(step)
        else:
            reply = self._machine.commit(step, outcomes)
        if refusal is not None:
            self.messages_refused += 1
            self._faults.on_refusal(refusal)
            self._journal.guest_caused(
                "refused", LogEvent.FRONTEND_ERROR, message=message.name, error=str(refusal)
            )
        self._faults.forget_stopped()
        await self._answer(b"" if reply is None else reply.data)

    async def _answer(self, reply: bytes) -> None:
        self._sequence += 1
        self._owed = Owed(self._sequence, self._connection.unread_size, reply)
        self.commit()
        self._performer.forget_obsolete()
        self._native.prepare_reply(self._sequence, self._owed.request_size, reply)
        await self._finish_reply()

    # -- what the native worker reports --------------------------------------------------------

    def _on_events(self, events: _native.Event) -> None:
        if events & _native.Event.SOCKET:
            self._news.tell()
        if events & _native.Event.CONFIG:
            self.effects.perform(self._device.on_config_written(self._native.read_config()))
        if events & _native.Event.CHAINS:
            self._chains.serve()
        if events & _native.Event.FAULT:
            self._faults.tell()
        if events & _native.Event.HOST_ERROR:
            self._faults.tell_discard_errors()
        if events & _native.Event.FLUSH_FAILED and self.storage is not None:
            self.effects.perform(self.storage.on_flush_failed())

    async def _keep_time(self) -> None:
        interval_s = self._device.timer_interval_s
        if interval_s <= 0:
            return
        # Beats of a fixed grid, so that a slow turn does not shift all later ones.
        beat_s = trio.current_time()
        while True:
            beat_s = max(beat_s + interval_s, trio.current_time())
            await trio.sleep_until(beat_s)
            self.effects.perform(self._device.on_timer())
