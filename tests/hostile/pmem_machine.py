"""Starts the real vhostd-pmem on an image, plays a VMM and a driver to it, and looks at both.

Knows what QEMU does with SHMEM_MAP: it answers, and then has the image in its memory table.
"""

from __future__ import annotations

import os
import select
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest

from tests.fakes.driver import Buffer, Queue, Used
from tests.fakes.machine import Machine, Setup
from tests.fakes.memory import MIB, PAGE_SIZE
from tests.fakes.messages import BackendRequest, Flags, ProtocolFeature, WireRegion
from tests.fakes.program import Program, executable, wait_until
from tests.hostile.oracle import Oracle

PROGRAM = "vhostd-pmem"
VM_PATH = "/v1/vms/pmem/pmem"
IMAGE_SIZE = 2 * MIB
IMAGE_ADDRESS = 4 << 30  # where the guest has it
IMAGE_FRONTEND_ADDR = 0x7D00_0000_0000  # where this front end says it mapped it
MAPPING = struct.Struct("=B7xQQQQ")  # region, file offset, region offset, size, flags
MAP_WRITABLE = 1
FLUSH = struct.pack("<I", 0)
DONE = bytes(4)
FAILED = b"\xff" * 4
RESPONSE_SIZE = 4
UNTOUCHED = 0xEE  # fills the room for a response before the device sees it
SLOT_SIZE = 3 * PAGE_SIZE  # a request and the room for its response
SLOT_COUNT = 64
QUEUE_SIZE = 64
PROMPT_S = 10.0  # for anything the program must do in bounded time

SETUPS = [
    Setup(),
    Setup(packed=True),
    Setup(event_idx=True, indirect=True),
    Setup(packed=True, event_idx=True, indirect=True),
]
RINGS = SETUPS[:2]

PmemStatus = dict[str, Any]


def setups(choices: list[Setup]) -> pytest.MarkDecorator:
    """Run a test with each of these rings."""
    return pytest.mark.parametrize("setup", choices, ids=lambda setup: setup.label)


@dataclass(frozen=True)
class Posted:
    """A request on its way, and where its response will be."""

    token: int
    rooms: tuple[Buffer, ...]


class PmemDriver:
    """What a VMM and its guest do with a persistent memory device."""

    def __init__(self, machine: Machine) -> None:
        """Drive the queue of a machine whose device is a virtio-pmem."""
        self.machine = machine
        self.image_fd = -1  # what came with SHMEM_MAP
        self._slots = machine.memory.allocate(SLOT_SIZE * SLOT_COUNT, PAGE_SIZE)
        self._posted = 0

    @classmethod
    def realize(cls, path: Path | str, setup: Setup | None = None) -> PmemDriver:
        """Connect and negotiate; nothing is started."""
        setup = replace(setup or Setup(), queue_count=1, queue_size=QUEUE_SIZE)
        return cls(Machine.realize(path, setup))

    @classmethod
    def boot(cls, path: Path | str, setup: Setup | None = None) -> PmemDriver:
        """Start, map the image and take it into the memory table, as QEMU does."""
        driver = cls.realize(path, setup)
        try:
            driver.machine.start()
            driver.take_image()
        except BaseException:
            driver.close()
            raise
        return driver

    def close(self) -> None:
        """Hang up and give everything back."""
        self.machine.close()
        if self.image_fd >= 0:
            os.close(self.image_fd)
            self.image_fd = -1

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

    # -- the VMM -------------------------------------------------------------------------------

    def receive_mapping(self, size: int = IMAGE_SIZE, flags: int = MAP_WRITABLE) -> None:
        """Wait for SHMEM_MAP of the whole image; the answer is still due. Keeps its descriptor."""
        message = self.machine.front.next_backend_request(PROMPT_S)
        assert message.request == BackendRequest.SHMEM_MAP
        assert message.flags == Flags.VERSION | Flags.NEED_REPLY
        assert message.payload == MAPPING.pack(0, 0, 0, size, flags)
        assert len(message.payload) == 40
        (fd,) = message.fds
        if self.image_fd >= 0:
            os.close(self.image_fd)
        self.image_fd = fd

    def answer(self, verdict: int = 0) -> None:
        """Answer SHMEM_MAP."""
        channel = self.machine.front.backend_requests
        assert channel is not None
        payload = struct.pack("=Q", verdict)
        channel.send(BackendRequest.SHMEM_MAP, payload, flags=Flags.VERSION | Flags.REPLY)

    def take_image(self) -> None:
        """All that QEMU does about SHMEM_MAP."""
        self.receive_mapping()
        self.answer()
        self.send_table()

    def send_table(self, *, image: bool = True, size: int = IMAGE_SIZE) -> None:
        """SET_MEM_TABLE with boot memory, and with the image unless told otherwise."""
        machine = self.machine
        own = ProtocolFeature.GPA_ADDRESSES in machine.front.protocol_features
        regions = list(machine.memory.wire_regions(guest_addresses=own))
        fds = [machine.memory.fd] * len(regions)
        if image:
            at = IMAGE_ADDRESS if own else IMAGE_FRONTEND_ADDR
            regions.append(WireRegion(IMAGE_ADDRESS, size, at, 0))
            fds.append(self.image_fd)
        assert machine.front.set_mem_table(regions, fds) == 0, "the memory table was refused"

    def told_nothing(self) -> bool:
        """Whether nothing is on the back-end channel; all messages before were answered."""
        self.machine.front.get_features()
        channel = self.machine.front.backend_requests
        assert channel is not None
        return not select.select([channel], [], [], 0.05)[0]

    # -- the driver ----------------------------------------------------------------------------

    @property
    def queue(self) -> Queue:
        """The flush queue."""
        return self.machine.queues[0]

    def post(
        self,
        pieces: Sequence[bytes] = (FLUSH,),
        rooms: Sequence[int] = (RESPONSE_SIZE,),
        *,
        now: bool = True,
    ) -> Posted:
        """Make one chain available; now=False keeps it back until queue.publish()."""
        memory = self.machine.memory
        at = self._slots + self._posted % SLOT_COUNT * SLOT_SIZE
        self._posted += 1
        end = at + SLOT_SIZE
        buffers, laid = [], []
        for piece in pieces:
            memory.write(at, piece)
            buffers.append(Buffer(at, len(piece)))
            at += len(piece)
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
        self, pieces: Sequence[bytes] = (FLUSH,), rooms: Sequence[int] = (RESPONSE_SIZE,)
    ) -> tuple[int, bytes]:
        """Send one chain, wait for it; the length it claims and all of its rooms."""
        posted = self.post(pieces, rooms)
        (used,) = self.queue.wait_used()
        assert used.token == posted.token, "another chain came back"
        return used.written, self.content(posted)

    def content(self, posted: Posted) -> bytes:
        """Return what is in a chain's rooms."""
        memory = self.machine.memory
        return b"".join(memory.read(room.guest_addr, room.size) for room in posted.rooms)

    def flush_many(self, count: int) -> None:
        """So many flushes at once, all of them done."""
        posted = [self.post(now=False) for _ in range(count)]
        self.queue.publish()
        self.queue.notify()
        self.await_all(posted, DONE)

    def await_all(self, posted: Sequence[Posted], content: bytes) -> None:
        """All come back, each once, in their order, with this response."""
        used = self.queue.wait_used(len(posted))
        assert used == [Used(one.token, RESPONSE_SIZE) for one in posted]
        assert [self.content(one) for one in posted] == [content] * len(posted)

    @property
    def most_at_once(self) -> int:
        """How many flushes fit into the ring."""
        return self.queue.size if self.machine.setup.indirect else self.queue.size // 2


