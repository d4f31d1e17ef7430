"""The values that cross into C and back, named as in c_src/vhd_api.h, where they are described."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum, IntEnum

from vhostd._native._core import lib
from vhostd.flags import Flags


class Fault(IntEnum):
    """Why a ring is quarantined."""

    NONE = lib.VHD_FAULT_NONE
    AVAIL_INDEX = lib.VHD_FAULT_AVAIL_INDEX
    HEAD = lib.VHD_FAULT_HEAD
    NEXT = lib.VHD_FAULT_NEXT
    LOOP = lib.VHD_FAULT_LOOP
    CHAIN_LENGTH = lib.VHD_FAULT_CHAIN_LENGTH
    INDIRECT = lib.VHD_FAULT_INDIRECT
    ZERO_LENGTH = lib.VHD_FAULT_ZERO_LENGTH
    ORDER = lib.VHD_FAULT_ORDER
    ADDRESS = lib.VHD_FAULT_ADDRESS
    SIZE = lib.VHD_FAULT_SIZE
    DUPLICATE = lib.VHD_FAULT_DUPLICATE
    PACKED_ID = lib.VHD_FAULT_PACKED_ID
    SIGBUS = lib.VHD_FAULT_SIGBUS


class Handler(Enum):
    """What runs a queue."""

    NONE = lib.VHD_HANDLER_NONE
    CONTROL = lib.VHD_HANDLER_CONTROL
    CONTROL_BLOCKS = lib.VHD_HANDLER_CONTROL_BLOCKS
    INFLATE = lib.VHD_HANDLER_INFLATE
    DEFLATE = lib.VHD_HANDLER_DEFLATE
    REPORT = lib.VHD_HANDLER_REPORT
    FLUSH = lib.VHD_HANDLER_FLUSH


class RingFeature(Flags):
    """Layout and habits of a ring."""

    PACKED = lib.VHD_RING_PACKED
    EVENT_IDX = lib.VHD_RING_EVENT_IDX
    INDIRECT = lib.VHD_RING_INDIRECT
    IN_ORDER = lib.VHD_RING_IN_ORDER
    LOG_USED = lib.VHD_RING_LOG_USED


class Event(Flags):
    """What the worker has to tell about a device."""

    SOCKET = lib.VHD_EVENT_SOCKET
    CONFIG = lib.VHD_EVENT_CONFIG
    CHAINS = lib.VHD_EVENT_CHAINS
    FAULT = lib.VHD_EVENT_FAULT
    HOST_ERROR = lib.VHD_EVENT_HOST_ERROR
    FLUSH_FAILED = lib.VHD_EVENT_FLUSH_FAILED


class BalloonFlag(Flags):
    """How the data plane treats pages."""

    MUST_TELL_HOST = lib.VHD_BALLOON_MUST_TELL_HOST
    PAGE_POISON = lib.VHD_BALLOON_PAGE_POISON
    MAY_DISCARD = lib.VHD_BALLOON_MAY_DISCARD


@dataclass(frozen=True, slots=True)
class RingPosition:
    """Where a ring stands, in descriptors; wrap counters are 0 or 1 and of packed rings only."""

    next_avail: int = 0
    next_used: int = 0
    avail_wrap: int = 1
    used_wrap: int = 1


@dataclass(frozen=True, slots=True)
class RingSetup:
    """struct vhd_ring_setup: guest addresses; file descriptors stay the caller's, -1 = none.

    Attributes:
        start_number: the caller's own, another for each start of the ring; see resume_ring().
    """

    size: int
    features: RingFeature
    desc_addr: int
    avail_addr: int
    used_addr: int
    log_addr: int
    position: RingPosition
    handler: Handler
    kick_fd: int
    call_fd: int
    err_fd: int
    start_number: int = 0


@dataclass(frozen=True, slots=True)
class Chain:
    """struct vhd_chain and the readable bytes that were copied; sizes in bytes."""

    token: int
    position: int
    data: bytes
    readable_size: int
    writable_count: int
    writable_size: int
    writable_addr: int


@dataclass(frozen=True, slots=True)
class RingStatistics:
    """struct vhd_ring_shared at one moment.

    Attributes:
        fault_addr: the guest address that is in no region; None: not known, or another fault.
    """

    position: RingPosition
    started: bool
    enabled: bool
    fault: Fault
    fault_addr: int | None
    taken: bool
    kicks: int
    chains: int
    used: int
    calls: int
    calls_dropped: int
    faults: int
    rejected: int

    def counters(self) -> dict[str, int]:
        """The numbers that only grow, by name."""
        names = ("kicks", "chains", "used", "calls", "calls_dropped", "faults", "rejected")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class BalloonCounters:
    """struct vhd_balloon_counters at one moment; _pages and pfns of 4 KiB, _size in bytes."""

    inflated_pages: int = 0
    inflate_pfns: int = 0
    deflate_pfns: int = 0
    reported_size: int = 0
    discarded_size: int = 0
    discards: int = 0
    discard_errors: int = 0
    discard_errno: int = 0
    pfns_outside: int = 0
    pfns_repeated: int = 0
    pfns_excess: int = 0
    reports_refused: int = 0
    pages_kept: int = 0
    withheld_size: int = 0
    outside_addr: int = 0

    def as_dict(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class PmemCounters:
    """struct vhd_pmem_counters at one moment."""

    flushes: int = 0
    flush_errors: int = 0
    malformed: int = 0
    batches: int = 0

    def as_dict(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ImageStatistics:
    """struct vhd_image_shared at one moment; times in nanoseconds.

    Attributes:
        failed_errno: not 0: a sync failed with it, and all later ones do.
    """

    failed_errno: int
    syncs: int
    sync_ns: int
    sync_ns_last: int
    sync_ns_max: int


@dataclass(frozen=True, slots=True)
class ImageCache:
    """Page cache of an image; bytes."""

    cached: int
    dirty: int
    writeback: int
