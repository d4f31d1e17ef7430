"""What all devices of a VM share. Values and callbacks only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from vhostd.backend.journal import Journal
from vhostd.backend.keeping import VmKeeping
from vhostd.memory.registry import MemoryRegistry


class OnConnected(Protocol):
    """Called when a VMM's connection is served; resumed: a predecessor served it already."""

    def __call__(self, *, resumed: bool) -> None:
        """Must not block."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The VM around a device.

    Attributes:
        stop_vm: has the VMM pause the VM; its argument says why.
        connected: called when a VMM's connection is served.
        keeping: what a successor gets.
        next_event: number of the event stream's next event.
        memory_slots: the VMM may send its memory table slot by slot. QEMU 11.1 crashes at a reboot
            where one device has that and another has shared memory mapped.
    """

    vm_name: str
    registry: MemoryRegistry
    journal: Journal
    stop_vm: Callable[[str], None]
    connected: OnConnected
    memory_slots: bool = True
    keeping: VmKeeping = field(default_factory=VmKeeping.none)
    next_event: Callable[[], int] = lambda: 0
