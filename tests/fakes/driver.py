"""What a guest driver does with a virtqueue whatever its layout: add, kick, wait, collect.

split.py and packed.py fill in the two layouts of virtio 1.x. Knows guest memory and eventfds;
knows no message and no device.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntFlag

from tests.fakes.eventfd import drain, new_eventfd, wait_readable
from tests.fakes.memory import GuestMemory

DESCRIPTOR_SIZE = 16
SPIN_STEP_S = 0.0005  # only where the driver has switched interrupts off and must look itself


class DescriptorFlags(IntFlag):
    """Descriptor flags of both layouts; AVAIL and USED exist in packed rings only."""

    NEXT = 0x1
    WRITE = 0x2
    INDIRECT = 0x4
    AVAIL = 0x80
    USED = 0x8000


class QueueFull(Exception):
    """The ring has not enough free descriptors."""


class InterruptMissing(AssertionError):
    """Buffers came back, but the device did not call although it had to."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """One descriptor's worth of guest memory; writable by the device or readable."""

    guest_addr: int
    size: int
    writable: bool = False


@dataclass(frozen=True, slots=True)
class Used:
    """One buffer given back: the driver's token, the bytes the device claims to have written."""

    token: int
    written: int


@dataclass(slots=True)
class RingOptions:
    """Negotiated ring features."""

    event_idx: bool = False
    indirect: bool = False
    in_order: bool = False


@dataclass(slots=True)
class RingParts:
    """Guest addresses of the three parts, named as vhost-user names them."""

    desc: int
    avail: int
    used: int


_barrier_lock = threading.Lock()


def full_barrier() -> None:
    """Order earlier stores before later loads, which event index suppression needs."""
    with _barrier_lock:  # taking a lock is a locked instruction, a full barrier on x86
        pass


@dataclass
class Queue(ABC):
    """The driver's side of one virtqueue."""

    memory: GuestMemory
    size: int
    options: RingOptions = field(default_factory=RingOptions)

    def __post_init__(self) -> None:
        """Lay the ring out in guest memory and make its three eventfds."""
        self.parts = self.lay_out()
        self.kick_fd = new_eventfd()
        self.call_fd = new_eventfd()
        self.err_fd = new_eventfd()
        self.interrupts_off = False
        self._tables: dict[int, tuple[int, int]] = {}  # token -> indirect table and its room
        self.reset()

    def close(self) -> None:
        """Close the eventfds."""
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)

    # -- what a layout must provide ----------------------------------------------------------

    @abstractmethod
    def lay_out(self) -> RingParts:
        """Allocate the parts."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything and zero the ring, as a driver does at probe."""
        self._pending: list[Used] = []
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            drain(fd)

    @abstractmethod
    def add_chain(
        self, buffers: Sequence[Buffer], *, indirect: bool = False, publish: bool = True
    ) -> int:
        """Make one chain available and return its token.

        publish=False keeps it back until publish(): several chains then appear at once.

        Raises:
            QueueFull: not enough descriptors are free.
        """

    @abstractmethod
    def publish(self) -> None:
        """Let the device see every chain added so far."""

    @abstractmethod
    def collect(self) -> list[Used]:
        """Take what the device has given back and ask for a call at the next one."""

    @abstractmethod
    def kick_wanted(self) -> bool:
        """Return whether the device asked to be told about what was published last."""

    @abstractmethod
    def set_interrupts(self, wanted: bool) -> None:
        """Ask for calls, or ask for none."""

    @abstractmethod
    def start_base(self) -> int:
        """Return the SET_VRING_BASE number of a ring that starts from nothing."""

    # -- the rest ----------------------------------------------------------------------------

    def kick(self) -> None:
        """Tell the device, wanted or not."""
        os.eventfd_write(self.kick_fd, 1)

    def notify(self) -> bool:
        """Kick only if the device wants it; return whether it did."""
        full_barrier()
        wanted = self.kick_wanted()
        if wanted:
            self.kick()
        return wanted

    def wait_used(
        self, count: int = 1, timeout_s: float = 10.0, interrupts: bool = True
    ) -> list[Used]:
        """Wait until count buffers came back and return exactly those.

        interrupts=False looks at the ring instead of waiting for calls, as a driver does that
        has switched them off.

        Raises:
            TimeoutError: fewer came back.
            InterruptMissing: they did come back, but without a call.
        """
        deadline = time.monotonic() + timeout_s
        self._pending += self.collect()
        while len(self._pending) < count:
            remaining_s = deadline - time.monotonic()
            if interrupts:
                called = wait_readable(self.call_fd, max(0.0, remaining_s))
                if called:
                    os.eventfd_read(self.call_fd)
            else:
                called = remaining_s > 0
                wait_readable(self.call_fd, SPIN_STEP_S)
            self._pending += self.collect()
            if not called and len(self._pending) >= count and interrupts:
                raise InterruptMissing(f"{len(self._pending)} buffers came back, no call")
            if not called and len(self._pending) < count:
                raise TimeoutError(f"{len(self._pending)} of {count} buffers came back")
        taken, self._pending = self._pending[:count], self._pending[count:]
        return taken

    def calls(self) -> int:
        """Return how many calls came since the last look, and forget them."""
        return drain(self.call_fd)

    def wait_err(self, timeout_s: float = 5.0) -> bool:
        """Wait for the device to report this ring broken on its err eventfd."""
        if not wait_readable(self.err_fd, timeout_s):
            return False
        drain(self.err_fd)
        return True

    def write_descriptor(
        self, table: int, slot: int, addr: int, length: int, third: int, fourth: int
    ) -> None:
        """Write one raw descriptor; split: flags, next; packed: id, flags."""
        at = table + slot * DESCRIPTOR_SIZE
        self.memory.write_number(at, addr, 8)
        self.memory.write_number(at + 8, length, 4)
        self.memory.write_number(at + 12, third, 2)
        self.memory.write_number(at + 14, fourth, 2)

    def write_indirect_table(self, token: int, buffers: Sequence[Buffer]) -> int:
        """Write the indirect table of a chain and return its guest address.

        A token's table is used again when it is large enough: guest RAM here is never freed.
        """
        table, room = self._tables.get(token, (0, 0))
        if room < len(buffers):
            table = self.memory.allocate(len(buffers) * DESCRIPTOR_SIZE)
            self._tables[token] = table, len(buffers)
        for slot, buffer in enumerate(buffers):
            self._write_indirect(table, slot, buffer, slot + 1 == len(buffers))
        return table

    @abstractmethod
    def _write_indirect(self, table: int, slot: int, buffer: Buffer, last: bool) -> None:
        """Write one descriptor of an indirect table."""
