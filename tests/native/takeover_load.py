"""A guest that keeps all queues of a device busy, and looks at everything that comes back.

It does not look at a ring before it is called, and does not notice who serves it. Each page it
gives up is gone once that is acknowledged, and holds what the guest wrote from when it has it back.
Knows the fake guest; must not know the protocol or device logic.
"""

from __future__ import annotations

import os
import random
import select
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vhostd._native import Handler

from tests.fakes.driver import Buffer, Queue, QueueFull, Used
from tests.fakes.memory import PAGE_SIZE, GuestMemory
from tests.native.rig import PATIENCE_S, pack_pfns
from tests.native.takeover_heirs import answer_to
from tests.native.takeover_life import DATA_ADDR, Life

PAGES = 24  # of each of the two uses
PATTERN = b"guest %8d; "
FLUSH = bytes(4)
UNTOUCHED = b"\xee"
BUFFER_SIZE = 64


@dataclass(frozen=True, slots=True)
class Made:
    """A chain to send.

    Attributes:
        written: the bytes it must claim when it is back.
        check: look at what came of it.
        undo: forget it.
    """

    buffers: Sequence[Buffer]
    written: int
    check: Callable[[], None]
    undo: Callable[[], None]


class Pages:
    """Pages a guest has, with a pattern of its own in each."""

    def __init__(self, memory: GuestMemory, first_addr: int) -> None:
        """Write to all of them."""
        self._memory = memory
        self._content: dict[int, bytes] = {}
        self._count = 0
        self.ours = deque(first_addr + number * PAGE_SIZE for number in range(PAGES))
        for page in self.ours:
            self._fill(page)

    def _fill(self, page: int) -> None:
        self._count += 1
        content = PATTERN % self._count * (PAGE_SIZE // len(PATTERN % self._count))
        self._memory.write(page, content)
        self._content[page] = content

    def check(self, page: int) -> None:
        """It is as the guest left it."""
        content = self._content[page]
        assert self._memory.read(page, len(content)) == content, f"page {page:#x} has changed"

    def give(self) -> int:
        """One the guest does without."""
        page = self.ours.popleft()
        self.check(page)
        return page

    def is_gone(self, page: int) -> None:
        """It was given back to the host."""
        assert not self._memory.page_present(page), f"page {page:#x} is there"

    def take_back(self, page: int) -> None:
        """The guest uses it again."""
        self._fill(page)
        self.ours.append(page)

    def check_all(self) -> None:
        """All the guest has are as it left them."""
        for page in self.ours:
            self.check(page)


class Traffic(ABC):
    """One queue's."""

    def __init__(self, driver: Queue, random_: random.Random, indirect: bool) -> None:
        """Nothing is on its way."""
        self._driver = driver
        self._random = random_
        self._indirect = indirect
        self._sent: deque[tuple[int, Made]] = deque()  # token and chain, oldest first
        self._free: list[int] = []
        self.completed = 0

    @property
    def call_fd(self) -> int:
        """What the guest waits for."""
        return self._driver.call_fd

    @property
    def waiting(self) -> bool:
        """Something is on its way."""
        return bool(self._sent)

    def send_some(self) -> None:
        """Fill the ring with what there is to do, and kick if the device wants that."""
        added = False
        try:
            while (made := self.make()) is not None:
                try:
                    token = self._driver.add_chain(
                        made.buffers, indirect=self._indirect, publish=False
                    )
                except QueueFull:
                    made.undo()
                    break
                self._sent.append((token, made))
                added = True
        finally:
            if added:
                self._driver.publish()
                self._driver.notify()

    def take(self) -> None:
        """After a call: what is back is the oldest on its way, each once, as it must be."""
        os.eventfd_read(self.call_fd)
        for used in self._driver.collect():
            token, made = self._sent.popleft()
            assert used == Used(token, made.written)
            self.completed += 1
            made.check()

    def _buffer(self) -> int:
        if self._free:
            return self._free.pop()
        return self._driver.memory.allocate(BUFFER_SIZE)

    @abstractmethod
    def make(self) -> Made | None:
        """The next chain, if there is one."""


class Balloon(Traffic):
    """Inflate or deflate: pages go from one pool to another."""

    def __init__(
        self,
        driver: Queue,
        random_: random.Random,
        indirect: bool,
        give: Callable[[], int | None],
        arrived: Callable[[int], None],
        undo: Callable[[int], None],
    ) -> None:
        """give: a page to list, if there is one; arrived: it is acknowledged."""
        super().__init__(driver, random_, indirect)
        self._give = give
        self._arrived = arrived
        self._undo = undo

    def make(self) -> Made | None:
        """One or two pages, a descriptor for each."""
        given = [self._give() for _ in range(self._random.randint(1, 2))]
        pages = [page for page in given if page is not None]
        if not pages:
            return None
        rooms = [self._buffer() for _ in pages]
        for room, page in zip(rooms, pages, strict=True):
            self._driver.memory.write(room, pack_pfns([page // PAGE_SIZE]))

        def check() -> None:
            self._free += rooms
            for page in pages:
                self._arrived(page)

        def undo() -> None:
            self._free += rooms
            for page in pages:
                self._undo(page)

        return Made([Buffer(room, 4) for room in rooms], 0, check, undo)


class Reports(Traffic):
    """Free pages are reported, and used again at once."""

    def __init__(self, driver: Queue, random_: random.Random, indirect: bool, pages: Pages) -> None:
        """pages: of this queue alone."""
        super().__init__(driver, random_, indirect)
        self._pages = pages

    def make(self) -> Made | None:
        """One or two pages."""
        wanted = min(len(self._pages.ours), self._random.randint(1, 2))
        if not wanted:
            return None
        pages = [self._pages.give() for _ in range(wanted)]

        def check() -> None:
            for page in pages:
                self._pages.is_gone(page)
                self._pages.take_back(page)

        def undo() -> None:
            self._pages.ours.extend(pages)

        return Made([Buffer(page, PAGE_SIZE, True) for page in pages], 0, check, undo)


class Questions(Traffic):
    """Chains with an answer: control, or flush."""

    def __init__(self, driver: Queue, random_: random.Random, indirect: bool, flush: bool) -> None:
        """flush: the same question each time."""
        super().__init__(driver, random_, indirect)
        self._flush = flush
        self._count = 0

    def make(self) -> Made:
        """A question and room for its answer."""
        self._count += 1
        question = FLUSH if self._flush else b"question %9d" % self._count
        answer = FLUSH if self._flush else answer_to(question)
        at, room = self._buffer(), self._buffer()
        memory = self._driver.memory
        memory.write(at, question)
        memory.write(room, UNTOUCHED * len(answer))

        def check() -> None:
            self._free += [at, room]
            assert memory.read(room, len(answer)) == answer

        def undo() -> None:
            self._free += [at, room]

        buffers = [Buffer(at, len(question)), Buffer(room, len(answer), True)]
        return Made(buffers, len(answer), check, undo)


class Guest:
    """All queues of a life whose handlers are INFLATE, DEFLATE, REPORT, CONTROL and FLUSH."""

    def __init__(self, life: Life, random_: random.Random) -> None:
        """Nothing is sent yet."""
        indirect = life.variant.layout.indirect
        self._pages = pages = Pages(life.memory, DATA_ADDR)
        self._reported = Pages(life.memory, DATA_ADDR + PAGES * PAGE_SIZE)
        self.in_balloon = in_balloon = deque[int]()

        def inflated(page: int) -> None:
            pages.is_gone(page)
            in_balloon.append(page)

        def to_inflate() -> int | None:
            return pages.give() if pages.ours else None

        def to_deflate() -> int | None:
            return in_balloon.popleft() if in_balloon else None

        by_handler = dict(zip(life.handlers, life.drivers, strict=True))
        self.traffics: dict[Handler, Traffic] = {
            Handler.INFLATE: Balloon(
                by_handler[Handler.INFLATE],
                random_,
                indirect,
                to_inflate,
                inflated,
                pages.ours.append,
            ),
            Handler.DEFLATE: Balloon(
                by_handler[Handler.DEFLATE],
                random_,
                indirect,
                to_deflate,
                pages.take_back,
                in_balloon.append,
            ),
            Handler.REPORT: Reports(by_handler[Handler.REPORT], random_, indirect, self._reported),
            Handler.CONTROL: Questions(by_handler[Handler.CONTROL], random_, indirect, False),
            Handler.FLUSH: Questions(by_handler[Handler.FLUSH], random_, indirect, True),
        }
        self._poller = select.poll()
        self._by_call = {traffic.call_fd: traffic for traffic in self.traffics.values()}
        for fd in self._by_call:
            self._poller.register(fd, select.POLLIN)

    def send(self) -> None:
        """Fill all rings."""
        for traffic in self.traffics.values():
            traffic.send_some()

    def receive(self) -> None:
        """Wait for a call, and take what all queues have that were called."""
        ready = self._poller.poll(PATIENCE_S * 1000)
        assert ready, "no call, and something is on its way"
        for fd, _ in ready:
            self._by_call[fd].take()

    def settle(self) -> None:
        """Wait for all that is on its way; what the guest has is as it left it."""
        while any(traffic.waiting for traffic in self.traffics.values()):
            self.receive()
        self._pages.check_all()
        self._reported.check_all()
