"""A persistent memory device on the rig: its image, and what a driver sends to it.

Knows vhostd._native and the fake guest; must not know the protocol or device logic.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vhostd._native import Handler, Image, PmemCounters

from tests.fakes.driver import Buffer, Used
from tests.fakes.memory import MIB, GuestMemory
from tests.native.rig import SPLIT, Guest, Host, Layout, Ring

IMAGE_SIZE = 2 * MIB
FLUSH = struct.pack("<I", 0)
DONE = bytes(4)
FAILED = b"\xff" * 4
RESPONSE_SIZE = 4
UNTOUCHED = 0xEE  # fills the room for a response before the device sees it


@dataclass(frozen=True, slots=True)
class Posted:
    """A request on its way, and where its response will be."""

    token: int
    rooms: tuple[Buffer, ...]


@dataclass
class Disk:
    """A guest with one flush ring."""

    guest: Guest
    ring: Ring
    image: Image | None

    def lay(
        self, pieces: Sequence[bytes] = (FLUSH,), rooms: Sequence[int] = (RESPONSE_SIZE,)
    ) -> list[Buffer]:
        """Put a request into guest memory, with room for its response."""
        memory = self.guest.memory
        laid = self.ring.buffers(*pieces)
        for size in rooms:
            at = memory.allocate(size)
            memory.write(at, bytes([UNTOUCHED]) * size)
            laid.append(Buffer(at, size, writable=True))
        return laid

    def add(
        self, pieces: Sequence[bytes] = (FLUSH,), rooms: Sequence[int] = (RESPONSE_SIZE,)
    ) -> Posted:
        """Add a chain without telling the device."""
        return self.add_laid(self.lay(pieces, rooms))

    def add_laid(self, buffers: Sequence[Buffer]) -> Posted:
        """The same of buffers that are in memory already."""
        indirect = self.ring.layout.indirect
        token = self.ring.driver.add_chain(buffers, indirect=indirect, publish=False)
        return Posted(token, tuple(buffer for buffer in buffers if buffer.writable))

    def publish(self) -> None:
        """Let the device see all of them, and kick if it wants that."""
        self.ring.driver.publish()
        self.ring.driver.notify()

    def post(self, count: int = 1) -> list[Posted]:
        """Make flushes available at once."""
        posted = [self.add() for _ in range(count)]
        self.publish()
        return posted

    def exchange(
        self, pieces: Sequence[bytes] = (FLUSH,), rooms: Sequence[int] = (RESPONSE_SIZE,)
    ) -> tuple[int, bytes]:
        """Send one chain, wait for it; the length it claims and all of its rooms."""
        posted = self.add(pieces, rooms)
        self.publish()
        (used,) = self.ring.driver.wait_used()
        assert used.token == posted.token, "another chain came back"
        return used.written, self.content(posted)

    def content(self, posted: Posted) -> bytes:
        """Return what is in a chain's rooms."""
        memory = self.guest.memory
        return b"".join(memory.read(room.guest_addr, room.size) for room in posted.rooms)

    def await_all(self, posted: Sequence[Posted], content: bytes) -> None:
        """All come back, each once, in their order, with this response."""
        used = self.ring.driver.wait_used(len(posted))
        assert used == [Used(one.token, RESPONSE_SIZE) for one in posted]
        assert [self.content(one) for one in posted] == [content] * len(posted)

    def unanswered(self, posted: Sequence[Posted]) -> bool:
        """Whether nothing was given back, and no response written."""
        untouched = bytes([UNTOUCHED]) * RESPONSE_SIZE
        return not self.ring.driver.collect() and all(
            self.content(one) == untouched for one in posted
        )

    def counters(self) -> PmemCounters:
        """What became of its flushes, the turn the worker is in included."""
        with self.guest.host.parked():
            return self.guest.device.pmem_counters()

    def use(self, image: Image | None) -> None:
        """Give the device another image; the old one stays ours."""
        with self.guest.host.parked():
            self.guest.device.set_image(image)
        self.image = image


def open_image(path: Path) -> Image:
    """An image of a file, made if it is not there."""
    with path.open("a+b") as file:
        file.truncate(IMAGE_SIZE)
        return Image(file.fileno())


@contextmanager
def disk_on(
    host: Host,
    image: Image | None,
    layout: Layout = SPLIT,
    size: int = 64,
    memory: GuestMemory | None = None,
) -> Iterator[Disk]:
    """A started disk; its image is closed at the end."""
    with Guest.on(host, memory or GuestMemory.flat(8 * MIB)) as guest:
        with host.parked():
            guest.device.set_image(image)
        yield (disk := Disk(guest, guest.ring(Handler.FLUSH, layout, size), image))
    if disk.image is not None:
        disk.image.close()
