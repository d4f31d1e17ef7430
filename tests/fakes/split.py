"""The driver's side of a split virtqueue (virtio 1.2, 2.7), byte by byte.

descriptor {le64 addr, le32 len, le16 flags, le16 next}; available ring {le16 flags, le16 idx,
le16 ring[size], le16 used_event}; used ring {le16 flags, le16 idx, {le32 id, le32 len}[size],
le16 avail_event}. Knows no message and no device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from tests.fakes.driver import (
    DESCRIPTOR_SIZE,
    Buffer,
    DescriptorFlags,
    Queue,
    QueueFull,
    RingParts,
    Used,
    full_barrier,
)

RING_HEADER_SIZE = 4  # flags, idx
AVAIL_NO_INTERRUPT = 1
USED_NO_NOTIFY = 1
INDEX_MODULUS = 1 << 16


class SplitQueue(Queue):
    """A split ring; tokens are head descriptor indexes."""

    def lay_out(self) -> RingParts:
        """Allocate table and rings on their minimum alignments: 16, 2, 4."""
        return RingParts(
            desc=self.memory.allocate(DESCRIPTOR_SIZE * self.size, 16),
            avail=self.memory.allocate(RING_HEADER_SIZE + 2 * self.size + 2, 2),
            used=self.memory.allocate(RING_HEADER_SIZE + 8 * self.size + 2, 4),
        )

    def reset(self) -> None:
        """Forget everything and zero the ring: it starts at its first slot."""
        super().reset()
        parts = self.parts
        self.memory.write(parts.desc, bytes(DESCRIPTOR_SIZE * self.size))
        self.memory.write(parts.avail, bytes(RING_HEADER_SIZE + 2 * self.size + 2))
        self.memory.write(parts.used, bytes(RING_HEADER_SIZE + 8 * self.size + 2))
        self.free = list(range(self.size))
        self.chains: dict[int, list[int]] = {}  # in flight, oldest first
        self.next_avail = 0
        self.published = self.previous_published = 0
        self.last_used = 0

    def start_base(self) -> int:
        """Return 0: the first available entry."""
        return 0

    def add_chain(
        self, buffers: Sequence[Buffer], *, indirect: bool = False, publish: bool = True
    ) -> int:
        """Write descriptors and an available entry; see Queue.add_chain()."""
        needed = 1 if indirect else len(buffers)
        if needed > len(self.free):
            raise QueueFull(f"{needed} descriptors wanted, {len(self.free)} free")
        slots = [self.free.pop(0) for _ in range(needed)]
        if indirect:
            table = self.write_indirect_table(slots[0], buffers)
            size = len(buffers) * DESCRIPTOR_SIZE
            self.write_slot(slots[0], table, size, DescriptorFlags.INDIRECT)
        else:
            self._write_chain(slots, buffers)
        self.chains[slots[0]] = slots
        self.write_avail_entry(self.next_avail, slots[0])
        self.next_avail = (self.next_avail + 1) % INDEX_MODULUS
        if publish:
            self.publish()
        return slots[0]

    def _write_chain(self, slots: list[int], buffers: Sequence[Buffer]) -> None:
        links = [following for _, following in pairwise(slots)]
        for slot, buffer, following in zip(slots, buffers, [*links, None], strict=True):
            flags = DescriptorFlags.WRITE if buffer.writable else DescriptorFlags(0)
            if following is not None:
                flags |= DescriptorFlags.NEXT
            self.write_slot(slot, buffer.guest_addr, buffer.size, flags, following or 0)

    def _write_indirect(self, table: int, slot: int, buffer: Buffer, last: bool) -> None:
        flags = DescriptorFlags.WRITE if buffer.writable else DescriptorFlags(0)
        if not last:
            flags |= DescriptorFlags.NEXT
        following = 0 if last else slot + 1
        self.write_descriptor(table, slot, buffer.guest_addr, buffer.size, flags, following)

    def publish(self) -> None:
        """Advance avail.idx to everything added."""
        full_barrier()
        self.write_avail_index(self.next_avail)
        self.previous_published, self.published = self.published, self.next_avail

    def collect(self) -> list[Used]:
        """Take used entries up to used.idx; with event index ask for a call at the next."""
        found: list[Used] = []
        while True:
            index = self.used_index()
            full_barrier()
            while self.last_used != index:
                taken = self._take(self.last_used)
                found += taken
                self.last_used = (self.last_used + len(taken)) % INDEX_MODULUS
            if self.options.event_idx and not self.interrupts_off:
                self.write_used_event(self.last_used)
            full_barrier()
            if self.used_index() == self.last_used:
                return found

    def _take(self, position: int) -> list[Used]:
        """Take one used entry; in order, one entry may stand for all chains before it too."""
        at = self.parts.used + RING_HEADER_SIZE + 8 * (position % self.size)
        last = self.memory.read_number(at, 4)
        written = self.memory.read_number(at + 4, 4)
        assert last in self.chains, f"used entry {position} names {last}, not in flight"
        tokens = list(self.chains) if self.options.in_order else [last]
        tokens = tokens[: tokens.index(last) + 1]
        for token in tokens:
            self.free += self.chains.pop(token)
        return [Used(token, written if token == last else 0) for token in tokens]

    def kick_wanted(self) -> bool:
        """Evaluate used.flags, or avail_event over what the last publish() added."""
        if not self.options.event_idx:
            return self.memory.read_number(self.parts.used, 2) != USED_NO_NOTIFY
        event = self.avail_event()
        behind = (self.published - event - 1) % INDEX_MODULUS
        return behind < (self.published - self.previous_published) % INDEX_MODULUS

    def set_interrupts(self, wanted: bool) -> None:
        """Use avail.flags, or park used_event half a ring of indexes away."""
        self.interrupts_off = not wanted
        if self.options.event_idx:
            distance = 0 if wanted else INDEX_MODULUS // 2
            self.write_used_event((self.last_used + distance) % INDEX_MODULUS)
        else:
            flags = 0 if wanted else AVAIL_NO_INTERRUPT
            self.memory.write_number(self.parts.avail, flags, 2)
        full_barrier()

    # -- raw access, for reading and for lying -------------------------------------------------

    def write_slot(
        self, slot: int, addr: int, length: int, flags: int = 0, following: int = 0
    ) -> None:
        """Write one descriptor of the table."""
        self.write_descriptor(self.parts.desc, slot, addr, length, flags, following)

    def write_avail_entry(self, position: int, head: int) -> None:
        """Write one entry of the available ring; position counts from 0 without end."""
        at = self.parts.avail + RING_HEADER_SIZE + 2 * (position % self.size)
        self.memory.write_number(at, head, 2)

    def write_avail_index(self, index: int) -> None:
        """Write avail.idx."""
        self.memory.write_number(self.parts.avail + 2, index, 2)

    def write_used_event(self, index: int) -> None:
        """Write used_event, behind the available ring."""
        at = self.parts.avail + RING_HEADER_SIZE + 2 * self.size
        self.memory.write_number(at, index, 2)

    def avail_event(self) -> int:
        """Read avail_event, behind the used ring."""
        at = self.parts.used + RING_HEADER_SIZE + 8 * self.size
        return self.memory.read_number(at, 2)

    def used_index(self) -> int:
        """Read used.idx."""
        return self.memory.read_number(self.parts.used + 2, 2)

    def expose_raw(self, *heads: int) -> None:
        """Make heads available as they are, whatever their descriptors hold."""
        for head in heads:
            self.write_avail_entry(self.next_avail, head)
            self.next_avail = (self.next_avail + 1) % INDEX_MODULUS
        self.publish()
