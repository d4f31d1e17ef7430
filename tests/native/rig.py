"""A worker, its devices and a guest's drivers, put together without any message.

Knows vhostd._native and the fake guest; must not know the protocol or device logic.
"""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from vhostd._native import (
    BalloonFlag,
    Device,
    Event,
    Handler,
    Mapping,
    Region,
    RingFeature,
    RingPosition,
    RingSetup,
    RingStatistics,
    Worker,
)

from tests.fakes.driver import Buffer, Queue, RingOptions, Used
from tests.fakes.eventfd import drain, wait_readable
from tests.fakes.memory import MIB, PAGE_SIZE, GuestMemory
from tests.fakes.packed import PackedQueue
from tests.fakes.split import SplitQueue

PATIENCE_S = 10.0
CONFIG_SIZE = 16
CONFIG_WRITABLE = bytes(4) + b"\xff" * 4 + bytes(4) + b"\xff" * 4  # actual and poison_val
DATA_ADDR = 16 * MIB  # where tests put the pages they give up; rings lie from 1 MiB on


@dataclass(frozen=True, slots=True)
class Layout:
    """What a ring looks like."""

    packed: bool = False
    event_idx: bool = False
    indirect: bool = False

    def __str__(self) -> str:
        """Name a test's variant."""
        name = "packed" if self.packed else "split"
        return name + "-event_idx" * self.event_idx + "-indirect" * self.indirect

    @property
    def features(self) -> RingFeature:
        """The same for the core."""
        chosen = RingFeature(0)
        if self.packed:
            chosen |= RingFeature.PACKED
        if self.event_idx:
            chosen |= RingFeature.EVENT_IDX
        if self.indirect:
            chosen |= RingFeature.INDIRECT
        return chosen


SPLIT = Layout()
LAYOUTS = [Layout(packed, event_idx) for packed in (False, True) for event_idx in (False, True)]


