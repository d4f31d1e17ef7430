"""A virtio-mem driver's operations over the fake queue (virtio 1.2, 5.15), and its window.

The window is a memory file of its own, as a VMM's second memory backend is. Must not know the wire
protocol beyond the window's memory slot, the config space and config-change messages.
"""

from __future__ import annotations

import select
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.fakes.channel import ConnectionLost
from tests.fakes.driver import Buffer, Queue, Used
from tests.fakes.handshake import accepted
from tests.fakes.machine import Machine, Setup
from tests.fakes.memory import MIB, PAGE_SIZE, GuestMemory, Region, open_memfd
from tests.fakes.messages import BackendRequest, ProtocolFeature, WireRegion

CONFIG = struct.Struct("<QH6xQQQQQ")
REQUEST = struct.Struct("<H6sQH6s")
RESPONSE = struct.Struct("<H6xH")
BLOCK_SIZE = 2 * MIB
WINDOW_ADDRESS = 4 << 30
WINDOW_SIZE = 512 * MIB
WINDOW_FRONTEND_ADDR = 0x7D00_0000_0000  # where this front end says it mapped the window
UNTOUCHED = 0xEE  # fills the room for a response before the device sees it
SLOT_SIZE = 2 * PAGE_SIZE  # a request and the room for its response
SLOT_COUNT = 128


class MemRequest(IntEnum):
    """What a driver asks for."""

    PLUG = 0
    UNPLUG = 1
    UNPLUG_ALL = 2
    STATE = 3


class MemAnswer(IntEnum):
    """What it may be told."""

    ACK = 0
    NACK = 1
    BUSY = 2
    ERROR = 3


class BlockState(IntEnum):
    """The answer to STATE."""

    PLUGGED = 0
    UNPLUGGED = 1
    MIXED = 2


@dataclass(frozen=True, slots=True)
class MemConfig:
    """The 56 bytes of config space; sizes in bytes."""

    block_size: int
    node: int
    address: int
    region_size: int
    usable_size: int
    plugged_size: int
    requested_size: int

    @classmethod
    def unpack(cls, content: bytes) -> MemConfig:
        """Decode what GET_CONFIG returned."""
        return cls(*CONFIG.unpack(content))


@dataclass(frozen=True, slots=True)
class Posted:
    """A request on its way, and where its response will be."""

    token: int
    rooms: tuple[Buffer, ...]


def pack_request(kind: int, address: int = 0, count: int = 0, padding: int = 0) -> bytes:
    """Encode a request; padding fills the bytes the device must ignore."""
    return REQUEST.pack(kind, bytes([padding]) * 6, address, count, bytes([padding]) * 6)


