"""A guest whose device is served by one process after the other; nothing but descriptors stays.

Knows vhostd._native and the fake guest; must not know the protocol or device logic.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from vhostd._native import Device, Handler, Image, Mapping, RingFeature, RingPosition, RingSetup

from tests.fakes.driver import Queue, RingOptions
from tests.fakes.eventfd import drain, new_eventfd, wait_readable
from tests.fakes.memory import MIB, GuestMemory
from tests.fakes.packed import PackedQueue
from tests.fakes.split import SplitQueue
from tests.native.rig import CONFIG_WRITABLE, PATIENCE_S, Layout
from tests.native.takeover_heirs import LENGTH, PID, SUCCEED, WORKER_NAME, Estate, receive
from tests.native.takeover_steps import Stepper

IMAGE_SIZE = 1 * MIB
DATA_ADDR = 4 * MIB
MEMORY_SIZE = 8 * MIB


@dataclass(frozen=True, slots=True)
class Variant:
    """What a ring looks like; what the rig knows, and the order of completions."""

    layout: Layout
    in_order: bool = False

    def __str__(self) -> str:
        """Name a test's variant."""
        return f"{self.layout}" + "-in_order" * self.in_order

    def queue(self, memory: GuestMemory, size: int) -> Queue:
        """A driver's ring."""
        kind = PackedQueue if self.layout.packed else SplitQueue
        options = RingOptions(self.layout.event_idx, self.layout.indirect, self.in_order)
        return kind(memory, size, options)

    @property
    def features(self) -> RingFeature:
        """The same for the core."""
        order = RingFeature.IN_ORDER if self.in_order else RingFeature(0)
        return self.layout.features | order


VARIANTS = [
    Variant(Layout(packed, event_idx), in_order)
    for packed in (False, True)
    for event_idx in (False, True)
    for in_order in (False, True)
]


@dataclass
class Life:
    """What outlives every server: guest, rings and the memfds of its device."""

    memory: GuestMemory
    variant: Variant
    handlers: Sequence[Handler]
    drivers: list[Queue]
    origin: Device  # made the memfds and served nothing; it shows what they hold
    given_up: Mapping
    image_files: tuple[int, int, int] | None
    sockets: tuple[socket.socket, socket.socket]
    ready_fd: int

    @classmethod
    @contextmanager
    def begin(cls, variant: Variant, handlers: Sequence[Handler], ring_size: int) -> Iterator[Life]:
        """Make everything; nobody serves yet."""
        with ExitStack() as held:
            memory = held.enter_context(GuestMemory.flat(MEMORY_SIZE))
            origin = Device(len(handlers), len(CONFIG_WRITABLE), CONFIG_WRITABLE)
            held.callback(origin.close)
            given_up = Mapping(memory.fd)
            held.callback(given_up.close)
            drivers = [variant.queue(memory, ring_size) for _ in handlers]
            for driver in drivers:
                held.callback(driver.close)
            pair = socket.socketpair()
            for end in pair:
                held.enter_context(end)
                end.settimeout(PATIENCE_S)
            ready_fd = new_eventfd()
            held.callback(os.close, ready_fd)
            files = _image_files(held) if Handler.FLUSH in handlers else None
            yield cls(memory, variant, handlers, drivers, origin, given_up, files, pair, ready_fd)

    @property
    def front(self) -> socket.socket:
        """The VMM's end of the connection."""
        return self.sockets[0]

    @property
    def setups(self) -> tuple[RingSetup, ...]:
        """How every server starts the rings."""
        return tuple(
            RingSetup(
                size=driver.size,
                features=self.variant.features,
                desc_addr=driver.parts.desc,
                avail_addr=driver.parts.avail,
                used_addr=driver.parts.used,
                log_addr=0,
                position=RingPosition(),
                handler=handler,
                kick_fd=driver.kick_fd,
                call_fd=driver.call_fd,
                err_fd=driver.err_fd,
                start_number=1,
            )
            for driver, handler in zip(self.drivers, self.handlers, strict=True)
        )

    def estate(self) -> Estate:
        """The same for processes."""
        return Estate(
            memory_fd=self.memory.fd,
            regions=tuple((r.guest_addr, r.size, r.file_offset) for r in self.memory.regions),
            shared_fd=self.origin.shared_fd,
            reply_fd=self.origin.reply_fd,
            given_up_fd=self.given_up.given_up_fd,
            config_writable=CONFIG_WRITABLE,
            rings=self.setups,
            ready_fd=self.ready_fd,
            socket_fd=self.sockets[1].fileno(),
            image_fds=self.image_files,
        )

    @contextmanager
    def heirs(self) -> Iterator[Heirs]:
        """The line of servers; its last one ends with the block."""
        ours, theirs = socket.socketpair()
        estate = self.estate()
        with ours, theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.native.takeover_heirs", str(theirs.fileno())],
                pass_fds=[theirs.fileno(), *estate.fds()],
            )
            theirs.close()
            ours.settimeout(PATIENCE_S)
            content = pickle.dumps(estate)
            ours.sendall(LENGTH.pack(len(content)) + content)
            heirs = Heirs(process, ours, self.ready_fd)
            try:
                yield heirs
            finally:
                heirs.end()
                assert process.wait(PATIENCE_S) == 0


@dataclass
class Heirs:
    """The processes."""

    founder: subprocess.Popen[bytes]
    control: socket.socket
    ready_fd: int
    pid: int = 0
    count: int = 0
    _stepper: Stepper | None = None

    def succeed(self) -> None:
        """Kill the one that lives, at whatever it does, and start the next."""
        self._kill()
        self.control.sendall(SUCCEED)
        (self.pid,) = PID.unpack(receive(self.control, PID.size))
        self.count += 1

    def end(self) -> None:
        """Kill the last."""
        self._kill()
        self.control.close()

    def _kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
        if self._stepper is not None:
            self._stepper.bury()
            self._stepper = None

    def stop_worker(self, alone: bool) -> Stepper:
        """Stop the thread that serves the rings; succeed() must follow.

        alone: Python stands still from now on.
        """
        self._stepper = Stepper(self._worker_task(), [self.pid] if alone else [])
        return self._stepper

    def stop_main(self) -> Stepper:
        """Stop the thread that runs Python; succeed() must follow."""
        self._stepper = Stepper(self.pid)
        return self._stepper

    def wait_ready(self) -> None:
        """Wait until it serves everything."""
        assert wait_readable(self.ready_fd, PATIENCE_S), "never ready"
        drain(self.ready_fd)

    def _worker_task(self) -> int:
        for task in os.listdir(f"/proc/{self.pid}/task"):  # noqa: PTH208 - names are wanted
            with open(f"/proc/{self.pid}/task/{task}/comm") as file:  # noqa: PTH123
                if file.read().strip() == WORKER_NAME:
                    return int(task)
        raise AssertionError("it has no worker")


def _image_files(held: ExitStack) -> tuple[int, int, int]:
    """An image opened twice, and the memfd of its state."""
    with tempfile.NamedTemporaryFile() as named:
        named.truncate(IMAGE_SIZE)
        fds = [os.open(named.name, os.O_RDWR | os.O_CLOEXEC) for _ in range(2)]
    for fd in fds:
        held.callback(os.close, fd)
    origin = Image(fds[0], fds[1])
    held.callback(origin.close)
    return fds[0], fds[1], origin.shared_fd
