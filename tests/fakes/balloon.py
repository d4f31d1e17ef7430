"""A virtio-balloon driver's operations over the fake queues (virtio 1.2, 5.5).

Queue numbers are the specification's fixed ones; where every optional feature is negotiated they
are Linux's compacted ones too. Page numbers are of 4096 bytes. Must not know the wire protocol
beyond reading and writing the config space.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from tests.fakes.driver import Buffer, Queue, Used
from tests.fakes.machine import Machine
from tests.fakes.memory import PAGE_SIZE

SCRATCH_SIZE = 1 << 16  # one reusable request buffer a queue
CONFIG = struct.Struct("<4I")
STATISTIC = struct.Struct("<HQ")
COMMAND_STOP = 0
COMMAND_DONE = 1


class BalloonFeature(IntFlag):
    """Bits 0..5 of the device."""

    MUST_TELL_HOST = 1
    STATS_VQ = 2
    DEFLATE_ON_OOM = 4
    FREE_PAGE_HINT = 8
    PAGE_POISON = 16
    REPORTING = 32


class BalloonQueue(IntEnum):
    """Queue indexes when all optional features are negotiated."""

    INFLATE = 0
    DEFLATE = 1
    STATS = 2
    HINT = 3
    REPORT = 4


@dataclass(frozen=True, slots=True)
class BalloonConfig:
    """The 16 bytes of config space."""

    num_pages: int
    actual: int
    command_id: int
    poison: int

    @classmethod
    def unpack(cls, content: bytes) -> BalloonConfig:
        """Decode what GET_CONFIG returned."""
        return cls(*CONFIG.unpack(content))

    def pack(self) -> bytes:
        """Encode for SET_CONFIG."""
        return CONFIG.pack(self.num_pages, self.actual, self.command_id, self.poison)


class BalloonDriver:
    """What a guest does to its balloon."""

    def __init__(self, machine: Machine) -> None:
        """Drive the queues of a machine whose device is a balloon."""
        self.machine = machine
        self._scratch: dict[int, int] = {}

    def queue(self, index: BalloonQueue) -> Queue:
        """Return one of the five queues."""
        return self.machine.queues[index]

    def send(self, index: BalloonQueue, content: bytes, *, indirect: bool = False) -> int:
        """Put one readable buffer on a queue, kick and return its token.

        The buffer is the queue's only one: wait for it before sending the next.
        """
        queue = self.queue(index)
        address = self._buffer(index, len(content))
        self.machine.memory.write(address, content)
        token = queue.add_chain([Buffer(address, len(content))], indirect=indirect)
        queue.notify()
        return token

    def _buffer(self, index: int, size: int) -> int:
        if size > SCRATCH_SIZE:
            return self.machine.memory.allocate(size)
        if index not in self._scratch:
            self._scratch[index] = self.machine.memory.allocate(SCRATCH_SIZE, PAGE_SIZE)
        return self._scratch[index]

    # -- inflate, deflate, report ------------------------------------------------------------

    def inflate(self, pfns: Iterable[int], timeout_s: float = 10.0) -> Used:
        """Give pages up and wait for the acknowledgement: the discard is done by then."""
        self.send(BalloonQueue.INFLATE, pack_pfns(pfns))
        return self.queue(BalloonQueue.INFLATE).wait_used(timeout_s=timeout_s)[0]

    def deflate(self, pfns: Iterable[int], timeout_s: float = 10.0) -> Used:
        """Take pages back and wait for the acknowledgement."""
        self.send(BalloonQueue.DEFLATE, pack_pfns(pfns))
        return self.queue(BalloonQueue.DEFLATE).wait_used(timeout_s=timeout_s)[0]

    def report(self, ranges: Sequence[tuple[int, int]], timeout_s: float = 10.0) -> Used:
        """Report free blocks (guest address, size in bytes) in one chain and wait."""
        queue = self.queue(BalloonQueue.REPORT)
        queue.add_chain([Buffer(address, size, writable=True) for address, size in ranges])
        queue.notify()
        return queue.wait_used(timeout_s=timeout_s)[0]

    # -- statistics --------------------------------------------------------------------------

    def give_stats(self, content: bytes) -> int:
        """Hand the device a statistics buffer; it keeps it until it wants the next."""
        return self.send(BalloonQueue.STATS, content)

    def wait_stats_request(self, timeout_s: float = 10.0) -> Used:
        """Wait until the device gives the statistics buffer back, which asks for new numbers."""
        return self.queue(BalloonQueue.STATS).wait_used(timeout_s=timeout_s)[0]

    # -- free page hinting -------------------------------------------------------------------

    def hint_command(self, command_id: int) -> Used:
        """Send a command id: the round's own, or COMMAND_STOP."""
        return self.hint_bytes(struct.pack("<I", command_id))

    def hint_bytes(self, content: bytes) -> Used:
        """Send a readable buffer on the hint queue as it is."""
        self.send(BalloonQueue.HINT, content)
        return self._wait_hint()

    def hint_block(self, guest_addr: int, size: int) -> Used:
        """Hint one free block."""
        queue = self.queue(BalloonQueue.HINT)
        queue.add_chain([Buffer(guest_addr, size, writable=True)])
        queue.notify()
        return self._wait_hint()

    def _wait_hint(self) -> Used:
        # Linux runs this queue without interrupts and looks at the ring itself.
        return self.queue(BalloonQueue.HINT).wait_used(interrupts=False)[0]

    # -- config space, as QEMU's generic device does it ----------------------------------------

    def config(self) -> BalloonConfig:
        """Read the whole config space, as QEMU does for any guest read."""
        return BalloonConfig.unpack(self.machine.front.get_config(0, CONFIG.size))

    def write_actual(self, pages: int, stale: BalloonConfig | None = None) -> int:
        """Write `actual` as QEMU forwards it: the whole area, other fields from its cache."""
        cached = stale or self.config()
        changed = BalloonConfig(cached.num_pages, pages, cached.command_id, cached.poison)
        return self.machine.front.set_config(0, changed.pack())

    def write_poison(self, value: int, stale: BalloonConfig | None = None) -> int:
        """Write poison_val the same way."""
        cached = stale or self.config()
        changed = BalloonConfig(cached.num_pages, cached.actual, cached.command_id, value)
        return self.machine.front.set_config(0, changed.pack())


def pack_pfns(pfns: Iterable[int]) -> bytes:
    """Encode page numbers as le32."""
    return b"".join(struct.pack("<I", pfn) for pfn in pfns)


def pack_stats(entries: Mapping[int, int] | Sequence[tuple[int, int]]) -> bytes:
    """Encode statistics: 10-byte entries of tag and value, in the order given."""
    pairs = entries.items() if isinstance(entries, Mapping) else entries
    return b"".join(STATISTIC.pack(tag, value) for tag, value in pairs)
