"""What all devices of a VM share. Values and callbacks only."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVarTuple

import trio

from vhostd.backend.journal import Journal
from vhostd.backend.keeping import VmKeeping
from vhostd.devices.base import GuestRange
from vhostd.memory.registry import MemoryRegistry
from vhostd.open_files import VmFiles

Arguments = TypeVarTuple("Arguments")


def unsupervised(error: BaseException) -> None:
    """Where nobody supervises a VM, its errors end it. Raises the error."""
    raise error


def start_apart(
    pause: Callable[[BaseException], None],
    work: Callable[[*Arguments], Awaitable[None]],
    *arguments: *Arguments,
) -> None:
    """Do something of a VM that may take longer than the VM is served, and holds up nobody's end.

    pause: gets what it raises, as any other error of the VM.
    """

    async def supervised() -> None:
        try:
            await work(*arguments)
        except Exception as error:  # noqa: BLE001  # else it would end the event loop, so all VMs
            pause(error)

    trio.lowlevel.spawn_system_task(supervised)


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
        pause: the one way to have this VM served no more: gets the error, and returns at once. In
            a task of the VM, raising the error does the same.
        keeping: what a successor gets.
        next_event: number of the event stream's next event.
        preallocated: windows whose memory was allocated ahead: a report takes none of it.
        files: open files set aside for it.
        memory_slots: the VMM may send its memory table slot by slot. QEMU 11.1 crashes at a reboot
            where one device has that and another has shared memory mapped.
    """

    vm_name: str
    registry: MemoryRegistry
    journal: Journal
    stop_vm: Callable[[str], None]
    connected: OnConnected
    pause: Callable[[BaseException], None] = unsupervised
    memory_slots: bool = True
    keeping: VmKeeping = field(default_factory=VmKeeping.none)
    next_event: Callable[[], int] = lambda: 0
    preallocated: tuple[GuestRange, ...] = ()
    files: VmFiles = field(default_factory=VmFiles)
