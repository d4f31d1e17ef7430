"""virtio-pmem: a file as guest memory, made durable when the guest asks for it.

Its one queue is run natively; here is what the driver learns, and what is known of the image.
Source of all rules: virtio 1.x, chapter 5.19. Holds no file, fd or socket.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from struct import Struct
from typing import Final

from vhostd.devices.base import (
    Chain,
    DeviceEvent,
    Effects,
    Event,
    GuestRange,
    JsonObject,
    Log,
    MemorySlot,
    Role,
)
from vhostd.devices.pmem_state import Failure, decode, decode_failure, encode, encode_lasting
from vhostd.errors import GuestError
from vhostd.flags import Flags
from vhostd.protocol.features import VirtioFeature
from vhostd.units import MiB, format_size, power_of_two_up

PMEM_DEVICE_ID: Final = 27
QUEUE_COUNT: Final = 1
CONFIG: Final = Struct("<QQ")
"""start and size of the region, guest-physical address and bytes."""


class PmemFeature(Flags):
    """Device feature bits (virtio 1.x, 5.19.3)."""

    SHMEM_REGION = 1 << 0


class PmemMode(StrEnum):
    """How the guest gets the region.

    SHMEM: as the PCI device's shared memory, which vhostd hands to the VMM; Linux 6.9 and later.
    WINDOW: as memory at a fixed address that the VMM has from its command line.
    """

    SHMEM = "shmem"
    WINDOW = "window"


NO_REGION: Final = (
    "the guest found no shared memory region: its kernel is older than Linux 6.9, or the disk was"
    " plugged at a port that has no room for a BAR of its size"
)
"""A driver says the same in both cases: it does not acknowledge the feature."""


def shared_memory_refusal(size: int, file: str) -> str | None:
    """Why no VMM can be given `size` bytes of `file` as shared memory; None: it can.

    QEMU 11.1 makes one PCI BAR of all shared memory regions of a device, and one PCI capability of
    each (24 bytes; at a PCI Express port 24 are left). It ends itself (an assertion) where the
    BAR's size is no power of two, and where a capability finds no room. Whether the device is at
    such a port is not known when QEMU asks for the sizes. So there is one region, whose size is a
    power of two.
    """
    fitting = power_of_two_up(size)
    if size == fitting:
        return None
    return (
        f"{size} is no power of two, and QEMU has shared memory in no other size; write {fitting}"
        f" ({format_size(fitting)}) and enlarge the image: truncate -s {fitting} {file} (a sparse"
        ' file takes up no more room by it), or set mode = "window"'
    )


@dataclass(frozen=True, slots=True)
class PmemOptions:
    """What an operator chose; sizes in bytes.

    Attributes:
        file: path of the image, for people.
        window_address: guest-physical, with PmemMode.WINDOW.
    """

    id: str
    file: str
    size: int
    mode: PmemMode = PmemMode.SHMEM
    window_address: int = 0
    readonly: bool = False
    packed: bool = True
    in_order: bool = True

    @property
    def window(self) -> GuestRange:
        """Where the VMM has the region, with PmemMode.WINDOW."""
        return GuestRange(self.window_address, self.size)

    @property
    def refusal(self) -> str | None:
        """Why a VMM that connects can't be given the region; None: it can."""
        if self.mode is not PmemMode.SHMEM:
            return None
        return shared_memory_refusal(self.size, self.file)


@dataclass(frozen=True, slots=True)
class ImageView:
    """What was last seen of the image; bytes, None where the kernel can't tell.

    Attributes:
        free: what its file system has left, None for a block device.
    """

    cached: int | None = None
    dirty: int | None = None
    writeback: int | None = None
    allocated: int | None = None
    free: int | None = None
    removed: bool = False


