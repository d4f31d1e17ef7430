"""What the control API asks of the daemon. Protocols and values only; knows no HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from vhostd.control.events import EventStream

JsonObject: TypeAlias = dict[str, Any]


class HintAction(StrEnum):
    """What may be done with a free page hinting round."""

    START = "start"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class MemoryWindow:
    """The hidden memory a device needs: guest-physical address, bytes, the guest's NUMA node.

    Attributes:
        file: what it must be, absolute path; None: memory of its own.
    """

    address: int
    size: int
    node: int
    file: Path | None = None
    readonly: bool = False


@dataclass(frozen=True, slots=True)
class DeviceSocket:
    """One device as a VMM's command line must describe it.

    Attributes:
        kind: "balloon", "mem" or "pmem".
        id: the device's id in QEMU, unique in its VM.
        path: absolute path of its vhost-user socket.
        window: None where it needs none.
    """

    kind: str
    id: str
    path: Path
    virtio_id: int
    queue_count: int
    config_size: int
    queue_size: int
    window: MemoryWindow | None = None


class VmChanges(Protocol):
    """What the control API can do to a VM.

    Each raises a VhostdError when it refuses; its text is the reason.
    """

    async def set_balloon_target(self, size: int) -> None:
        """Set the balloon's size, in bytes; returns once the wish is on its way."""

    async def request_statistics(self) -> None:
        """Ask the guest for statistics; a "balloon_statistics" event tells when they came."""

    async def balloon_hint(self, action: HintAction) -> None:
        """Open or break off a free page hinting round."""

    async def resize_mem(self, device: str | None, size: int) -> str:
        """Set the requested size of a virtio-mem device, in bytes; its id comes back.

        device: its id; None: the only one.
        """

    async def flush_pmem(self, device: str | None) -> str:
        """Make a disk's image durable; its id comes back. device: its id; None: the only one."""

    async def drop_pmem_cache(self, device: str | None) -> JsonObject:
        """Give a disk's page cache back to the host; see verbs.CacheDropped."""

    async def clear_pmem(self, device: str | None) -> str:
        """Let flushes of a disk succeed again after a failure; its id comes back."""

    async def set_memory(self, size: int) -> JsonObject:
        """Set the guest's usable memory, in bytes; see verbs.MemoryPlan for what comes back."""


class VmView(Protocol):
    """One VM as the control API sees it."""

    @property
    def devices(self) -> Sequence[DeviceSocket]:
        """The VM's devices, in the configuration's order."""

    @property
    def changes(self) -> VmChanges:
        """What can be done to it. Raises a VhostdError: nothing, it is paused."""

    def status(self) -> JsonObject:
        """The object `vhostctl --json status VM` prints, see verbs.VmStatus; never blocks."""


class Daemon(Protocol):
    """The daemon as the control API sees it.

    Attributes:
        events: where everything that happens to VMs is published.
    """

    @property
    def events(self) -> EventStream: ...

    def vms(self) -> Mapping[str, VmView]:
        """All VMs by name, in the configuration's order."""
