"""The driver's side of a packed virtqueue (virtio 1.2, 2.8), byte by byte.

One ring of {le64 addr, le32 len, le16 id, le16 flags}, shared by both sides, and two event
suppression structures {le16 offset:15 wrap:1, le16 flags:2}: the driver's (vhost-user calls it
avail) and the device's (used). Knows no message and no device.
"""

from __future__ import annotations

from collections.abc import Sequence

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

EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC = 0, 1, 2
EVENT_SIZE = 4
WRAP_BIT = 0x8000


class PackedQueue(Queue):
    """A packed ring; tokens are buffer ids."""

    def lay_out(self) -> RingParts:
        """Allocate ring and event structures on their minimum alignments: 16, 4, 4."""
        return RingParts(
            desc=self.memory.allocate(DESCRIPTOR_SIZE * self.size, 16),
            avail=self.memory.allocate(EVENT_SIZE, 4),
            used=self.memory.allocate(EVENT_SIZE, 4),
        )

    def reset(self) -> None:
        """Forget everything and zero the ring: it starts at its first slot."""
        super().reset()
        parts = self.parts
        self.memory.write(parts.desc, bytes(DESCRIPTOR_SIZE * self.size))
        self.memory.write(parts.avail, bytes(EVENT_SIZE))
        self.memory.write(parts.used, bytes(EVENT_SIZE))
        self.free_ids = list(range(self.size))
        self.chain_lengths: dict[int, int] = {}  # in flight, oldest first
        self.free_slots = self.size
        self.next_avail, self.avail_wrap = 0, True
        self.next_used, self.used_wrap = 0, True
        self._unpublished: list[tuple[int, int]] = []
        self._batch_slots = self.last_batch_slots = 0

    def start_base(self) -> int:
        """Return index 0, wrap 1 for both directions: used above, available below 2^16."""
        return WRAP_BIT << 16 | WRAP_BIT

    def add_chain(
        self, buffers: Sequence[Buffer], *, indirect: bool = False, publish: bool = True
    ) -> int:
        """Write descriptors; the first one's flags come last. See Queue.add_chain()."""
        needed = 1 if indirect else len(buffers)
        if needed > self.free_slots:
            raise QueueFull(f"{needed} descriptors wanted, {self.free_slots} free")
        token = self.free_ids.pop(0)
        if indirect:
            size = len(buffers) * DESCRIPTOR_SIZE
            entries = [(self.write_indirect_table(token, buffers), size, DescriptorFlags.INDIRECT)]
        else:
            entries = [self._entry(buffers, position) for position in range(len(buffers))]
        for position, (addr, length, flags) in enumerate(entries):
            marked = flags | self.avail_flags()
            first = position == 0
            self.write_slot(
                self.next_avail, addr, length, token, self._hidden(marked) if first else marked
            )
            if first:
                self._unpublished.append((self.next_avail, marked))
            self._advance_avail()
        self.free_slots -= needed
        self._batch_slots += needed
        self.chain_lengths[token] = needed
        if publish:
            self.publish()
        return token

    @staticmethod
    def _entry(buffers: Sequence[Buffer], position: int) -> tuple[int, int, DescriptorFlags]:
        buffer = buffers[position]
        flags = DescriptorFlags.WRITE if buffer.writable else DescriptorFlags(0)
        if position + 1 < len(buffers):
            flags |= DescriptorFlags.NEXT
        return buffer.guest_addr, buffer.size, flags

    @staticmethod
    def _hidden(flags: int) -> int:
        """Return flags that say "not available yet": AVAIL as in the round before."""
        return flags ^ (DescriptorFlags.AVAIL | DescriptorFlags.USED)

    def _advance_avail(self) -> None:
        self.next_avail += 1
        if self.next_avail == self.size:
            self.next_avail, self.avail_wrap = 0, not self.avail_wrap

    def _write_indirect(self, table: int, slot: int, buffer: Buffer, last: bool) -> None:
        # Flags other than WRITE are reserved here: the table's order is the chain's order.
        flags = DescriptorFlags.WRITE if buffer.writable else DescriptorFlags(0)
        self.write_descriptor(table, slot, buffer.guest_addr, buffer.size, 0, flags)

    def publish(self) -> None:
        """Flip the flags of the first descriptors, the last chain's first."""
        full_barrier()
        for slot, flags in reversed(self._unpublished):
            self.write_flags(slot, flags)
        self._unpublished.clear()
        self.last_batch_slots, self._batch_slots = self._batch_slots, 0

    def collect(self) -> list[Used]:
        """Take used descriptors in ring order; with event index ask for a call at the next."""
        found: list[Used] = []
        while True:
            while self._is_used():
                full_barrier()
                found += self._take()
            if self.options.event_idx and not self.interrupts_off:
                self.write_driver_event(self.next_used, self.used_wrap, EVENT_DESC)
            full_barrier()
            if not self._is_used():
                return found

    def _is_used(self) -> bool:
        flags = self.read_flags(self.next_used)
        available = bool(flags & DescriptorFlags.AVAIL)
        used = bool(flags & DescriptorFlags.USED)
        return available == used == self.used_wrap

    def _take(self) -> list[Used]:
        """Take one used descriptor; in order, one may stand for all chains before it too."""
        at = self.parts.desc + self.next_used * DESCRIPTOR_SIZE
        written = self.memory.read_number(at + 8, 4)
        last = self.memory.read_number(at + 12, 2)
        assert last in self.chain_lengths, f"used slot names id {last}, not in flight"
        tokens = list(self.chain_lengths) if self.options.in_order else [last]
        tokens = tokens[: tokens.index(last) + 1]
        for token in tokens:
            slots = self.chain_lengths.pop(token)
            self.free_ids.append(token)
            self.free_slots += slots
            self.next_used += slots
        if self.next_used >= self.size:
            self.next_used, self.used_wrap = self.next_used - self.size, not self.used_wrap
        return [Used(token, written if token == last else 0) for token in tokens]

    def kick_wanted(self) -> bool:
        """Evaluate the device's event suppression structure over the last published batch."""
        event, flags = self.device_event()
        if flags != EVENT_DESC or not self.options.event_idx:
            return flags != EVENT_DISABLE
        offset = event & ~WRAP_BIT
        if bool(event & WRAP_BIT) != self.avail_wrap:
            offset -= self.size
        return 0 <= self.next_avail - offset - 1 < self.last_batch_slots

    def set_interrupts(self, wanted: bool) -> None:
        """Use the driver's event suppression structure."""
        self.interrupts_off = not wanted
        if not wanted:
            self.write_driver_event(0, False, EVENT_DISABLE)
        elif self.options.event_idx:
            self.write_driver_event(self.next_used, self.used_wrap, EVENT_DESC)
        else:
            self.write_driver_event(0, False, EVENT_ENABLE)
        full_barrier()

    # -- raw access, for reading and for lying -------------------------------------------------

    def avail_flags(self) -> DescriptorFlags:
        """Return the flags that mean "available" in the present round."""
        return DescriptorFlags.AVAIL if self.avail_wrap else DescriptorFlags.USED

    def write_slot(self, slot: int, addr: int, length: int, token: int, flags: int) -> None:
        """Write one descriptor of the ring, flags last."""
        self.write_descriptor(self.parts.desc, slot, addr, length, token, self.read_flags(slot))
        self.write_flags(slot, flags)

    def read_flags(self, slot: int) -> int:
        """Read one descriptor's flags."""
        return self.memory.read_number(self.parts.desc + slot * DESCRIPTOR_SIZE + 14, 2)

    def write_flags(self, slot: int, flags: int) -> None:
        """Write one descriptor's flags."""
        self.memory.write_number(self.parts.desc + slot * DESCRIPTOR_SIZE + 14, flags, 2)

    def write_driver_event(self, offset: int, wrap: bool, flags: int) -> None:
        """Write the driver's event suppression structure."""
        self.memory.write_number(self.parts.avail, offset | (WRAP_BIT if wrap else 0), 2)
        self.memory.write_number(self.parts.avail + 2, flags, 2)

    def device_event(self) -> tuple[int, int]:
        """Read the device's event suppression structure: offset with wrap bit, flags."""
        event = self.memory.read_number(self.parts.used, 2)
        return event, self.memory.read_number(self.parts.used + 2, 2)

    def expose_raw(self, addr: int, length: int, token: int, flags: int = 0) -> int:
        """Make one descriptor available as it is and return its slot."""
        slot = self.next_avail
        self.write_slot(slot, addr, length, token, flags | self.avail_flags())
        self._advance_avail()
        self._batch_slots += 1
        self.publish()
        return slot
