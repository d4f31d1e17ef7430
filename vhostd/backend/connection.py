"""One VMM connection of one device, from accept to hang-up.

The way of a message: transport hands it in, the session makes a step of it, the performer does what
the step says, the reply goes out. Must not know what any message means.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from vhostd import _native
from vhostd.backend.backend_requests import BackendRequests
from vhostd.backend.effects import EffectPerformer, HostWork
from vhostd.backend.memory_table import DeviceMemory
from vhostd.backend.performer import ActionPerformer
from vhostd.backend.rings import CONTROL_HANDLERS, HANDLER_OF, Rings
from vhostd.backend.storage import Storage, StoragePolicy
from vhostd.backend.surroundings import Surroundings
from vhostd.backend.window import NoHostWork, Window
from vhostd.backend.worker import VmWorker
from vhostd.devices.base import Chain, Device, MemorySlot, Role
from vhostd.devices.mem import Mem
from vhostd.devices.pmem import Pmem
from vhostd.errors import FrontendError, GuestError, HostError
from vhostd.images.image_file import ImageUnusable
from vhostd.log import LogEvent
from vhostd.protocol.features import protocol_features_for
from vhostd.protocol.framing import Message
from vhostd.session.machine import SessionMachine
from vhostd.session.plan import Offer
from vhostd.session.state import SessionState
from vhostd.transport.connection import Connection
from vhostd.transport.stream import Disconnected

NO_COUNTERS: Final = _native.BalloonCounters().as_dict()
"""What the counters are while no VMM is connected."""

NO_COUNTS: Final = {
    "messages_refused": 0,
    "chains_refused": 0,
    "config_changes": 0,
    "config_reads": 0,
    "config_writes": 0,
}

CHAINS_PER_TURN_MAX: Final = 64
"""Chains of one queue that Python serves before other queues, VMs and timers get their turn."""


class DeviceConnection:
    """Everything that exists for one connection, and no longer than it.

    Attributes:
        effects: performs what the device wants done, also when an operator is the cause.
        requests: what is asked of the VMM.
        storage: the device's image, if it has one.
        messages_refused: requests of the VMM that were refused.
    """

    def __init__(
        self,
        connection: Connection,
        device: Device,
        worker: VmWorker,
        shared: Surroundings,
        policy: StoragePolicy | None = None,
    ) -> None:
        """policy: of a device with an image."""
        self._connection = connection
        self._device = device
        self._worker = worker
        journal = self._journal = shared.journal
        self._native = _native.Device(
            device.queue_count, device.config_size, device.config_writable
        )
        self._native.publish_config(0, device.config())
        self._machine = SessionMachine(
            Offer(
                device.offered_features,
                device.queue_count,
                device.config_size,
                protocol_features_for(
                    shmem=bool(device.shmem_region_sizes), memory_slots=shared.memory_slots
                ),
                tuple(device.shmem_region_sizes),
            )
        )
        self._rings = Rings(self._native, device.queue_count)
        self.requests = BackendRequests(journal)
        memory = self._memory = DeviceMemory(shared.vm_name, shared.registry, worker, self._native)
        self._window = None
        host_work: HostWork = NoHostWork()
        if isinstance(device, Mem):
            host_work = self._window = Window(device, memory, journal)
        self.effects = EffectPerformer(
            self._native, self.requests, host_work, shared.stop_vm, journal
        )
        self.storage = None
        if isinstance(device, Pmem):
            self.storage = self._new_storage(device, policy or StoragePolicy(), shared)
        self._performer = ActionPerformer(
            worker,
            self._native,
            device,
            memory,
            self._rings,
            self.requests,
            self.effects,
            self.storage,
            connection.fileno(),
        )
        self._socket_needs_us = trio.Event()
        self._chains_left = trio.Event()
        self._faults_told: set[int] = set()
        self.messages_refused = 0

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
            shared.journal,
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
        return {
            index: fault.name.lower()
            for index in sorted(self._rings.started)
            if (fault := self._native.ring_statistics(index).fault) is not _native.Fault.NONE
        }

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
        """What else was counted on this connection, by the names of NO_COUNTS."""
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
        roles = self._device.roles(self._performer.features, self._rings.started)
        return {
            roles[index].value if index in roles else str(index): self._native.ring_statistics(
                index
            ).counters()
            for index in sorted(self._rings.started)
        }

    async def run(self) -> None:
        """Serve until the VMM hangs up or breaks the protocol; everything is released then."""
        try:
            await self._worker.attach(self._native, self._on_events)
            try:
                async with self._image_open():
                    await self._serve()
            except ImageUnusable as error:
                self._refuse_vmm(error)
            finally:
                with trio.CancelScope(shield=True):
                    await self._worker.detach(self._native)
        finally:
            self._forget_driver()
            self._performer.close()
            self._native.close()
            self._connection.close()

    @asynccontextmanager
    async def _image_open(self) -> AsyncIterator[None]:
        if self.storage is None:
            yield
            return
        async with self.storage.opened(self._worker):
            yield

    async def _serve(self) -> None:
        async with self._worker.parked():
            self._native.set_socket(self._connection.fileno())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.requests.run)
            nursery.start_soon(self._keep_time)
            nursery.start_soon(self._serve_chains_left)
            if self._window is not None:
                nursery.start_soon(self._window.run, self.effects.perform)
            if self.storage is not None:
                nursery.start_soon(self.storage.run)
            await self._serve_messages()
            nursery.cancel_scope.cancel()

    def _refuse_vmm(self, error: ImageUnusable) -> None:
        self._journal.log.error(
            LogEvent.IMAGE_UNUSABLE, error=str(error), consequence="the VMM was turned away"
        )
        self._journal.publish(LogEvent.IMAGE_UNUSABLE, {"error": str(error)})
        assert isinstance(self._device, Pmem), "only these have an image"
        self._device.refused_image = str(error)

    def _forget_driver(self) -> None:
        # There is nobody left to perform effects for: only what the device itself knows changes.
        self._device.on_disconnected()

    # -- messages ------------------------------------------------------------------------------

    async def _serve_messages(self) -> None:
        while True:
            try:
                message = await self._connection.receive()
                if message is not None:
                    await self._handle(message)
                    continue
                if self.storage is not None:
                    # The worker may be in a sync, where it hears nothing.
                    await self._connection.wait_readable()
                    continue
                self._socket_needs_us = trio.Event()
                self._native.arm_socket()
            except Disconnected:
                return
            except (FrontendError, OSError) as error:
                self._journal.log.error(
                    LogEvent.FRONTEND_ERROR,
                    error=str(error),
                    consequence="connection closed; the guest's next reboot will end QEMU",
                )
                return
            await self._socket_needs_us.wait()

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
            self._journal.guest_caused(
                "refused", LogEvent.FRONTEND_ERROR, message=message.name, error=str(refusal)
            )
        self._faults_told &= self._rings.started
        if reply is not None:
            await self._connection.send(reply)

    # -- what the native worker reports --------------------------------------------------------

    def _on_events(self, events: _native.Event) -> None:
        if events & _native.Event.SOCKET:
            self._socket_needs_us.set()
        if events & _native.Event.CONFIG:
            self.effects.perform(self._device.on_config_written(self._native.read_config()))
        if events & _native.Event.CHAINS:
            self._serve_chains()
        if events & _native.Event.FAULT:
            self._tell_faults()
        if events & _native.Event.HOST_ERROR:
            self._tell_discard_errors()
        if events & _native.Event.FLUSH_FAILED and self.storage is not None:
            self.effects.perform(self.storage.on_flush_failed())

    def _serve_chains(self) -> None:
        roles = self._device.roles(self._performer.features, self._rings.started)
        for index, role in roles.items():
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
                self.effects.refuse_chain(chain)
                self._journal.guest_caused(
                    (index, "chain"), LogEvent.CHAIN_REJECTED, queue=index, error=str(error)
                )
            else:
                self.effects.perform(effects)
        self._chains_left.set()

    async def _serve_chains_left(self) -> None:
        while True:
            await self._chains_left.wait()
            self._chains_left = trio.Event()
            self._serve_chains()
            await trio.lowlevel.checkpoint()

    def _tell_faults(self) -> None:
        for index, fault in self.faults.items():
            if index not in self._faults_told:
                self._faults_told.add(index)
                self._journal.guest_caused(
                    (index, "fault"),
                    LogEvent.QUEUE_QUARANTINED,
                    queue=index,
                    fault=fault,
                    consequence="the queue stands still until the driver sets it up again",
                )

    def _tell_discard_errors(self) -> None:
        counters = self._native.balloon_counters().as_dict()
        self._journal.guest_caused(
            "discard",
            LogEvent.DISCARD_FAILED,
            errors=counters["discard_errors"],
            errno=counters["discard_errno"],
            consequence="these pages stay resident on the host",
        )

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