def wait_until(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    """Wait for a counter of another thread, which no descriptor announces.

    Raises:
        TimeoutError: it did not come true.
    """
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the condition did not come true")
        pause.wait(0.001)


class Host:
    """One worker thread and what Python does around it."""

    def __init__(self) -> None:
        """Start the thread."""
        before = set(os.listdir("/proc/self/task"))  # noqa: PTH208 - names are what is wanted
        self.worker = Worker("test-worker")
        (task,) = set(os.listdir("/proc/self/task")) - before  # noqa: PTH208
        self._statistics = Path("/proc/self/task") / task / "stat"
        self._pending: dict[Device, Event] = {}

    def __enter__(self) -> Self:
        """Return the host itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Detach what is left, end the thread."""
        with self.parked():
            for device in list(self._pending):
                device.detach()
        for device in self._pending:
            device.close()
        self.worker.close()

    def cpu_s(self) -> float:
        """Processor time the thread has used, user and system, in seconds."""
        fields = self._statistics.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def park(self) -> None:
        """Park the thread and wait for it."""
        self.worker.park()
        deadline = time.monotonic() + PATIENCE_S
        while not self.worker.parked:
            assert wait_readable(self.worker.notify_fd, deadline - time.monotonic()), "never parked"
            drain(self.worker.notify_fd)

    @contextmanager
    def parked(self) -> Iterator[None]:
        """Hold the thread parked."""
        self.park()
        try:
            yield
        finally:
            self.worker.unpark()

    def add(self, device: Device, *, may_discard: bool = True) -> Device:
        """Attach a device; the host detaches and closes it in the end.

        may_discard: it is told that nothing pins the guest's memory.
        """
        if may_discard:
            device.balloon_configure(BalloonFlag.MAY_DISCARD)
        with self.parked():
            device.attach(self.worker)
        self._pending[device] = Event(0)
        return device

    def device(
        self,
        queue_count: int = 5,
        config_writable: bytes = CONFIG_WRITABLE,
        *,
        may_discard: bool = True,
    ) -> Device:
        """Make and attach a device of the balloon's shape."""
        device = Device(queue_count, len(config_writable), config_writable)
        return self.add(device, may_discard=may_discard)

    def remove(self, device: Device) -> None:
        """Detach and close a device before the end."""
        with self.parked():
            device.detach()
        del self._pending[device]
        device.close()

    def wait_event(self, device: Device, wanted: Event, timeout_s: float = PATIENCE_S) -> None:
        """Wait until the device raises an event; others are kept for later waits.

        Raises:
            TimeoutError: it did not.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self._pending[device] |= device.take_events()
            if self._pending[device] & wanted:
                self._pending[device] &= ~wanted
                return
            if not wait_readable(self.worker.notify_fd, max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"no {wanted!r}")
            drain(self.worker.notify_fd)

    def has_event(self, device: Device, wanted: Event) -> bool:
        """Return whether an event waits, and forget it."""
        self._pending[device] |= device.take_events()
        found = bool(self._pending[device] & wanted)
        self._pending[device] &= ~wanted
        return found


def regions(memory: GuestMemory, mapping: Mapping) -> list[Region]:
    """The guest's regions as the core takes them."""
    return [Region(r.guest_addr, r.size, r.file_offset, mapping) for r in memory.regions]


def make_queue(memory: GuestMemory, layout: Layout, size: int) -> Queue:
    """A driver's ring in guest memory."""
    kind = PackedQueue if layout.packed else SplitQueue
    return kind(memory, size, RingOptions(layout.event_idx, layout.indirect))


@dataclass
class Ring:
    """One served ring: the driver's end and the device's."""

    host: Host
    device: Device
    index: int
    layout: Layout
    driver: Queue
    handler: Handler
    features: RingFeature = field(default=RingFeature(0))
    log_addr: int = 0

    def setup(self, position: RingPosition) -> RingSetup:
        """What the core must know of it."""
        parts = self.driver.parts
        return RingSetup(
            size=self.driver.size,
            features=self.layout.features | self.features,
            desc_addr=parts.desc,
            avail_addr=parts.avail,
            used_addr=parts.used,
            log_addr=self.log_addr,
            position=position,
            handler=self.handler,
            kick_fd=self.driver.kick_fd,
            call_fd=self.driver.call_fd,
            err_fd=self.driver.err_fd,
        )

    def start(self, position: RingPosition | None = None) -> None:
        """Start and enable it."""
        with self.host.parked():
            self.device.start_ring(self.index, self.setup(position or RingPosition()))
            self.device.enable_ring(self.index, True)

    def stop(self) -> RingPosition:
        """Stop it where it stands."""
        with self.host.parked():
            return self.device.stop_ring(self.index)

    def statistics(self) -> RingStatistics:
        """What it counted, the turn the worker is in included."""
        with self.host.parked():
            return self.device.ring_statistics(self.index)

    def send(self, *buffers: Buffer) -> Used:
        """Send one chain and wait for its interrupt."""
        self.driver.add_chain(buffers)
        self.driver.notify()
        (used,) = self.driver.wait_used()
        return used

    def send_bytes(self, *pieces: bytes) -> Used:
        """Send bytes, each piece in a descriptor of its own."""
        return self.send(*self.buffers(*pieces))

    def send_pfns(self, pfns: Iterable[int]) -> Used:
        """Send page numbers in one descriptor."""
        return self.send_bytes(pack_pfns(pfns))

    def buffers(self, *pieces: bytes) -> list[Buffer]:
        """Lay bytes into guest memory."""
        laid = []
        for piece in pieces:
            address = self.driver.memory.allocate(len(piece))
            self.driver.memory.write(address, piece)
            laid.append(Buffer(address, len(piece)))
        return laid


@dataclass
class Guest:
    """A guest's memory, served by one device; a context manager that owns all but the host."""

    host: Host
    memory: GuestMemory
    device: Device
    mapping: Mapping
    rings: list[Ring] = field(default_factory=list)

    @classmethod
    def on(cls, host: Host, memory: GuestMemory, *, may_discard: bool = True) -> Guest:
        """Map the memory and give it to a new device."""
        mapping = Mapping(memory.fd)
        device = host.device(may_discard=may_discard)
        with host.parked():
            device.set_regions(regions(memory, mapping))
        return cls(host, memory, device, mapping)

    def __enter__(self) -> Self:
        """Return the guest itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take everything away in the order it depends on each other."""
        self.host.remove(self.device)
        for ring in self.rings:
            ring.driver.close()
        self.mapping.close()
        self.memory.close()

    def ring(
        self, handler: Handler, layout: Layout = SPLIT, size: int = 128, start: bool = True
    ) -> Ring:
        """Add a ring of the next index, started unless told otherwise."""
        index = len(self.rings)
        driver = make_queue(self.memory, layout, size)
        ring = Ring(self.host, self.device, index, layout, driver, handler)
        self.rings.append(ring)
        if start:
            ring.start()
        return ring


def pack_pfns(pfns: Iterable[int]) -> bytes:
    """Page numbers as le32."""
    return b"".join(struct.pack("<I", pfn) for pfn in pfns)


def pages_at(guest_addr: int, count: int) -> list[int]:
    """Page numbers of count pages from guest_addr on."""
    return list(range(guest_addr // PAGE_SIZE, guest_addr // PAGE_SIZE + count))


def present(memory: GuestMemory, pfns: Sequence[int]) -> list[bool]:
    """Which pages are still in the file."""
    return [memory.page_present(pfn * PAGE_SIZE) for pfn in pfns]
