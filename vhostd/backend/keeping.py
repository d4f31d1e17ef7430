"""What a successor gets of one VM: its state, committed before anybody learns of a change.

Knows records and where they go. Must not know what they mean, nor how a successor uses them.
"""

from __future__ import annotations

from typing import Final

import msgspec

from vhostd.backend.lasting import Lasting
from vhostd.devices.base import Device
from vhostd.devices.verdict import Verdict
from vhostd.fds import OwnedFd
from vhostd.handover.fd_store import DeviceKeeping, FdStore, NoStore
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


class VmKeeping:
    """A VM's state memfd, and the descriptors that are no single device's.

    Attributes:
        store: where descriptors are kept.
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
        self._vm_name = vm_name
        self._wide = DeviceKeeping(store, vm_name)
        self._devices: dict[str, msgspec.Raw] = {}
        self._goal: tuple[int, int, bool] | None = None
        self._verdict: tuple[str, str] | None = None
        self._memfd = adopted
        if adopted is not None:
            self._wide.adopt(STATE)

    def begin_with(self, record: VmRecord) -> None:
        """What a predecessor recorded stays until it is replaced."""
        self._devices = dict(record.devices)
        self._goal = record.goal
        self._verdict = record.verdict

    @classmethod
    def none(cls) -> VmKeeping:
        """Nobody keeps anything."""
        return cls(NoStore(), "")

    def of_device(self, device: str) -> DeviceKeeping:
        """Where the descriptors of a device go."""
        keeping = DeviceKeeping(self.store, self._vm_name, device)
        self._of_devices.append(keeping)
        return keeping

    def commit(
        self,
        name: str,
        device: Device,
        session: SessionState | None,
        owed: Owed | None,
        next_event: int,
    ) -> None:
        """Record a device's state; once this returns a successor goes on from there.

        Args:
            name: of the device.
            session, owed: of its connection, None where there is none.
            next_event: number of the event stream's next event.

        Raises:
            HostError: no memory for it.
        """
        if self.lasting is not None:
            self.lasting.note(name, device.lasting())
        if self.active and self.store.working:
            self._devices[name] = encode_device(DeviceRecord(device.save(), session, owed))
            self._write(next_event)

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
        self.store.leave_vm(self._vm_name)

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
            VmRecord(VERSION, self._vm_name, self._devices, self._goal, next_event, self._verdict)
        )
        if self._memfd is None:
            self._replace(StateMemfd.create(f"vhostd-{self._vm_name}", CAPACITY_FIRST))
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
