"""All that a connection has agreed on, as plain frozen data.

Numbers, flags and tuples only, so that a successor process can be handed it (msgspec encodes and
decodes these classes as they are). Descriptors are not in here: flags say which ones the shell
holds. Must not know how any of it came about.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from vhostd.protocol.features import ProtocolFeature, VirtioFeature
from vhostd.protocol.wire import MemoryRegion


@dataclass(frozen=True, slots=True)
class GuestRegion:
    """One slot of the memory table in force. Addresses and sizes in bytes."""

    guest_addr: int
    size: int
    frontend_addr: int
    file_offset: int
    device: int  # st_dev and st_ino of its file: what survives the descriptor's number
    inode: int

    @property
    def announced(self) -> MemoryRegion:
        """The slot as the VMM described it."""
        return MemoryRegion(self.guest_addr, self.size, self.frontend_addr, self.file_offset)


@dataclass(frozen=True, slots=True)
class LogWindow:
    """Where the dirty log is in its file, bytes; one bit a 4 KiB guest page, from address 0 on."""

    size: int
    file_offset: int


@dataclass(frozen=True, slots=True)
class RingAddresses:
    """Where the three parts of a ring are; the owner says in which address space.

    Packed rings: descriptor ring, driver event suppression, device event suppression.
    """

    desc: int
    avail: int
    used: int


@dataclass(frozen=True, slots=True)
class RingState:
    """One ring as the VMM set it up.

    Attributes:
        size: descriptors; 0 = not told yet.
        addresses: frontend addresses, as SET_VRING_ADDR gave them.
        log_used: mark writes to the used ring in the dirty log, at guest address log_addr.
        base: where it starts, or stood when it last stopped, as SET_VRING_BASE encodes it; None =
            at its beginning.
        kick, call, err: the shell holds this eventfd.
        started: it has its kick; served while it is enabled too.
        served: chains of it were taken before it last stopped, since its driver began.
        began: its latest start was at its beginning.
        relocated: since its driver was last judged it started elsewhere than before, or for the
            first time.
        started_at: guest addresses at its latest start.
        start_number: how often it was started, so that nobody takes one start for another.
    """

    size: int = 0
    addresses: RingAddresses | None = None
    log_used: bool = False
    log_addr: int = 0
    base: int | None = None
    kick: bool = False
    call: bool = False
    err: bool = False
    started: bool = False
    enabled: bool = False
    served: bool = False
    began: bool = False
    relocated: bool = False
    started_at: RingAddresses | None = None
    start_number: int = 0

    @property
    def live(self) -> bool:
        """The guest's chains are being served."""
        return self.started and self.enabled


@dataclass(frozen=True, slots=True)
class SessionState:
    """Everything one connection has agreed on.

    Attributes:
        rings: one for each queue the device has, whether used or not.
        features: virtio features of the latest SET_FEATURES; 0 until features_settled.
        protocol_features: of the latest SET_PROTOCOL_FEATURES.
        owned: SET_OWNER came.
        status: the latest SET_STATUS, kept for GET_STATUS; nothing depends on it.
        regions: the memory table.
        log: the dirty log, when there is one.
        backend_channel: the shell holds the socket of SET_BACKEND_REQ_FD.
        device_started: the VMM bears back-end requests (QEMU 11.1 crashes on others).
    """

    rings: tuple[RingState, ...]
    features: int = 0
    features_settled: bool = False
    protocol_features: int = 0
    owned: bool = False
    status: int = 0
    regions: tuple[GuestRegion, ...] = ()
    log: LogWindow | None = None
    backend_channel: bool = False
    device_started: bool = False

    @classmethod
    def initial(cls, queue_count: int) -> Self:
        """A connection on which nothing was said yet."""
        return cls(rings=(RingState(),) * queue_count)

    @property
    def running(self) -> bool:
        """At least one ring is started."""
        return any(ring.started for ring in self.rings)

    @property
    def packed(self) -> bool:
        """Rings have the packed layout."""
        return self.has(VirtioFeature.RING_PACKED)

    def has(self, feature: VirtioFeature) -> bool:
        """The feature was acknowledged."""
        return bool(self.features & feature)

    @property
    def acked(self) -> ProtocolFeature:
        """The protocol features in force."""
        return ProtocolFeature(self.protocol_features)

    def with_ring(self, index: int, ring: RingState) -> Self:
        """The same with one ring replaced."""
        return replace(self, rings=(*self.rings[:index], ring, *self.rings[index + 1 :]))
