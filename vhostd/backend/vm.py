"""One VM: its native worker, its devices each behind its socket, and its monitor.

Promise: each device is served by itself, and what concerns the machine reaches all of them. Must
not know messages or what a device does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from vhostd.backend.beginning import begin
from vhostd.backend.configured import balloon_of, find, mem_of, pmem_of, policy_of
from vhostd.backend.journal import Journal
from vhostd.backend.keeping import VmKeeping
from vhostd.backend.left import VmLeft
from vhostd.backend.machine import Machine
from vhostd.backend.memory_pursuit import GoalRecord, MemoryPursuit
from vhostd.backend.seat import DeviceSeat
from vhostd.backend.storage import Storage
from vhostd.backend.surroundings import Surroundings, unsupervised
from vhostd.backend.vm_status import describe, overall_state, unshared
from vhostd.backend.worker import VmWorker
from vhostd.backend.worker_watch import WorkerWatch
from vhostd.config import VmConfig
from vhostd.devices.balloon import Balloon
from vhostd.devices.base import Device, Effects, Event, GuestRange, Refused
from vhostd.devices.mem import Mem
from vhostd.devices.memory_plan import MemoryGoal, MemRoom, boot_memory_size, plan_memory
from vhostd.devices.pmem import Pmem
from vhostd.memory.registry import MemoryRegistry
from vhostd.open_files import VmFiles
from vhostd.transport.connection import Connection
from vhostd.transport.listener import Listener

JsonObject = dict[str, Any]


class Vm:
    """A VM's devices and what serves them.

    Attributes:
        machine: what is known of it, and whether its memory may be discarded.
        balloon: its balloon, or None; devices outlive connections, as an operator's wishes do.
        mems: its virtio-mem devices by id, in the configuration's order.
        pmems: its virtio-pmem devices; settled: what a predecessor left is no longer wanted.
    """

    def __init__(
        self,
        config: VmConfig,
        sources: Sequence[Listener | Connection],
        registry: MemoryRegistry,
        journal: Journal,
        keeping: VmKeeping | None = None,
        left: VmLeft | None = None,
        next_event: Callable[[], int] = lambda: 0,
        pause: Callable[[BaseException], None] = unsupervised,
        files: VmFiles | None = None,
    ) -> None:
        """Set a VM up; next_event is the number of the event stream's next event.

        Args:
            sources: where the VMM of each device comes from, as VmConfig.sockets has them.
            keeping: where its state goes; None: nobody keeps it.
            left: what a predecessor left of it.
            pause: has the VM served no more, because of an error.
            files: what of this process' open files is set aside for it.

        Raises:
            ValueError: that is of other devices than the configuration has.
        """
        self.name = config.name
        self.settled = trio.Event()
        self._left = left
        self._pause = pause
        self._files = VmFiles() if files is None else files
        self._registry = registry
        keeping = self._keeping = VmKeeping.none() if keeping is None else keeping
        self.config = config
        self._journal, self.workers = journal, WorkerWatch(journal)
        self.mems = {mem.id: mem_of(mem) for mem in config.mems}
        self.pmems = {pmem.id: pmem_of(pmem) for pmem in config.pmems}
        self.balloon = None if config.balloon is None else balloon_of(config.balloon, self._windows)
        devices: dict[str, Device] = {
            **({} if self.balloon is None else {"balloon": self.balloon}),
            **self.mems,
            **self.pmems,
        }
        policies = {pmem.id: policy_of(pmem) for pmem in config.pmems}
        for name, device in devices.items():
            begin(name, device, left, keeping, journal)
        self.machine = self._begin_machine(keeping, next_event)
        shared = self._surroundings(keeping, next_event)
        self._seats = {
            name: DeviceSeat(
                name,
                device,
                source,
                shared,
                policies.get(name),
                None if left is None else left.of(name, keeping.of_device(name)),
            )
            for (name, device), source in zip(devices.items(), sources, strict=True)
        }
        goal = None if left is None else left.record.goal
        self._pursuit = self._new_pursuit(goal, next_event)
        self._tell_hotplug_size()

    def _new_pursuit(self, goal: GoalRecord | None, next_event: Callable[[], int]) -> MemoryPursuit:
        return MemoryPursuit(
            self.balloon,
            self.mems,
            self._perform_balloon,
            lambda goal: self._keeping.commit_goal(goal, next_event()),
            self._journal,
            goal,
        )

    def _begin_machine(self, keeping: VmKeeping, next_event: Callable[[], int]) -> Machine:
        return Machine(
            self.config.qmp,
            self.balloon,
            self.mems,
            lambda name, effects: self._seats[name].perform(effects),
            lambda: sum(seat.connection is not None for seat in self._seats.values()),
            lambda verdict: keeping.commit_verdict(verdict, next_event()),
            self._journal,
            None if self._left is None else self._left.verdict,
        )

    def _surroundings(self, keeping: VmKeeping, next_event: Callable[[], int]) -> Surroundings:
        has_shmem = any(pmem.shmem_region_sizes for pmem in self.pmems.values())
        return Surroundings(
            self.name,
            self._registry,
            self._journal,
            self.machine.stop_vm,
            self.machine.on_connected,
            self._pause,
            not has_shmem,
            keeping,
            next_event,
            tuple(mem.options.window for mem in self.mems.values() if mem.options.prealloc),
            self._files,
        )

    @property
    def vmm_present(self) -> bool:
        """A VMM is connected to one of the devices."""
        return self.machine.vmm_present

    async def run(self) -> None:
        """Serve VMMs until cancelled, or until all connections we were handed have ended."""
        try:
            if self._left is not None:
                await self._left.map_memory(self.name, self._registry)
            await self._serve(self._left)
        except BaseException:
            self._keeping.pause()  # before what only a successor may want is let go of
            raise
        finally:
            self._registry.settle(self.name)

    async def _serve(self, left: VmLeft | None) -> None:
        async with self._open_worker(self.name) as worker, trio.open_nursery() as nursery:
            if self.machine.monitor is not None:
                nursery.start_soon(self.machine.monitor.run)
            if self._keeping.lasting is not None:
                nursery.start_soon(self._keeping.lasting.run)
            listening = {k: fd for seat in self._seats.values() for k, fd in seat.listening.items()}
            if listening:
                self._keeping.store.keep_all(listening, apart=True)
            async with trio.open_nursery() as seats:
                for name, seat in self._seats.items():
                    if name in self.pmems:
                        seats.start_soon(self._run_apart, seat)
                    else:
                        seats.start_soon(seat.run, worker)
                seats.start_soon(self._settle, left)
            nursery.cancel_scope.cancel()

    async def _settle(self, left: VmLeft | None) -> None:
        """Let go of what a predecessor left and nobody wants."""
        for seat in self._seats.values():
            await seat.settled.wait()
        if left is not None:
            self._registry.settle(self.name)
            left.close(self.name, self._keeping.store)
        self.settled.set()

    async def _run_apart(self, seat: DeviceSeat) -> None:
        """A device whose worker waits for a disk shares it with no other."""
        async with self._open_worker(f"{self.name}:{seat.name}") as worker:
            await seat.run(worker)

    @asynccontextmanager
    async def _open_worker(self, name: str) -> AsyncIterator[VmWorker]:
        async with VmWorker.open(name, self._pause) as worker:
            with self.workers.watched(worker):
                yield worker

    # -- what an operator wants ----------------------------------------------------------------

    def set_balloon_target(self, size: int) -> None:
        """Ask the guest to give up `size` bytes.

        Raises:
            Refused: it cannot be; the text says why.
        """
        effects = self.require_balloon().set_target(size)
        self._pursuit.give_up()
        self._seats["balloon"].perform(effects)

    def request_statistics(self) -> None:
        """Ask the guest for its statistics.

        Raises:
            Refused: no driver runs, or it gives none.
        """
        self._seats["balloon"].perform(self.require_balloon().request_statistics())

    def balloon_hint(self, *, start: bool) -> None:
        """Begin or break off a free page hinting round.

        Raises:
            Refused: it cannot be now; the text says why.
        """
        balloon = self.require_balloon()
        self._seats["balloon"].perform(balloon.hint_start() if start else balloon.hint_stop())

    def require_balloon(self) -> Balloon:
        """The balloon. Raises Refused if there is none."""
        if self.balloon is None:
            raise Refused(f"VM {self.name!r} has no balloon")
        return self.balloon

    def find_mem(self, device: str | None) -> Mem:
        """A virtio-mem device by its id, or the only one. Raises Refused: none, or several."""
        return find(f"VM {self.name!r}", "memory device", self.mems, device)

    def resize_mem(self, device: str | None, size: int) -> str:
        """Ask the guest to use `size` bytes of a virtio-mem device; its id is returned.

        Raises:
            Refused: it cannot be; the text says why.
        """
        mem = self.find_mem(device)
        effects = mem.set_requested_size(size)
        self._pursuit.give_up()
        self._seats[mem.options.id].perform(effects)
        self._tell_hotplug_size()
        return mem.options.id

    def find_pmem(self, device: str | None) -> Pmem:
        """A virtio-pmem device by its id, or the only one. Raises Refused: none, or several."""
        return find(f"VM {self.name!r}", "disk", self.pmems, device)

    def storage_of(self, pmem: Pmem) -> Storage:
        """Its image.

        Raises:
            Refused: no VMM is connected, so that it is not open.
        """
        connection = self._seats[pmem.options.id].connection
        if connection is None or connection.storage is None:
            raise Refused(f"{pmem.options.id}: no VMM is connected, so its image is not open")
        return connection.storage

    async def clear_pmem(self, device: str | None) -> str:
        """Let flushes succeed again after a failure; the device's id is returned.

        Raises:
            Refused: see find_pmem().
        """
        pmem = self.find_pmem(device)
        seat = self._seats[pmem.options.id]
        if seat.connection is not None and seat.connection.storage is not None:
            await seat.connection.storage.clear()
        effects = pmem.on_cleared()
        seat.commit()
        for effect in effects:
            assert isinstance(effect, Event)
            self._journal.publish(effect.name, effect.fields)
        return pmem.options.id

    def set_memory(self, size: int) -> JsonObject:
        """Ask for `size` bytes of usable memory; says what was asked of whom.

        Raises:
            Refused: it cannot be; the text says why. Nothing was changed then.
        """
        rooms = [
            MemRoom(mem.options.id, mem.options.size, mem.options.block_size)
            for mem in self.mems.values()
        ]
        boot_size = self._boot_memory_size()
        plan = plan_memory(boot_size, rooms, size, has_balloon=self.balloon is not None)
        for name, requested in plan.requested.items():
            self.mems[name].check_request(requested)
        if self.balloon is not None and plan.balloon:
            self.balloon.check_usable()
        self._pursuit.begin(MemoryGoal(boot_size, size))
        for name, requested in plan.requested.items():
            self._seats[name].perform(self.mems[name].set_requested_size(requested))
        self._tell_hotplug_size()
        self._pursuit.go_on()
        return {"size": size, "mem": plan.requested, "balloon": plan.balloon}

    def _perform_balloon(self, effects: Effects) -> None:
        self._seats["balloon"].perform(effects)

    def _boot_memory_size(self) -> int:
        size = self._find_boot_memory_size()
        if size == 0:
            raise Refused(f"VM {self.name!r}: no VMM is connected, its memory is not known")
        return size

    def _find_boot_memory_size(self) -> int:
        sizes = [
            boot_memory_size(seat.connection.memory_slots, self._windows)
            for seat in self._seats.values()
            if seat.connection is not None
        ]
        return max(sizes, default=0)

    @property
    def _windows(self) -> list[GuestRange]:
        return [mem.options.window for mem in self.mems.values()]

    def _tell_hotplug_size(self) -> None:
        if self.balloon is not None:
            requested = sum(mem.requested_size for mem in self.mems.values())
            self._seats["balloon"].perform(self.balloon.set_hotplug_size(requested))

    # -- what an operator sees -----------------------------------------------------------------

    @property
    def state(self) -> str:
        """waiting, connected, running, stopped or quarantined."""
        return overall_state(self._seats.values())

    def status(self) -> JsonObject:
        """The object of `vhostctl --json status VM`; sizes in bytes."""
        return {
            "vm": self.name,
            "state": self.state,
            **describe(self._seats, list(self.mems), list(self.pmems)),
            "usable": self._usable_size(),
            "usable_goal": self._pursuit.size,
            "qmp": self.machine.monitor is not None and self.machine.monitor.connected,
            "discards": self.machine.status(),
            "stuck": self.workers.stuck,
            "unshared": unshared(self._seats, self.machine.unshared),
            "not_kept": (not_kept := self._keeping.store.not_kept(self.name)),
            "kept": not_kept is None,
            "not_lasting": None if (lasting := self._keeping.lasting) is None else lasting.why_not,
            "paused": None,
            "paused_remedy": None,
        }

    def _usable_size(self) -> int | None:
        """Bytes of RAM the guest may use, by its own word about the balloon; None: not known."""
        boot_size = self._find_boot_memory_size()
        if boot_size == 0:
            return None
        actual = 0 if self.balloon is None else self.balloon.actual
        return boot_size + sum(mem.plugged_size for mem in self.mems.values()) - actual
