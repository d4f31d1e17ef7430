"""Is a memory table legal, and where in it does a frontend address lie? Pure lookups.

Knows addresses. Must not know files: what only they can tell (size, type, pages) is checked where
they are mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from vhostd.errors import FrontendError
from vhostd.protocol.wire import MemoryRegion

MEMORY_SLOTS_MAX: Final = 509
"""GET_MAX_MEM_SLOTS: what KVM leaves a guest with its slots reserved, as rust-vmm says it."""

GUEST_PAGE_SIZE: Final = 4096
"""Bytes; the smallest page a guest address or a slot can begin or end at."""


def check_table(regions: Sequence[MemoryRegion], *, guest_addresses: bool) -> None:
    """Check a whole memory table.

    Args:
        regions: every slot it would have.
        guest_addresses: GPA_ADDRESSES was acknowledged, so that both addresses must be one.

    Raises:
        FrontendError: too many slots, a slot that is not made of pages, or two that overlap in
            the guest's or in the VMM's address space.
    """
    if len(regions) > MEMORY_SLOTS_MAX:
        raise FrontendError(f"{len(regions)} memory slots, {MEMORY_SLOTS_MAX} are possible")
    for region in regions:
        if (region.guest_addr | region.size) % GUEST_PAGE_SIZE:
            raise FrontendError(f"memory region is not made of whole pages: {region}")
        if guest_addresses and region.frontend_addr != region.guest_addr:
            raise FrontendError(f"memory region has two addresses under GPA_ADDRESSES: {region}")
    _check_overlap("guest", sorted((region.guest_addr, region.size) for region in regions))
    _check_overlap("frontend", sorted((region.frontend_addr, region.size) for region in regions))


def guest_addr_of(regions: Sequence[MemoryRegion], frontend_addr: int, size: int) -> int:
    """Translate a range of `size` bytes; it must lie in one region whole.

    Raises:
        FrontendError: it does not.
    """
    for region in regions:
        offset = frontend_addr - region.frontend_addr
        if offset >= 0 and offset + size <= region.size:
            return region.guest_addr + offset
    raise FrontendError(
        f"{frontend_addr:#x}+{size:#x} is not inside one memory region", outside=frontend_addr
    )


def guest_end(regions: Sequence[MemoryRegion]) -> int:
    """The first guest address above all regions, bytes; 0 without any."""
    return max((region.guest_addr + region.size for region in regions), default=0)


def _check_overlap(space: str, spans: Sequence[tuple[int, int]]) -> None:
    for (start, size), (next_start, _size) in pairwise(spans):
        if start + size > next_start:
            raise FrontendError(
                f"memory regions at {space} addresses {start:#x} and {next_start:#x} overlap"
            )