class MemDriver:
    """What a guest does with its memory device; blocks are counted from the window's start."""

    def __init__(self, machine: Machine, window: GuestMemory) -> None:
        """Drive the queue of a machine whose device is a virtio-mem with this window."""
        self.machine = machine
        self.window = window
        self.address = window.regions[0].guest_addr
        self._slots = machine.memory.allocate(SLOT_SIZE * SLOT_COUNT, PAGE_SIZE)
        self._posted = 0

    @classmethod
    def realize(
        cls,
        path: Path | str,
        setup: Setup | None = None,
        *,
        address: int = WINDOW_ADDRESS,
        size: int = WINDOW_SIZE,
    ) -> MemDriver:
        """Connect, negotiate and put the window into the memory table; nothing is started."""
        setup = replace(setup or Setup(), queue_count=1, config_size=CONFIG.size)
        machine = Machine.realize(path, setup)
        try:
            window = GuestMemory(open_memfd(size, "window"), [Region(address, size, 0)])
        except BaseException:
            machine.close()
            raise
        driver = cls(machine, window)
        try:
            driver.add_window()
        except BaseException:
            driver.close()
            raise
        return driver

    @classmethod
    def boot(
        cls,
        path: Path | str,
        setup: Setup | None = None,
        *,
        address: int = WINDOW_ADDRESS,
        size: int = WINDOW_SIZE,
    ) -> MemDriver:
        """Do all that and start."""
        driver = cls.realize(path, setup, address=address, size=size)
        try:
            driver.machine.start()
        except BaseException:
            driver.close()
            raise
        return driver

    def add_window(self) -> None:
        """ADD_MEM_REG of the window."""
        accepted(self.machine.front.add_mem_reg(self.window_slot, self.window.fd), "ADD_MEM_REG")

    @property
    def window_slot(self) -> WireRegion:
        """The window as the memory table has it."""
        (region,) = self.window.regions
        guest_addresses = ProtocolFeature.GPA_ADDRESSES in self.machine.front.protocol_features
        frontend_addr = region.guest_addr if guest_addresses else WINDOW_FRONTEND_ADDR
        return WireRegion(region.guest_addr, region.size, frontend_addr, 0)

    def close(self) -> None:
        """Hang up and give everything back."""
        self.machine.close()
        self.window.close()

    def __enter__(self) -> Self:
        """Return the driver itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Hang up."""
        self.close()

    @property
    def queue(self) -> Queue:
        """The guest-request queue."""
        return self.machine.queues[0]

    # -- raw chains ----------------------------------------------------------------------------

    def post(
        self, pieces: Sequence[bytes], rooms: Sequence[int] = (RESPONSE.size,), *, now: bool = True
    ) -> Posted:
        """Make one chain of these readable pieces and writable rooms available.

        now=False keeps it back until queue.publish().
        """
        memory = self.machine.memory
        at = self._slots + self._posted % SLOT_COUNT * SLOT_SIZE
        self._posted += 1
        end = at + SLOT_SIZE
        buffers = []
        for piece in pieces:
            memory.write(at, piece)
            buffers.append(Buffer(at, len(piece)))
            at += len(piece)
        laid = []
        for room in rooms:
            memory.write(at, bytes([UNTOUCHED]) * room)
            laid.append(Buffer(at, room, writable=True))
            at += room
        assert at <= end, "the chain is larger than a slot"
        indirect = self.machine.setup.indirect
        token = self.queue.add_chain([*buffers, *laid], indirect=indirect, publish=now)
        if now:
            self.queue.notify()
        return Posted(token, tuple(laid))

    def exchange(
        self, pieces: Sequence[bytes], rooms: Sequence[int] = (RESPONSE.size,)
    ) -> tuple[Used, bytes]:
        """Send one chain, wait for it and return all of its rooms."""
        posted = self.post(pieces, rooms)
        (used,) = self.queue.wait_used()
        assert used.token == posted.token, "another chain came back"
        return used, self.read_rooms(posted)

    def read_rooms(self, posted: Posted) -> bytes:
        """Return what is in a chain's rooms."""
        memory = self.machine.memory
        return b"".join(memory.read(room.guest_addr, room.size) for room in posted.rooms)

    def read_answer(self, posted: Posted) -> tuple[MemAnswer, BlockState]:
        """Decode the response of a chain that came back."""
        answer, state = RESPONSE.unpack(self.read_rooms(posted))
        return MemAnswer(answer), BlockState(state)

    # -- requests ------------------------------------------------------------------------------

    def ask(self, kind: int, address: int, count: int) -> tuple[MemAnswer, BlockState]:
        """Send a request about an address and return its answer."""
        used, response = self.exchange([pack_request(kind, address, count)])
        assert used.written == RESPONSE.size, f"{used.written} bytes were written"
        answer, state = RESPONSE.unpack(response)
        return MemAnswer(answer), BlockState(state)

    def address_of(self, block: int) -> int:
        """Return where a block is in the guest."""
        return self.address + block * BLOCK_SIZE

    def plug(self, block: int, count: int = 1) -> MemAnswer:
        """PLUG."""
        return self.ask(MemRequest.PLUG, self.address_of(block), count)[0]

    def unplug(self, block: int, count: int = 1) -> MemAnswer:
        """UNPLUG; what lay in the blocks goes soon."""
        return self.ask(MemRequest.UNPLUG, self.address_of(block), count)[0]

    def unplug_all(self) -> MemAnswer:
        """UNPLUG_ALL."""
        return self.ask(MemRequest.UNPLUG_ALL, 0, 0)[0]

    def state(self, block: int, count: int = 1) -> BlockState:
        """STATE of blocks that are usable."""
        answer, state = self.ask(MemRequest.STATE, self.address_of(block), count)
        assert answer is MemAnswer.ACK, f"STATE was answered {answer!r}"
        return state

    def post_all(self, requests: Iterable[tuple[int, int, int]]) -> list[Posted]:
        """Make requests (kind, block, count) available at once."""
        posted = [
            self.post([pack_request(kind, self.address_of(block), count)], now=False)
            for kind, block, count in requests
        ]
        self.queue.publish()
        self.queue.notify()
        return posted

    # -- config space --------------------------------------------------------------------------

    def config(self) -> MemConfig:
        """Read the whole config space, as QEMU does for any guest read."""
        return MemConfig.unpack(self.machine.front.get_config(0, CONFIG.size))

    def wait_config_change(self, timeout_s: float = 5.0) -> None:
        """Wait for the next config-change message and acknowledge it."""
        front = self.machine.front
        message = front.next_backend_request(timeout_s)
        assert message.request == BackendRequest.CONFIG_CHANGE_MSG
        front.answer_backend_request(message)

    def take_config_changes(self) -> int:
        """Acknowledge the config-change messages that are here, and count them.

        A message that a stop has met costs the channel; then a new one is opened.
        """
        front = self.machine.front
        taken = 0
        while front.backend_requests and select.select([front.backend_requests], [], [], 0)[0]:
            try:
                self.wait_config_change()
            except ConnectionLost:
                accepted(front.set_backend_req_fd(), "SET_BACKEND_REQ_FD")
            taken += 1
        return taken

    # -- the window's memory -------------------------------------------------------------------

    def fill(self, block: int, count: int, value: int) -> None:
        """Write every byte of some blocks."""
        self.window.touch(self.address_of(block), count * BLOCK_SIZE, value)

    def filled(self, block: int, count: int, value: int) -> bool:
        """Return whether each byte of some blocks has this value; holes would be filled."""
        content = self.window.read(self.address_of(block), count * BLOCK_SIZE)
        return content == bytes([value]) * len(content)

    def pages(self, block: int, count: int = 1) -> int:
        """Count the pages of some blocks that are in the file."""
        return self.window.pages_present(self.address_of(block), count * BLOCK_SIZE // PAGE_SIZE)
