"""What a predecessor left of one connection: its record, and the descriptors in the store.

Hands them out once each. Must not know what becomes of them.
"""

from __future__ import annotations

import errno
import socket

import msgspec

from vhostd import _native
from vhostd.backend.keeping import STATE, large_role
from vhostd.devices.base import Device, JsonObject
from vhostd.devices.verdict import Verdict
from vhostd.errors import PauseVm
from vhostd.fds import OwnedFd
from vhostd.handover.fd_store import VM_WIDE, DeviceKeeping, FdStore
from vhostd.handover.kept_fds import KeptFds
from vhostd.handover.large_state import LargeMemfd
from vhostd.handover.state_memfd import StateDamaged, StateMemfd
from vhostd.handover.vm_record import DeviceRecord, VmRecord, decode, decode_device
from vhostd.memory.registry import MemoryRegistry
from vhostd.session.state import SessionState
from vhostd.transport.backend_channel import BackendChannel
from vhostd.transport.connection import Connection


class Left:
    """One device's legacy.

    Attributes:
        record: what its state memfd says.
        session: of the connection.
    """

    def __init__(
        self, record: DeviceRecord, session: SessionState, kept: KeptFds, names: DeviceKeeping
    ) -> None:
        self.record = record
        self.session = session
        self._kept = kept
        self._names = names

    def take(self, role: str) -> OwnedFd | None:
        """The descriptor of a role, ours from here on; None: it was not kept."""
        return self._kept.take(self._names.name(role))

    def native(self, device: Device) -> _native.Device:
        """The worker's side of the device.

        Raises:
            OSError: it was not kept, or there is no memory or descriptor for it.
            PauseVm: it is of another release or kind of device.
        """
        shared, reply = self.take("shared"), self.take("reply")
        if shared is None or reply is None:
            raise OSError(errno.ENOENT, "the worker's memory was not kept")
        with shared, reply:
            try:
                return _native.Device.adopt(
                    shared.fileno(),
                    reply.fileno(),
                    device.queue_count,
                    device.config_size,
                    device.config_writable,
                )
            except OSError as error:
                if error.errno != errno.EPROTO:
                    raise
                raise PauseVm(
                    "what a predecessor's worker left is of another release, or of another kind of"
                    " device",
                    "start the release that left it, or restart the VM",
                ) from error

    def connection(self) -> Connection | None:
        """The VMM's socket."""
        file = self.take("connection")
        return None if file is None else Connection(socket.socket(fileno=file.take()))

    def channel(self, *, reply_ack: bool) -> BackendChannel | None:
        """The channel for back-end requests, in the middle of one maybe."""
        file, outbox = self.take("channel"), self.take("outbox")
        if file is None or outbox is None:
            return None
        return BackendChannel.resume(file, outbox, reply_ack=reply_ack)


class VmLeft:
    """What a predecessor left of a VM; made by read().

    Attributes:
        record: what its state memfd says.
    """

    def __init__(self, record: VmRecord, kept: KeptFds) -> None:
        self.record = record
        self._kept = kept
        self._devices = {name: decode_device(raw) for name, raw in record.devices.items()}

    def device(self, name: str) -> JsonObject | None:
        """What a device had saved."""
        record = self._devices.get(name)
        return None if record is None else record.device

    @property
    def verdict(self) -> Verdict | None:
        """What the monitor had said of the machine; None: nothing that is understood."""
        try:
            return msgspec.convert(self.record.verdict, Verdict | None)
        except msgspec.ValidationError:
            return None  # of a release that knows more findings: it is asked for again

    def large_state(self, vm_name: str, name: str) -> LargeMemfd | None:
        """A device's large state, as its record says it is; None: it had none.

        Raises:
            StateDamaged: it was not kept, or is none.
        """
        record = self._devices.get(name)
        if record is None or record.changes is None:
            return None
        fd = self._kept.take(f"{vm_name}/{VM_WIDE}/{large_role(name)}")
        if fd is None:
            raise StateDamaged(f"{name}: a part of its state was not kept")
        memfd = LargeMemfd.adopt(fd)
        memfd.change(record.changes)
        return memfd

    def of(self, name: str, names: DeviceKeeping) -> Left | None:
        """What was left of a device's connection, if it had one."""
        record = self._devices.get(name)
        if record is None or record.session is None:
            return None
        return Left(record, record.session, self._kept, names)

    def close(self, vm_name: str, store: FdStore) -> None:
        """Let go of what nobody wanted."""
        self._kept.let_go(vm_name, store)

    async def map_memory(self, vm_name: str, registry: MemoryRegistry) -> None:
        """Map the VM's memory files, with what is known of the balloon in them.

        Raises:
            HostError: it can't be.
        """
        prefix = f"{vm_name}/{VM_WIDE}/"
        for name in self._kept.names(prefix + "memory."):
            file = self._kept.take(name)
            bitmap = self._kept.take(name.replace("/memory.", "/bitmap."))
            if file is None:
                continue
            await registry.adopt(vm_name, file, bitmap)


def read_left(vm_name: str, kept: KeptFds) -> tuple[VmLeft, StateMemfd] | None:
    """What a predecessor left of a VM, and its state memfd; None: nothing.

    Raises:
        StateDamaged, StateVersionUnknown: it left something that is not to be trusted.
    """
    file = kept.take(f"{vm_name}/{VM_WIDE}/{STATE}")
    if file is None:
        return None
    memfd = StateMemfd.adopt(file)
    payload = memfd.read()
    if payload is None:
        memfd.close()
        return None
    return VmLeft(decode(payload), kept), memfd