def serves(guest: PmemDriver) -> None:
    """A flush is done."""
    assert guest.exchange() == (RESPONSE_SIZE, DONE)


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder of a file system in memory, where a sync costs nothing and a hole shows."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


class PmemHost:
    """A running vhostd-pmem with one image."""

    def __init__(self, folder: Path, image: Path, *options: str, size: int = IMAGE_SIZE) -> None:
        """Make the image, unless it is there, and start."""
        assert executable(PROGRAM).exists(), f"{PROGRAM} is not installed next to this Python"
        self.image = image
        if not image.exists():
            with image.open("wb") as file:
                file.truncate(size)
        arguments = (f"--file={image}", f"--size={size}", f"--runtime-dir={folder}", *options)
        self.program = Program.start(PROGRAM, folder, arguments)
        self._control = folder / "control.sock"

    def boot(self, setup: Setup | None = None) -> PmemDriver:
        """A guest that runs and has the image."""
        return PmemDriver.boot(self.program.socket_path, setup)

    def realize(self, setup: Setup | None = None) -> PmemDriver:
        """A guest that has not started its driver."""
        return PmemDriver.realize(self.program.socket_path, setup)

    @contextmanager
    def control(self) -> Iterator[httpx.Client]:
        """A client of the control API."""
        transport = httpx.HTTPTransport(uds=str(self._control))
        with httpx.Client(transport=transport, base_url="http://vhostd", timeout=30) as client:
            yield client

    def status(self) -> PmemStatus:
        """What an operator sees of the device."""
        with self.control() as client:
            (status,) = client.get(VM_PATH).raise_for_status().json()
        found: PmemStatus = status
        return found

    def clear(self) -> None:
        """Let flushes succeed again."""
        with self.control() as client:
            client.post(f"{VM_PATH}/clear", json={}).raise_for_status()

    def shows(self, **expected: object) -> bool:
        """Wait until the status has these values; whether it came to that."""
        return wait_until(lambda: self.status().items() >= expected.items(), PROMPT_S)

    def stands(self, words: str) -> bool:
        """Wait until the status says how it does in these words; whether it came to that."""
        return wait_until(lambda: words in self.status()["standing"], PROMPT_S)

    def kill(self) -> None:
        """End it."""
        self.program.kill()


class PmemOracle(Oracle):
    """The same looks at a program whose device is a virtio-pmem."""

    def __init__(self, host: PmemHost) -> None:
        """Serve legal guests first, then look."""
        self.host = host
        super().__init__(host.program)

    def serve_legally(self, setup: Setup | None = None) -> None:
        """A new connection, the whole handshake, and a flush."""
        with self.host.boot(setup) as guest:
            serves(guest)
