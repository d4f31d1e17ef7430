"""Is a ring's set-up legal, where are its parts for the guest, and how is its position encoded?

Knows split and packed rings' sizes and alignments (virtio 1.3, 2.7 and 2.8). Must not know when
which message may come.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from vhostd.errors import FrontendError
from vhostd.protocol.features import VirtioFeature
from vhostd.protocol.wire import MemoryRegion
from vhostd.session.actions import RingPosition, RingSetup
from vhostd.session.memory_table import GUEST_PAGE_SIZE, guest_addr_of
from vhostd.session.state import LogWindow, RingAddresses, RingState, SessionState

RING_SIZE_MIN: Final = 2
"""A ring of one descriptor cannot hold a request and its answer; no driver makes one."""

RING_SIZE_MAX: Final = 32768
"""virtio 1.3, 2.6 "Virtqueues": Queue Size."""

BEGINNING: Final = RingPosition(avail_wrap=1, used_wrap=1)
"""Where a driver's ring starts (virtio 1.3, 2.8.1: both wrap counters are 1)."""

_INDEX_MASK: Final = 0x7FFF
_WRAP: Final = 0x8000
_HALF: Final = 0x1_0000


def check_size(size: int, *, packed: bool) -> None:
    """Check a number of descriptors.

    Raises:
        FrontendError: out of range, or no power of two where the layout needs one.
    """
    if not RING_SIZE_MIN <= size <= RING_SIZE_MAX or not (packed or size & (size - 1) == 0):
        raise FrontendError(f"ring of {size} descriptors")


def check_alignment(addresses: RingAddresses, *, packed: bool) -> None:
    """Check what the drivers' layouts promise: 16, 2 and 4 bytes; packed 16, 4 and 4.

    Raises:
        FrontendError: a part is not aligned.
    """
    avail_alignment = 4 if packed else 2
    if addresses.desc % 16 or addresses.avail % avail_alignment or addresses.used % 4:
        raise FrontendError(f"ring parts are not aligned: {addresses}")


def part_sizes(size: int, features: int) -> tuple[int, int, int]:
    """Bytes of the descriptor, available (driver) and used (device) part of a ring."""
    if features & VirtioFeature.RING_PACKED:
        return 16 * size, 4, 4
    event = 2 if features & VirtioFeature.RING_EVENT_IDX else 0
    return 16 * size, 4 + 2 * size + event, 4 + 8 * size + event


def locate(ring: RingState, features: int, regions: Sequence[MemoryRegion]) -> RingAddresses:
    """Where the ring's parts are for the guest.

    Raises:
        FrontendError: size or addresses are missing or illegal, a part is not inside one region,
            or two parts overlap.
    """
    packed = bool(features & VirtioFeature.RING_PACKED)
    check_size(ring.size, packed=packed)
    if ring.addresses is None:
        raise FrontendError("ring without addresses")
    check_alignment(ring.addresses, packed=packed)
    sizes = part_sizes(ring.size, features)
    told = (ring.addresses.desc, ring.addresses.avail, ring.addresses.used)
    found = [guest_addr_of(regions, addr, size) for addr, size in zip(told, sizes, strict=True)]
    spans = sorted(zip(found, sizes, strict=True))
    for (start, size), (next_start, _size) in pairwise(spans):
        if start + size > next_start:
            raise FrontendError(f"ring parts overlap: {ring.addresses}")
    return RingAddresses(*found)


def check_log(ring: RingState, features: int, log: LogWindow | None) -> None:
    """Check that the dirty log has a bit for every byte of the used ring.

    The spec lets log_addr be outside guest RAM, but not outside the log.

    Raises:
        FrontendError: it has not.
    """
    if not ring.log_used or log is None:
        return
    _desc, _avail, used_size = part_sizes(ring.size, features)
    last_page = (ring.log_addr + used_size - 1) // GUEST_PAGE_SIZE
    if last_page // 8 >= log.size:
        raise FrontendError(f"used ring is logged at {ring.log_addr:#x}, beyond the log's end")


def set_up(state: SessionState, index: int, ring: RingState) -> RingSetup:
    """Everything a start needs, checked.

    Raises:
        FrontendError: the ring cannot start like this.
    """
    regions = [region.announced for region in state.regions]
    addresses = locate(ring, state.features, regions)
    check_log(ring, state.features, state.log)
    return RingSetup(
        index=index,
        size=ring.size,
        features=state.features,
        addresses=addresses,
        log_used=ring.log_used,
        log_addr=ring.log_addr,
        position=position_of(base_in_force(ring, state), ring.size, packed=state.packed),
        enabled=ring.enabled,
        start_number=ring.start_number,
    )


def base_in_force(ring: RingState, state: SessionState) -> int:
    """What GET_VRING_BASE answers for a stopped ring."""
    if ring.base is not None:
        return ring.base
    return base_of(BEGINNING, packed=state.packed)


def at_beginning(position: RingPosition, *, packed: bool) -> bool:
    """A driver that has just started would have its ring here."""
    return position.next_avail == 0 and (not packed or position.avail_wrap == 1)


def position_of(base: int, size: int, *, packed: bool) -> RingPosition:
    """Read the number of SET_VRING_BASE.

    Split: the available index. Packed: bits 0-14 available index, 15 its wrap counter, 16-30 used
    index, 31 its wrap counter. Front ends older than that layout send the lower half only: then
    the used side stands where the available side does, since we complete chains in order.

    Args:
        base: the number.
        size: descriptors of the ring; 0 = not known, indices are not checked.
        packed: the layout.

    Raises:
        FrontendError: an index no such ring has.
    """
    if not packed:
        if base >= _HALF:
            raise FrontendError(f"base {base:#x} of a split ring")
        return RingPosition(next_avail=base)
    avail, used = base % _HALF, base // _HALF or base % _HALF
    position = RingPosition(
        next_avail=avail & _INDEX_MASK,
        next_used=used & _INDEX_MASK,
        avail_wrap=int(bool(avail & _WRAP)),
        used_wrap=int(bool(used & _WRAP)),
    )
    if size and max(position.next_avail, position.next_used) >= size:
        raise FrontendError(f"base {base:#x} of a packed ring of {size} descriptors")
    return position


def base_of(position: RingPosition, *, packed: bool) -> int:
    """Write the number GET_VRING_BASE answers with; position_of() reads it."""
    if not packed:
        return position.next_avail
    avail = position.next_avail | position.avail_wrap * _WRAP
    used = position.next_used | position.used_wrap * _WRAP
    return used * _HALF | avail
