"""A VM with disks in this process, real but for its VMM; and the VMM, with a guest that flushes.

The VMM blocks, so each of its steps is done in a thread. Must not know what a test is after.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import trio
from vhostd.backend.journal import Journal
from vhostd.backend.storage import Storage
from vhostd.backend.vm import Vm
from vhostd.config import VmConfig
from vhostd.config_devices import PmemConfig
from vhostd.images.image_file import create_image
from vhostd.log import RateLimiter
from vhostd.memory.registry import MemoryRegistry
from vhostd.transport.listener import Listener
from vhostd.units import GiB, MiB

from tests.fakes.channel import Message
from tests.fakes.driver import Buffer
from tests.fakes.frontend import FrontEnd
from tests.fakes.machine import Machine, Setup
from tests.fakes.messages import WireRegion

SIZE = 64 * MiB
WINDOW_ADDRESS = 9 * GiB
PATIENCE_S = 60.0
FLUSHED, FAILED = 0, 0xFFFF_FFFF
SETUP = Setup(packed=True, queue_count=1)

Result = TypeVar("Result")


async def blocking(work: Callable[[], Result]) -> Result:
    """Do it in a thread, while the VM goes on."""
    return await trio.to_thread.run_sync(work)


async def until(condition: Callable[[], object]) -> None:
    """Wait for what no event announces.

    Raises:
        trio.TooSlowError: it did not come.
    """
    with trio.fail_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)


def disk(folder: Path, name: str = "disk0", **options: Any) -> PmemConfig:  # noqa: ANN401
    """One disk of the VM, and its image unless it exists."""
    path = folder / f"{name}.img"
    if not path.exists():
        create_image(path, SIZE)
    return PmemConfig(name, folder / f"{name}.sock", path, SIZE, **options)


@dataclass
class Disks:
    """A VM that is served, and all its news."""

    vm: Vm
    news: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def status(self, name: str = "disk0") -> dict[str, Any]:
        """What an operator sees of a disk."""
        (found,) = (pmem for pmem in self.vm.status()["pmem"] if pmem["id"] == name)
        return dict(found)

    def storage(self, name: str = "disk0") -> Storage:
        """A connected disk's image."""
        return self.vm.storage_of(self.vm.find_pmem(name))

    def told(self, event: str) -> list[dict[str, Any]]:
        """All news of a kind."""
        return [fields for name, fields in self.news if name == event]

    async def looked_at(self, name: str = "disk0", fd: int | None = None) -> None:
        """Wait until the image was looked at once more, from now on; fd: it has no name."""
        path = Path(self.vm.find_pmem(name).options.file)
        before = self.status(name)["allocated"]
        with opened(path if fd is None else Path(f"/proc/self/fd/{fd}")) as file:
            os.pwrite(file, b"x" * 8192, SIZE // 2 + before)  # blocks that it did not have
        await until(lambda: self.status(name)["allocated"] != before)


@asynccontextmanager
async def serving(*pmems: PmemConfig) -> AsyncIterator[Disks]:
    """A VM with these disks, served inside the block."""
    config = VmConfig("web", pmems=pmems)
    news: list[tuple[str, dict[str, Any]]] = []
    journal = Journal(
        "web",
        RateLimiter(trio.current_time),
        lambda vm, event, fields: news.append((event, fields)),
    )
    sources = [Listener.bind(path) for path in config.sockets]
    vm = Vm(config, sources, MemoryRegistry(), journal)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(vm.run)
        yield Disks(vm, news)
        nursery.cancel_scope.cancel()


async def turned_away(pmem: PmemConfig) -> bool:
    """Connect, and be hung up on."""

    def connect() -> bool:
        with FrontEnd.connect(pmem.socket) as front:
            return front.wait_closed()

    return await blocking(connect)


class Guest:
    """A VMM and its guest on one disk; blocking."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._bytes = machine.memory.allocate(8)

    @classmethod
    def boot(cls, pmem: PmemConfig, setup: Setup = SETUP) -> Guest:
        """Connect and start the driver."""
        return cls(Machine.boot(pmem.socket, setup))

    def map_request(self) -> Message:
        """The back end's request for the mapping."""
        return self.machine.front.next_backend_request(PATIENCE_S)

    def answer(self, request: Message, verdict: int = 0) -> None:
        """Acknowledge it, and close what came along."""
        self.machine.front.answer_backend_request(request, verdict)
        request.close_fds()

    def flush(self) -> int:
        """Have one flush done; what the guest reads as its result."""
        memory, (queue,) = self.machine.memory, self.machine.queues
        memory.write(self._bytes, bytes(4) + b"\x55" * 4)
        queue.add_chain([Buffer(self._bytes, 4), Buffer(self._bytes + 4, 4, writable=True)])
        queue.kick()
        (used,) = queue.wait_used(timeout_s=PATIENCE_S)
        assert used.written == 4
        return memory.read_number(self._bytes + 4, 4)

    def has_memory(self, fd: int, address: int = WINDOW_ADDRESS, size: int = SIZE) -> None:
        """Add a region to the guest's memory."""
        front = self.machine.front
        assert front.add_mem_reg(self._region(address, size), fd) == 0

    def loses_memory(self, address: int = WINDOW_ADDRESS, size: int = SIZE) -> None:
        """Take that region away."""
        assert self.machine.front.rem_mem_reg(self._region(address, size)) == 0

    def _region(self, address: int, size: int) -> WireRegion:
        return WireRegion(address, size, address, 0)


@asynccontextmanager
async def guest_on(
    pmem: PmemConfig, *, mapped: bool | None = None, setup: Setup = SETUP
) -> AsyncIterator[Guest]:
    """A guest that runs inside the block; unless told otherwise, its VMM maps what it is to."""
    guest = await blocking(lambda: Guest.boot(pmem, setup))
    try:
        if mapped if mapped is not None else pmem.mode == "shmem":
            request = await blocking(guest.map_request)
            await blocking(lambda: guest.answer(request))
        yield guest
    finally:
        await blocking_to_end(guest.machine.close)


async def blocking_to_end(work: Callable[[], None]) -> None:
    """The same, though the test is being cancelled."""
    with trio.CancelScope(shield=True):
        await blocking(work)


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    """A descriptor of the file."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