class Pmem:
    """One virtio-pmem device.

    Attributes:
        features: what the driver negotiated; 0 before.
        started: a driver runs.
        missing: why the guest does not have it, or None.
        failure: why every flush fails until an operator clears it, or None.
        image: what was last seen of it.
        refused_image: why the image can't be opened, or None.
    """

    device_id = PMEM_DEVICE_ID
    queue_count = QUEUE_COUNT
    config_size = CONFIG.size
    config_writable = bytes(CONFIG.size)
    timer_interval_s = 0.0

    def __init__(self, options: PmemOptions) -> None:
        self.options = options
        self.features = 0
        self.started = False
        self.missing: str | None = "no driver has started yet"
        self.failure: Failure | None = None
        self.image = ImageView()
        self.refused_image: str | None = None
        self._totals: dict[str, int] = {}

    @property
    def offered_features(self) -> int:
        features = int(
            VirtioFeature.VERSION_1
            | VirtioFeature.RING_INDIRECT_DESC
            | VirtioFeature.RING_EVENT_IDX
        )
        if self.options.mode is PmemMode.SHMEM:
            features |= PmemFeature.SHMEM_REGION
        if self.options.packed:
            features |= VirtioFeature.RING_PACKED
        if self.options.in_order:
            features |= VirtioFeature.IN_ORDER
        return features

    @property
    def shmem_region_sizes(self) -> tuple[int, ...]:
        """The one shared memory region: the guest takes its size as that of the disk."""
        return (self.options.size,) if self.options.mode is PmemMode.SHMEM else ()

    @property
    def wants_mapping(self) -> bool:
        """The driver looks for the region in shared memory."""
        return bool(self.features & PmemFeature.SHMEM_REGION)

    def config(self) -> bytes:
        if self.options.mode is PmemMode.SHMEM:
            return CONFIG.pack(0, 0)
        return CONFIG.pack(self.options.window_address, self.options.size)

    def roles(self, features: int, started: Collection[int]) -> Mapping[int, Role]:
        return {0: Role.FLUSH} if 0 in started else {}

    # -- what happens --------------------------------------------------------------------------

    def on_memory(self, regions: Sequence[MemorySlot]) -> Effects:
        return []

    def on_features(self, features: int) -> Effects:
        self.features = features
        return []

    def on_driver_reset(self) -> Effects:
        return []

    def on_started(self) -> Effects:
        self.started = True
        if self.options.mode is PmemMode.SHMEM and not self.wants_mapping:
            self.missing = NO_REGION
            remedy = (
                'for an older kernel set mode = "window"; for the BAR start QEMU with'
                f" pref64-reserve={2 * self.options.size // MiB}M at the port, or have the disk"
                " there when the guest boots"
            )
            told = {"device": self.options.id, "why": NO_REGION, "remedy": remedy}
            return [Log(DeviceEvent.PMEM_NOT_MAPPED, told)]
        return []

    def on_stopped(self) -> Effects:
        self.started = False
        return []

    def on_config_written(self, config: bytes) -> Effects:
        return []

    def on_chain(self, chain: Chain, now_s: float) -> Effects:
        raise GuestError("a pmem device hands no chain up")

    def on_timer(self) -> Effects:
        return []

    def on_disconnected(self) -> None:
        self.started = False
        self.features = 0
        self.missing = "no driver has started yet"
        self.image = ImageView()

    def on_region(self, missing: str | None) -> Effects:
        """The guest has the region now, or does not, for this reason."""
        if missing == self.missing:
            return []
        self.missing = missing
        told: JsonObject = {"device": self.options.id, "size": self.options.size}
        if missing is None:
            return [Event(DeviceEvent.PMEM_MAPPED, told)]
        return [Event(DeviceEvent.PMEM_NOT_MAPPED, {**told, "why": missing})]

    # -- the image -----------------------------------------------------------------------------

    def on_failure(self, failure: Failure) -> Effects:
        """A sync failed, or the image became unfit: flushes fail until it is cleared."""
        if self.failure is not None:
            return []
        self.failure = failure
        told = {"device": self.options.id, "file": self.options.file, "why": failure.why}
        return [Event(DeviceEvent.PMEM_FAILED, told)]

    def on_cleared(self) -> Effects:
        """An operator has seen to it."""
        if self.failure is None:
            return []
        self.failure = None
        return [Event(DeviceEvent.PMEM_CLEARED, {"device": self.options.id})]

    def add_counters(self, counters: Mapping[str, int]) -> None:
        """Keep what a connection counted, now that it has ended."""
        for name, value in counters.items():
            self._totals[name] = self._totals.get(name, 0) + value

    # -- for a successor, and for people -------------------------------------------------------

    large_state = None

    def save(self) -> JsonObject:
        return encode(self.failure, self._totals)

    def load(self, saved: JsonObject) -> None:
        self.failure, self._totals = decode(saved)

    def lasting(self) -> JsonObject:
        return encode_lasting(self.options.file, self.failure)

    def recall(self, lasting: JsonObject) -> None:
        self.failure = decode_failure(lasting, self.options.file)

    @property
    def refused(self) -> str | None:
        """Why the last VMM was turned away, or the next one will be; None: neither is known."""
        return self.refused_image or self.options.refusal

    @property
    def standing(self) -> str:
        """How it does, for people."""
        if self.refused_image is not None:
            return self.refused_image
        if self.failure is not None:
            return f"flushes fail: {self.failure.why}; see to it, then: vhostctl pmem clear"
        if self.missing is not None and self.options.refusal is not None:
            return f"size: {self.options.refusal}"
        if self.missing is not None:
            return f"the guest does not have it: {self.missing}"
        return "the guest has it"

    def status(self, counters: Mapping[str, int], now_s: float) -> JsonObject:
        """Sizes in bytes; counters: what the connection there is has counted."""
        options, image = self.options, self.image
        total = {
            name: self._totals.get(name, 0) + counters.get(name, 0)
            for name in ("flushes", "flush_errors", "malformed", "batches")
        }
        return {
            "id": options.id,
            "file": options.file,
            "size": options.size,
            **total,
            "mode": options.mode.value,
            "readonly": options.readonly,
            "mapped": self.missing is None,
            "failed": None if self.failure is None else self.failure.why,
            "failed_s": None if self.failure is None else self.failure.time_s,
            "standing": self.standing,
            "refused": self.refused,
            "cached": image.cached,
            "dirty": image.dirty,
            "writeback": image.writeback,
            "allocated": image.allocated,
            "free": image.free,
            "removed": image.removed,
            "syncs": counters.get("syncs", 0),
            "sync_last_s": counters.get("sync_ns_last", 0) / 1e9,
            "sync_max_s": counters.get("sync_ns_max", 0) / 1e9,
            "sync_total_s": counters.get("sync_ns", 0) / 1e9,
            "features": pmem_feature_names(self.features),
        }


def pmem_feature_names(features: int) -> list[str]:
    """Names of the device's own bits among these."""
    return [bit.name.lower() for bit in PmemFeature if features & bit and bit.name]
