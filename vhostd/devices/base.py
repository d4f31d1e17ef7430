"""What every device is made of: chains in, effects out, and the Device protocol itself.

Values only. Must not know how a ring is walked, where guest memory lies, or who carries an
effect out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any, Protocol, TypeAlias

from vhostd.errors import VhostdError
from vhostd.flags import Flags
from vhostd.units import BALLOON_PAGE_SIZE

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object; what it may hold is said where it is made."""


class Refused(VhostdError):
    """An operator's wish this device can't fulfil now; the text says why, on one line."""


class Role(Enum):
    """What a queue is for; which index has which role depends on the negotiated features."""

    INFLATE = "inflate"
    DEFLATE = "deflate"
    STATISTICS = "statistics"
    FREE_PAGE_HINT = "free_page_hint"
    REPORTING = "reporting"
    GUEST_REQUEST = "guest_request"
    FLUSH = "flush"


class DataPlane(Flags):
    """How the native data plane treats pages; same bits as VHD_BALLOON_ in c_src/vhd_api.h."""

    MUST_TELL_HOST = 1
    PAGE_POISON = 2
    MAY_DISCARD = 4


class DeviceEvent(StrEnum):
    """Names of everything a device tells the event stream or the log."""

    BALLOON_TARGET = "balloon_target"
    BALLOON_ACTUAL = "balloon_actual"
    BALLOON_CLAMPED = "balloon_target_clamped"
    BALLOON_STATISTICS = "balloon_statistics"
    BALLOON_POISON = "balloon_poison_value"
    BALLOON_RESET = "balloon_driver_reset"
    STATISTICS_UNASKED = "statistics_unasked"
    HINT_REQUESTED = "hint_requested"
    HINT_STARTED = "hint_started"
    HINT_FINISHED = "hint_finished"
    HINT_FOREIGN_COMMAND = "hint_foreign_command"
    MEM_REQUESTED = "mem_requested"
    MEM_PLUGGED = "mem_plugged"
    MEM_DISCARDED = "mem_discarded"
    MEM_STANDS_STILL = "mem_stands_still"
    MEM_UNPLUGGED_ALL = "mem_unplugged_all"
    MEM_BUSY = "mem_busy"
    MEM_REQUEST_REFUSED = "mem_request_refused"
    MEM_VIOLATION = "mem_violation"
    MEM_INHIBITED = "mem_discards_inhibited"
    MEM_DISCARD_FAILED = "mem_discard_failed"
    MEM_WINDOW_MISSING = "mem_window_missing"
    PMEM_MAPPED = "pmem_mapped"
    PMEM_NOT_MAPPED = "pmem_not_mapped"
    PMEM_FAILED = "pmem_failed"
    PMEM_CLEARED = "pmem_cleared"


_NUMBERS = 1 << 16


@dataclass(frozen=True, slots=True)
class Chain:
    """One chain of a queue that Python serves.

    Attributes:
        token: names the chain in Complete.
        data: the device-readable bytes, at most the first 4096.
        readable_size: device-readable bytes in all.
        writable_count: device-writable descriptors.
        writable_size: bytes in all of them.
        writable_addr: guest-physical address of the first of them.
        position: which of the ring's chains it is: a chain that comes again because the ring
            stopped before it was given back has the same, each other one another (of 65536 in a
            row). Its low 16 bits count the ring's chains.
    """

    queue_index: int
    role: Role
    token: int
    data: bytes = b""
    readable_size: int = 0
    writable_count: int = 0
    writable_size: int = 0
    writable_addr: int = 0
    position: int = 0

    def is_after(self, position: int | None) -> bool:
        """It came into the ring later than the chain at `position`; None: there was no such chain.

        False: it is that one, or an older one, and comes again.
        """
        if position is None:
            return True
        return 0 < (self.position - position) % _NUMBERS < _NUMBERS // 2


@dataclass(frozen=True, slots=True)
class Complete:
    """Give a chain back to the driver, with `data` written into its device-writable part."""

    queue_index: int
    token: int
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class PublishConfig:
    """Change the bytes of the config space at `offset`; tells the driver nothing by itself."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class NotifyConfig:
    """Ask for a config-change interrupt.

    The shell may hold it back while the device is not started and may make one of several.
    """


@dataclass(frozen=True, slots=True)
class ConfigureDataPlane:
    """Tell the native data plane how to treat pages from now on."""

    flags: DataPlane


@dataclass(frozen=True, slots=True)
class ResetDataPlane:
    """A driver started afresh: nothing is in the balloon any more."""


@dataclass(frozen=True, slots=True)
class GuestRange:
    """Bytes of guest memory."""

    guest_addr: int
    size: int

    @property
    def end(self) -> int:
        """Address of the first byte behind it."""
        return self.guest_addr + self.size


@dataclass(frozen=True, slots=True)
class MemorySlot(GuestRange):
    """A region of the VMM's memory table; page_size: of its file's pages on the host, bytes."""

    page_size: int = BALLOON_PAGE_SIZE


@dataclass(frozen=True, slots=True)
class DiscardMemory:
    """Give a range of the device's own window back to the host; on_discarded() tells when.

    May be done in several parts, each told by itself.
    """

    range: GuestRange


@dataclass(frozen=True, slots=True)
class PopulateMemory:
    """Allocate host memory for a range of the device's own window; on_populated() tells when."""

    range: GuestRange


