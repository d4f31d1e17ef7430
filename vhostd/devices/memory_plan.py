"""How a guest gets to a size: memory devices first, block by block, then the balloon.

Arithmetic only. Must not know how any of it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vhostd.devices.base import GuestRange, Refused
from vhostd.units import BALLOON_PAGE_SIZE, align_down, align_up, format_size


@dataclass(frozen=True, slots=True)
class MemRoom:
    """A memory device that can take part; bytes."""

    id: str
    size: int
    block_size: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes in bytes: requested of each memory device by id, and the balloon's target."""

    requested: dict[str, int]
    balloon: int


@dataclass(slots=True)
class MemoryGoal:
    """A size asked for, on the way: memory devices move first, the balloon takes the rest.

    Both at once would work against each other: pages in the balloon lie in blocks that are to be
    unplugged, and each of them is moved, maybe many times.

    Attributes:
        size: usable memory in bytes.
        devices_done: the memory devices are where they should be, or move no further for now.
    """

    boot_size: int
    size: int
    devices_done: bool = False

    def balloon(self, plugged_size: int) -> int:
        """The balloon's target while so much is plugged; bytes."""
        return max(0, self.boot_size + plugged_size - self.size)


def boot_memory_size(regions: Sequence[GuestRange], windows: Sequence[GuestRange]) -> int:
    """Bytes of a VMM's memory table that are no device's window."""
    return sum(
        region.size
        for region in regions
        if not any(
            window.guest_addr <= region.guest_addr and region.end <= window.end
            for window in windows
        )
    )


def plan_memory(
    boot_size: int, devices: Sequence[MemRoom], size: int, *, has_balloon: bool
) -> MemoryPlan:
    """Work out how the guest gets `size` bytes of usable memory.

    Devices are filled in order. A size that is no whole number of blocks is plugged up to the next
    one, and the balloon takes the rest out in whole pages of 4 KiB; without a balloon the guest
    keeps it.

    Raises:
        Refused: more than boot memory and all windows, or less than the boot memory and there is no
            balloon.
    """
    most = boot_size + sum(device.size for device in devices)
    if size > most:
        raise Refused(
            f"the guest can have {format_size(most)} at most ({most} bytes: {boot_size} of boot"
            f" memory and {most - boot_size} of memory devices), {size} bytes are more"
        )
    if size < boot_size and not has_balloon:
        raise Refused(
            f"the guest booted with {format_size(boot_size)} and has no balloon that could take"
            " any of it"
        )
    missing = max(0, size - boot_size)
    requested: dict[str, int] = {}
    for device in devices:
        requested[device.id] = min(device.size, align_up(missing, device.block_size))
        missing = max(0, missing - requested[device.id])
    surplus = boot_size + sum(requested.values()) - size
    return MemoryPlan(requested, align_down(surplus, BALLOON_PAGE_SIZE) if has_balloon else 0)
