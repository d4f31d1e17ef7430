"""One VM: its native worker, its devices each behind its socket, and its monitor.

Promise: each device is served by itself, and what concerns the machine reaches all of them. Must
not know messages or what a device does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import trio

from vhostd.backend.configured import balloon_of, mem_of, pmem_of, policy_of
from vhostd.backend.connection import NO_COUNTERS, NO_COUNTS
from vhostd.backend.journal import Journal
from vhostd.backend.monitor import Monitor
from vhostd.backend.seat import DeviceSeat
from vhostd.backend.storage import Storage
from vhostd.backend.surroundings import Surroundings
from vhostd.backend.worker import VmWorker
from vhostd.config import VmConfig
from vhostd.devices.balloon import Balloon
from vhostd.devices.base import Device, DeviceEvent, Event, GuestRange, Refused
from vhostd.devices.mem import Mem
from vhostd.devices.memory_plan import MemoryGoal, MemRoom, boot_memory_size, plan_memory
from vhostd.devices.pmem import Pmem
from vhostd.log import LogEvent
from vhostd.memory.registry import MemoryRegistry
from vhostd.transport.connection import Connection
from vhostd.transport.listener import Listener

JsonObject = dict[str, Any]
AnyDevice = TypeVar("AnyDevice", bound=Device)

GOAL_EVENTS = (
    DeviceEvent.MEM_PLUGGED,
    DeviceEvent.MEM_UNPLUGGED_ALL,
    DeviceEvent.MEM_DISCARDED,
    DeviceEvent.MEM_STANDS_STILL,
)
"""After these the balloon may have another part of the goal to reach."""

STATES_BY_WEIGHT = ("quarantined", "running", "stopped", "connected", "waiting")
"""A VM is in the first of these that one of its devices is in."""


class Vm:
    """A VM's devices and what serves them.

    Attributes:
        balloon: its balloon, or None; devices outlive connections, as an operator's wishes do.
        mems: its virtio-mem devices by id, in the configuration's order.
        pmems: its virtio-pmem devices, likewise.
    """

    def __init__(
        self,
        config: VmConfig,
        sources: Sequence[Listener | Connection],
        registry: MemoryRegistry,
        journal: Journal,
    ) -> None:
        self.name = config.name
        self.config = config
        self._journal = journal
        self._monitor = None if config.qmp is None else Monitor(config.qmp, self, journal)
        self.mems = {mem.id: mem_of(mem) for mem in config.mems}
        self.pmems = {pmem.id: pmem_of(pmem) for pmem in config.pmems}
        self.balloon = None if config.balloon is None else balloon_of(config.balloon, self._windows)
        devices: dict[str, Device] = {
            **({} if self.balloon is None else {"balloon": self.balloon}),
            **self.mems,
            **self.pmems,
        }
        policies = {pmem.id: policy_of(pmem) for pmem in config.pmems}
        has_shmem = any(pmem.shmem_region_sizes for pmem in self.pmems.values())
        shared = Surroundings(
            self.name, registry, journal, self._stop_vm, self._vmm_connected, not has_shmem
        )
        self._seats = {
            name: DeviceSeat(name, device, source, shared, policies.get(name))
            for (name, device), source in zip(devices.items(), sources, strict=True)
        }
        self._goal: MemoryGoal | None = None
        journal.listen(self._on_news)
        self._tell_hotplug_size()

    async def run(self) -> None:
        """Serve VMMs until cancelled, or until all connections we were handed have ended."""
        async with VmWorker.open(self.name) as worker, trio.open_nursery() as nursery:
            if self._monitor is not None:
                nursery.start_soon(self._monitor.run)
            async with trio.open_nursery() as seats:
                for name, seat in self._seats.items():
                    if name in self.pmems:
                        seats.start_soon(self._run_apart, seat)
                    else:
                        seats.start_soon(seat.run, worker)
            nursery.cancel_scope.cancel()

    async def _run_apart(self, seat: DeviceSeat) -> None:
        """A device whose worker waits for a disk shares it with no other."""
        async with VmWorker.open(f"{self.name}:{seat.name}") as worker:
            await seat.run(worker)

    # -- what the machine does (monitor.MonitorOwner) ------------------------------------------

    @property
    def vmm_present(self) -> bool:
        """A VMM is connected to one of the devices."""
        return any(seat.connection is not None for seat in self._seats.values())

    def on_system_reset(self) -> None:
        """The machine was reset: no memory of a window is in use any more."""
        for name, mem in self.mems.items():
            self._seats[name].perform(mem.on_system_reset())

    def on_machine(self, pinning: Sequence[str], encryption: str | None) -> None:
        """Give no memory back while devices pin it; change nothing about encrypted memory."""
        why = f"guest memory is pinned by {', '.join(pinning)}" if pinning else None
        forbidden = None
        if encryption is not None:
            why = forbidden = f"guest memory is encrypted by {encryption}"
        for device in (self.balloon, *self.mems.values()):
            if device is not None:
                device.forbid(forbidden)
        self._inhibit(why)
        self._await_machine(False)

    def on_unreachable(self) -> None:
        """The monitor can't tell whether memory is pinned: what the operator configured is done."""
        self._await_machine(False)

    def _await_machine(self, awaited: bool) -> None:
        for name, mem in self.mems.items():
            self._seats[name].perform(mem.await_machine(awaited))

    def _inhibit(self, why: str | None) -> None:
        if self.balloon is not None and self.balloon.inhibited != why:
            self._seats["balloon"].perform(self.balloon.inhibit(why))
        for name, mem in self.mems.items():
            self._seats[name].perform(mem.inhibit(why))

    def _vmm_connected(self) -> None:
        if self._monitor is not None:
            # Another VMM, maybe, whose memory is pinned though that of the last one was not.
            self._await_machine(True)
            self._monitor.vmm_connected()

    def _stop_vm(self, why: str) -> None:
        if self._monitor is None:
            self._journal.log.error(
                LogEvent.VM_NOT_STOPPED, why=why, reason="no QMP socket is configured"
            )
        else:
            self._monitor.stop_vm(why)

    # -- what an operator wants ----------------------------------------------------------------

    def set_balloon_target(self, size: int) -> None:
        """Ask the guest to give up `size` bytes.

        Raises:
            Refused: it cannot be; the text says why.
        """
        effects = self.require_balloon().set_target(size)
        self._goal = None
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
        """A virtio-mem device by its id, or the only one.

        Raises:
            Refused: there is none of that id, or several to choose from.
        """
        return self._find("memory device", self.mems, device)

    def _find(self, kind: str, devices: Mapping[str, AnyDevice], device: str | None) -> AnyDevice:
        names = ", ".join(devices)
        if device is None:
            if len(devices) == 1:
                return next(iter(devices.values()))
            has = f"several: choose one of {names}" if devices else "none"
            raise Refused(f"which {kind}? VM {self.name!r} has {has}")
        if device not in devices:
            raise Refused(f"VM {self.name!r} has no {kind} {device!r}; it has {names or 'none'}")
        return devices[device]

    def resize_mem(self, device: str | None, size: int) -> str:
        """Ask the guest to use `size` bytes of a virtio-mem device; its id is returned.

        Raises:
            Refused: it cannot be; the text says why.
        """
        mem = self.find_mem(device)
        effects = mem.set_requested_size(size)
        self._goal = None
        self._seats[mem.options.id].perform(effects)
        self._tell_hotplug_size()
        return mem.options.id

    def find_pmem(self, device: str | None) -> Pmem:
        """A virtio-pmem device by its id, or the only one.

        Raises:
            Refused: there is none of that id, or several to choose from.
        """
        return self._find("disk", self.pmems, device)

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
        for effect in pmem.on_cleared():
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
        self._goal = MemoryGoal(boot_size, size)
        for name, requested in plan.requested.items():
            self._seats[name].perform(self.mems[name].set_requested_size(requested))
        self._tell_hotplug_size()
        self._pursue_goal()
        return {"size": size, "mem": plan.requested, "balloon": plan.balloon}

    def _on_news(self, vm_name: str, event: str, fields: Mapping[str, object]) -> None:
        del vm_name, fields
        if event == DeviceEvent.MEM_STANDS_STILL and self._goal is not None:
            self._goal.devices_done = True
        if event in GOAL_EVENTS:
            self._pursue_goal()

    def _pursue_goal(self) -> None:
        """Set the balloon to what the memory devices leave, once they have done what they can."""
        goal = self._goal
        if goal is None or self.balloon is None:
            return
        if all(mem.settled for mem in self.mems.values()):
            goal.devices_done = True
        left = goal.balloon(sum(mem.plugged_size for mem in self.mems.values()))
        # More than RAM it can't take, however far the memory devices are.
        target = min(left, self.balloon.guest_memory_size or left)
        if target < self.balloon.target or (goal.devices_done and target != self.balloon.target):
            try:
                effects = self.balloon.set_target(target)
            except Refused as error:
                self._goal = None
                self._journal.log.warning(LogEvent.GOAL_GIVEN_UP, size=goal.size, why=str(error))
            else:
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
        states = {seat.state for seat in self._seats.values()}
        return next(state for state in STATES_BY_WEIGHT if state in states)

    def status(self) -> JsonObject:
        """The object of `vhostctl --json status VM`; sizes in bytes."""
        devices = {name: self._device_status(seat) for name, seat in self._seats.items()}
        balloon = {} if self.balloon is None else {"balloon": devices["balloon"]}
        return {
            "vm": self.name,
            "state": self.state,
            **balloon,
            "mem": [devices[name] for name in self.mems],
            "pmem": [devices[name] for name in self.pmems],
            "usable": self._usable_size(),
            "usable_goal": None if self._goal is None else self._goal.size,
            "qmp": self._monitor is not None and self._monitor.connected,
            "connections": sum(seat.connections for seat in self._seats.values()),
            "connections_refused": sum(seat.connections_refused for seat in self._seats.values()),
            "faults": self._faults(),
            **self._counts(),
        }

    def _usable_size(self) -> int | None:
        """Bytes of RAM the guest may use, by its own word about the balloon; None: not known."""
        boot_size = self._find_boot_memory_size()
        if boot_size == 0:
            return None
        actual = 0 if self.balloon is None else self.balloon.actual
        return boot_size + sum(mem.plugged_size for mem in self.mems.values()) - actual

    def _device_status(self, seat: DeviceSeat) -> JsonObject:
        connection = seat.connection
        counters = NO_COUNTERS if connection is None else connection.counters()
        status = seat.device.status(counters, time.time())
        status["state"] = seat.state
        status["queues"] = {} if connection is None else connection.queues()
        return status

    def _faults(self) -> dict[str, str]:
        """Quarantined rings by index; of other devices than the balloon, by id/index."""
        return {
            str(index) if name == "balloon" else f"{name}/{index}": fault
            for name, seat in self._seats.items()
            if seat.connection is not None
            for index, fault in seat.connection.faults.items()
        }

    def _counts(self) -> Mapping[str, int]:
        counts = dict(NO_COUNTS)
        for seat in self._seats.values():
            if seat.connection is not None:
                for name, count in seat.connection.counts().items():
                    counts[name] += count
        return counts
