"""The window of a virtio-mem device: its options, and blocks to addresses and back.

Arithmetic only. Must not know which blocks are plugged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vhostd.devices.base import GuestRange, MemorySlot
from vhostd.devices.mem_blocks import Run
from vhostd.devices.mem_request import Request
from vhostd.devices.mem_violations import OnViolation
from vhostd.units import GiB, MiB, align_up, format_size

USABLE_SLACK_SIZE: Final = 256 * MiB
"""Two Linux memory blocks of 128 MiB; Linux uses whole ones only, and QEMU gives as much."""
LARGE_GUEST_SIZE: Final = 64 * GiB
LARGE_GUEST_SLACK_SIZE: Final = 4 * GiB
"""From 64 GiB on Linux may make its memory blocks 2 GiB (arch/x86/mm/init_64.c)."""


@dataclass(frozen=True, slots=True)
class MemOptions:
    """One device as the configuration describes it; all sizes are multiples of block_size.

    Attributes:
        address: of the window, guest-physical.
        size: of the window: the most the device can add.
        node: the guest's NUMA node, as an ACPI proximity domain.
        host_node: the host NUMA node its memory comes from; None: any.
        prealloc: populate a block before the guest may use it.
    """

    id: str
    address: int
    size: int
    block_size: int = 2 * MiB
    requested_size: int = 0
    node: int = 0
    host_node: int | None = None
    prealloc: bool = False
    on_violation: OnViolation = OnViolation.REPORT
    packed: bool = True
    in_order: bool = True

    @property
    def window(self) -> GuestRange:
        """Where the device's memory is in the guest."""
        return GuestRange(self.address, self.size)

    @property
    def block_count(self) -> int:
        """Blocks of the window."""
        return self.size // self.block_size

    def usable_size(self, requested_size: int, *, large_guest: bool) -> int:
        """Bytes from the window's start in which the guest may plug `requested_size` bytes.

        Linux uses whole memory blocks only, so it needs more room than it takes.
        """
        if requested_size == 0:
            return 0
        slack = LARGE_GUEST_SLACK_SIZE if large_guest else USABLE_SLACK_SIZE
        return min(self.size, align_up(requested_size + slack, self.block_size))

    def run(self, request: Request, usable_size: int) -> Run | None:
        """The blocks a request is about; None if they are not whole or not usable."""
        offset = request.addr - self.address
        size = request.nb_blocks * self.block_size
        if offset < 0 or offset % self.block_size or not size or offset + size > usable_size:
            return None
        return offset // self.block_size, request.nb_blocks

    def range(self, run: Run) -> GuestRange:
        """Where blocks are in the guest."""
        first, count = run
        return GuestRange(self.address + first * self.block_size, count * self.block_size)

    def blocks_of(self, part: GuestRange) -> Run:
        """The blocks a range of the window touches."""
        first = (part.guest_addr - self.address) // self.block_size
        end = -(-(part.end - self.address) // self.block_size)
        return first, end - first

    def missing(self, regions: Sequence[MemorySlot]) -> str | None:
        """What to tell an operator whose VMM has no window that can be used; None if it has."""
        for region in regions:
            # Exactly that: a region that merely holds the window is the guest's own RAM, and a
            # mistaken address would have it emptied.
            if (region.guest_addr, region.size) == (self.address, self.size):
                if self.block_size % region.page_size == 0:
                    return None
                return (
                    f"the window's pages of {format_size(region.page_size)} can't be given back in"
                    f" blocks of {format_size(self.block_size)}: set block_size to that or more"
                )
        return (
            f"the VMM has no region of exactly {format_size(self.size)} at {self.address:#x} in its"
            " shared memory: give it the options `vhostctl qemu-args` prints"
        )
