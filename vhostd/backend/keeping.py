"""What a successor gets of one VM: its state, committed before anybody learns of a change.

Knows records and where they go. Must not know what they mean, nor how a successor uses them.
"""

from __future__ import annotations

from typing import Final

import msgspec

from vhostd.backend.lasting import Lasting
from vhostd.devices.base import Device, LargeState
from vhostd.devices.verdict import Verdict
from vhostd.fds import OwnedFd
from vhostd.handover.fd_store import DeviceKeeping, FdStore, NoStore
from vhostd.handover.large_state import LargeMemfd
from vhostd.handover.state_memfd import StateMemfd, StateTooLarge
from vhostd.handover.vm_record import (
    VERSION,
    DeviceRecord,
    Owed,
    VmRecord,
    encode,
    encode_device,
)
from vhostd.session.state import SessionState
from vhostd.transport.connection import Connection

STATE: Final = "state"
LISTEN: Final = "listen"
"""Role of a device's listening socket."""
CAPACITY_FIRST: Final = 16384
"""Bytes; a balloon and a virtio-mem device of a few hundred runs need some 4 KiB."""


def large_role(device: str) -> str:
    """What a device's large state is called among what is kept of its VM."""
    return f"large.{device}"


class VmKeeping:
    """A VM's state memfd, and the descriptors that are no single device's.

    Attributes:
        store: where descriptors are kept.
        vm_name: whose it is.
        active: what happens is recorded, if there is a store.
        lasting: what outlives the host; None: nothing does.
        left: connections of a paused VM, which a successor goes on with.
        hung_up: a connection of a paused VM was closed, since nobody keeps it.
    """

    def __init__(
        self,
        store: FdStore,
        vm_name: str,
        adopted: StateMemfd | None = None,
        lasting: Lasting | None = None,
    ) -> None:
        """adopted: a predecessor's memfd, ours from here on."""
        self.lasting = lasting
        self.store = store
        self.active = True
        self.left: list[OwnedFd] = []
        self.hung_up = False
        self._paused = False
        self._of_devices: list[DeviceKeeping] = []
        self.vm_name = vm_name
        self._wide = DeviceKeeping(store, vm_name)
        self._devices: dict[str, msgspec.Raw] = {}
        self._goal: tuple[int, int, bool] | None = None
        self._verdict: tuple[str, str] | None = None
        self._large: dict[str, LargeMemfd] = {}
        self._memfd = adopted
        if adopted is not None:
            self._wide.adopt(STATE)

    def begin_with(self, record: VmRecord) -> None:
        """What a predecessor recorded stays until it is replaced."""
        self._devices = dict(record.devices)
        self._goal = record.goal
        self._verdict = record.verdict

    def adopt_large(self, name: str, memfd: LargeMemfd) -> None:
        """A predecessor's, with the changes of its record made; ours from here on."""
        self._large[name] = memfd
        self._wide.adopt(large_role(name))

    @classmethod
    def none(cls) -> VmKeeping:
        """Nobody keeps anything."""
        return cls(NoStore(), "")

    def of_device(self, device: str) -> DeviceKeeping:
        """Where the descriptors of a device go."""
        keeping = DeviceKeeping(self.store, self.vm_name, device)
        self._of_devices.append(keeping)
        return keeping

    def commit(
        self,
        name: str,
        device: Device,
        session: SessionState | None,
        owed: Owed | None,
        next_event: int,
        outside: int | None = None,
    ) -> None:
        """Record a device's state; once this returns a successor goes on from there.

        Args:
            name: of the device.
            session, owed: of its connection, None where there is none.
            next_event: number of the event stream's next event.
            outside: see DeviceRecord.

        Raises:
            HostError: no memory for it.
        """
        if self.lasting is not None:
            self.lasting.note(name, device.lasting())
        large = device.large_state
        changes = None if large is None else large.take_changes()
        if not (self.active and self.store.working):
            return
        if large is None or changes is None:
            record = DeviceRecord(device.save(), session, owed, None, outside)
        else:
            if name not in self._large:
                self._begin_large(name, large)
            record = DeviceRecord(large.save_rest(), session, owed, changes, outside)
        self._devices[name] = encode_device(record)
        self._write(next_event)
        if changes:
            self._large[name].change(changes)

    def _begin_large(self, name: str, large: LargeState) -> None:
        # Before a record says that it is there. One that does not is whole without it.
        memfd = LargeMemfd.create(f"vhostd-{self.vm_name}-{name}", large.content())
        self._wide.keep(large_role(name), memfd.fileno())
        self._large[name] = memfd

    def commit_goal(self, goal: tuple[int, int, bool] | None, next_event: int) -> None:
        """Record what `memory set` is after."""
        if self.active and self.store.working and goal != self._goal:
            self._goal = goal
            self._write(next_event)

    def commit_verdict(self, verdict: Verdict, next_event: int) -> None:
        """Record what the monitor said of the machine."""
        if self.active and self.store.working:
            self._verdict = (verdict.finding.value, verdict.detail)
            self._write(next_event)

    def leave(self) -> None:
        """Record nothing any more: what comes now is only our own end."""
        self.active = False

    def pause(self) -> None:
        """Leave all as it is to a successor, though we live on. Nobody accepts new VMMs."""
        if not self.active:
            return
        self.active = False
        self._paused = True
        for device in self._of_devices:
            device.forget(LISTEN)
        self.store.leave_vm(self.vm_name)

    def leave_connection(self, connection: Connection) -> None:
        """A VMM's connection did not end by itself: let go of it, and have it kept if it is."""
        if not self._paused:
            connection.leave()
        elif self.store.working:
            self.left.append(connection.detach())
        else:
            # Nobody will ever answer: a VMM that waits for us would wait for ever.
            connection.close()
            self.hung_up = True

    def _write(self, next_event: int) -> None:
        payload = encode(
            VmRecord(VERSION, self.vm_name, self._devices, self._goal, next_event, self._verdict)
        )
        if self._memfd is None:
            self._replace(StateMemfd.create(f"vhostd-{self.vm_name}", CAPACITY_FIRST))
        assert self._memfd is not None, "made above"
        try:
            self._memfd.write(payload)
        except StateTooLarge:
            self._replace(self._memfd.grown(2 * len(payload)))
            self._memfd.write(payload)

    def _replace(self, memfd: StateMemfd) -> None:
        old, self._memfd = self._memfd, memfd
        self._wide.keep(STATE, memfd.fileno())
        if old is not None:
            old.close()
