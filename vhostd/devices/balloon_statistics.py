"""The balloon's statistics queue: one buffer goes to and fro, holding what the guest says.

The driver lends a buffer full of numbers; giving it back is how new numbers are asked for (virtio
1.x, 5.5.6.3). So at most one buffer is held, and it is given back at most once. Knows the queue's
bytes, not when it is time to ask.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from vhostd.devices.base import Chain, Complete, DeviceEvent, Effect, Effects, Event, Log

ENTRY: Final = Struct("<HQ")
"""le16 tag, le64 value, packed: VIRTIO_BALLOON_S_ entries have no padding."""

# Tags 0-9: virtio 1.x, 5.5.6.4. Tags 10-15: Linux include/uapi/linux/virtio_balloon.h, since 6.12.
NAMES: Final = (
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "hugetlb_allocations",
    "hugetlb_failures",
    "oom_kills",
    "alloc_stalls",
    "async_scans",
    "direct_scans",
    "async_reclaims",
    "direct_reclaims",
)

UNKNOWN_TAGS_MAX: Final = 32
"""Tags of no name that are kept: room for several new kernels, not for a hostile one."""

_FILLER_TAG: Final = 0xFFFF
"""Windows drivers fill their first buffer with 0xff bytes before they have numbers."""

Statistics = dict[str, int]
"""Name to value, bytes or counts as the name says; a tag without a name is "tag_N"."""


def parse_statistics(data: bytes) -> Statistics:
    """Read a statistics buffer: entries in any order, the last of equal tags wins.

    A tail shorter than an entry is ignored, and so are tags beyond UNKNOWN_TAGS_MAX unknown ones.
    """
    statistics: Statistics = {}
    unknown_count = 0
    whole = len(data) - len(data) % ENTRY.size
    for tag, value in ENTRY.iter_unpack(data[:whole]):
        if tag < len(NAMES):
            statistics[NAMES[tag]] = value
        elif tag != _FILLER_TAG:
            name = f"tag_{tag}"
            if name not in statistics:
                if unknown_count == UNKNOWN_TAGS_MAX:
                    continue
                unknown_count += 1
            statistics[name] = value
    return statistics


class StatisticsQueue:
    """The buffer's way between driver and device, and the latest numbers it brought.

    Attributes:
        latest: the latest numbers; empty until the guest sent some.
        received_s: when they came, seconds since the epoch; 0 if never.
        updates: buffers with numbers so far.
    """

    def __init__(self) -> None:
        self.latest: Statistics = {}
        self.received_s = 0.0
        self.updates = 0
        self._held: Chain | None = None
        self._known_position: int | None = None

    @property
    def held_position(self) -> int | None:
        """Where in its ring the buffer is that is held; None: none is."""
        return self._known_position if self._held is None else self._held.position

    def expect(self, position: int | None) -> None:
        """A predecessor held the buffer there: it comes again, and its numbers are known."""
        self._known_position = position

    @property
    def holding(self) -> bool:
        """True when the guest waits for us to ask; False while it owes us an answer."""
        return self._held is not None

    def on_chain(self, chain: Chain, now_s: float) -> Effects:
        """Take the numbers and hold the buffer; an older one that is still held goes back."""
        effects: list[Effect] = []
        if self._held is not None:
            effects += self.request()
            effects.append(Log(DeviceEvent.STATISTICS_UNASKED))
        known, self._known_position = self._known_position, None
        self._held = chain
        if chain.position == known:
            return effects
        if statistics := parse_statistics(chain.data):
            self.latest = statistics
            self.received_s = now_s
            self.updates += 1
            effects.append(Event(DeviceEvent.BALLOON_STATISTICS, dict(statistics)))
        return effects

    def request(self) -> Effects:
        """Ask for new numbers; does nothing while an answer is owed."""
        held, self._held = self._held, None
        return [] if held is None else [Complete(held.queue_index, held.token)]

    def reset(self) -> None:
        """A new driver: the old one's buffer and numbers say nothing about it."""
        self._held = self._known_position = None
        self.latest = {}
        self.received_s = 0.0

    def let_go(self) -> None:
        """The ring stopped: the buffer comes again when it goes on, and its numbers are known."""
        self._known_position = self.held_position
        self._held = None