@dataclass(frozen=True, slots=True)
class StopVm:
    """Have the VMM pause the VM; `why` is for the log."""

    why: str


@dataclass(frozen=True, slots=True)
class Log:
    """A line for the log. Guests can cause it: the shell limits its rate."""

    name: DeviceEvent
    fields: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Event:
    """News for the event stream, with sizes in bytes."""

    name: DeviceEvent
    fields: JsonObject = field(default_factory=dict)


Effect: TypeAlias = (
    Complete
    | PublishConfig
    | NotifyConfig
    | ConfigureDataPlane
    | ResetDataPlane
    | DiscardMemory
    | PopulateMemory
    | StopVm
    | Log
    | Event
)
Effects: TypeAlias = Sequence[Effect]
"""To be performed in this order."""


class LargeState(Protocol):
    """State of which a small part changes at a time: kept as bytes, each 0 or 1, beside save()."""

    def save_rest(self) -> JsonObject:
        """What Device.save() says, without this."""

    def take_changes(self) -> list[tuple[int, int, int]]:
        """What changed since this was last called, in order: first byte, how many, what they are
        now."""

    def content(self) -> bytes:
        """The whole of it."""

    def load_content(self, content: bytes) -> None:
        """Become what content() said; called after Device.load().

        Raises:
            ValueError: it is none of this device.
        """


class Device(Protocol):
    """One virtio device without its transport.

    A shell calls, in the order things happen: on_features, on_driver_reset (when the driver is a
    new one), on_started, then chains, config writes and timers, then on_stopped. Config writes
    may come at any moment, also before the start. Every method returns at once.
    """

    @property
    def device_id(self) -> int:
        """The virtio device id."""

    @property
    def queue_count(self) -> int:
        """Queues the VMM must provide."""

    @property
    def config_size(self) -> int:
        """Bytes of the config space."""

    @property
    def config_writable(self) -> bytes:
        """config_size bytes: a 1 bit for each bit the driver may write."""

    @property
    def offered_features(self) -> int:
        """Virtio feature bits, transport bits included."""

    @property
    def shmem_region_sizes(self) -> Sequence[int]:
        """Bytes of each shared memory region the VMM is to provide; QEMU bears one.

        Its size must be a power of two.
        """

    @property
    def timer_interval_s(self) -> float:
        """How often on_timer() wants to be called, in seconds; 0: never."""

    def config(self) -> bytes:
        """The whole config space as it should read now; published before the VMM connects."""

    def roles(self, features: int, started: Collection[int]) -> Mapping[int, Role]:
        """What each started queue is for; an index that isn't clear yet is left out."""

    def on_memory(self, regions: Sequence[MemorySlot]) -> Effects:
        """The VMM's memory table became known, or changed."""

    def on_features(self, features: int) -> Effects:
        """The driver's features became known, or known anew."""

    def on_driver_reset(self) -> Effects:
        """A new driver, or the same one after a reset, is about to start."""

    def on_started(self) -> Effects:
        """The queues run. A ring started later than its fellows needs no second call."""

    def on_stopped(self) -> Effects:
        """The queues stand still; chains held come again once they run."""

    def on_chain(self, chain: Chain, now_s: float) -> Effects:
        """Serve a chain; now_s is the wall clock, seconds since the epoch.

        Raises:
            GuestError: the chain is wrong; the shell gives it back unused and counts it.
        """

    def on_config_written(self, config: bytes) -> Effects:
        """The driver wrote its own bytes; `config` is the whole space after that."""

    def on_timer(self) -> Effects:
        """timer_interval_s went by."""

    def on_disconnected(self) -> None:
        """The VMM is gone, and its guest with it; no effect can be performed any more."""

    @property
    def large_state(self) -> LargeState | None:
        """What of save() is too large to be saved each time; None: nothing."""

    def save(self) -> JsonObject:
        """What a successor process needs, as plain data."""

    def load(self, saved: JsonObject) -> None:
        """Become what save() described; called before anything else.

        Raises:
            ValueError: `saved` is not what save() returned; this object is unchanged.
        """

    def lasting(self) -> JsonObject:
        """What not even a reboot of the host is to undo, as plain data."""

    def recall(self, lasting: JsonObject) -> None:
        """Begin with what lasting() said, where the configuration has not changed since.

        Called before anything else, and not where load() is.

        Raises:
            ValueError: it is not what lasting() returned, or can't be; this object is unchanged.
        """

    def status(self, counters: Mapping[str, int], now_s: float) -> JsonObject:
        """The device as vhostctl shows it.

        Args:
            now_s: the wall clock, seconds since the epoch.
            counters: the native data plane's counters, named as in the structs of
                c_src/vhd_api.h; none while no VMM is connected.
        """
