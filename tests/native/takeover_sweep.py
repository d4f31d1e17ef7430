"""A server killed at each place of one request; the chains and the memory such a sweep looks at.

Knows vhostd._native and the fake guest; must not know the protocol or device logic.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from vhostd._native import Handler

from tests.fakes.driver import Buffer, Queue, Used
from tests.fakes.eventfd import wait_readable
from tests.fakes.memory import PAGE_SIZE
from tests.native.rig import PATIENCE_S, pack_pfns
from tests.native.takeover_heirs import answer_to
from tests.native.takeover_life import DATA_ADDR, Heirs, Life, Variant
from tests.native.takeover_steps import Stepper

HANDLERS = [
    Handler.INFLATE,
    Handler.DEFLATE,
    Handler.REPORT,
    Handler.CONTROL,
    Handler.FLUSH,
]
PAGES = [DATA_ADDR // PAGE_SIZE, DATA_ADDR // PAGE_SIZE + 2]
FLUSH = bytes(4)
QUESTION = b"who serves?!"
UNTOUCHED = b"\xee"
FEWEST_PLACES = 12  # of any request: a sweep that finds less has not seen it
REACHED_SHARE = 0.9


def ring_size(variant: Variant) -> int:
    """So that chains of two lie across the end of a packed ring every third time."""
    return 5 if variant.layout.packed else 4


def called(driver: Queue) -> list[Used]:
    """Wait for an interrupt and take what is back then, which may be nothing.

    Raises:
        AssertionError: there was none.
    """
    assert wait_readable(driver.call_fd, PATIENCE_S), "no interrupt"
    os.eventfd_read(driver.call_fd)
    return driver.collect()


class Chains:
    """One kind of chain, two descriptors long: sent, and looked at when it is back."""

    def __init__(self, life: Life, handler: Handler) -> None:
        """Lay out its buffers, which are used again for each."""
        self.memory = life.memory
        self.handler = handler
        self._life = life
        self._index = HANDLERS.index(handler)
        self._driver = life.drivers[self._index]
        self._answer = b""
        if handler in (Handler.INFLATE, Handler.DEFLATE):
            self._buffers = [self._lay(pack_pfns([pfn])) for pfn in PAGES]
        elif handler is Handler.REPORT:
            self._buffers = [Buffer(pfn * PAGE_SIZE, PAGE_SIZE, True) for pfn in PAGES]
        else:
            asked = FLUSH if handler is Handler.FLUSH else QUESTION
            self._answer = FLUSH if handler is Handler.FLUSH else answer_to(QUESTION)
            self._room = self.memory.allocate(len(asked))
            self._buffers = [self._lay(asked), Buffer(self._room, len(asked), True)]

    def _lay(self, data: bytes) -> Buffer:
        at = self.memory.allocate(len(data))
        self.memory.write(at, data)
        return Buffer(at, len(data))

    @property
    def _discards(self) -> bool:
        return self.handler in (Handler.INFLATE, Handler.REPORT)

    @property
    def given_back(self) -> int:
        """How many ever were."""
        return self._life.origin.ring_statistics(self._index).used

    def send(self) -> int:
        """Send one, pages it gives up present, room for an answer not touched; its token."""
        if self._discards:
            for pfn in PAGES:
                self.memory.touch(pfn * PAGE_SIZE, PAGE_SIZE)
        if self._answer:
            self.memory.write(self._room, UNTOUCHED * len(self._answer))
        indirect = self._life.variant.layout.indirect
        token = self._driver.add_chain(self._buffers, indirect=indirect)
        self._driver.notify()
        return token

    def await_one(self, token: int) -> None:
        """Wait for its interrupt; it must be back, alone and with all its effects."""
        back: list[Used] = []
        while not back:
            back = called(self._driver)
        assert back == [Used(token, len(self._answer))]
        if self._discards:
            assert not any(self.memory.page_present(pfn * PAGE_SIZE) for pfn in PAGES)
        if self._answer:
            assert self.memory.read(self._room, len(self._answer)) == self._answer

    def exchange(self) -> None:
        """Send one and wait for it."""
        self.await_one(self.send())

    def bytes(self) -> bytes:
        """The ring, and where an answer is written."""
        parts, size = self._driver.parts, self._driver.size
        packed = self._life.variant.layout.packed
        sizes = (16 * size, 4, 4) if packed else (16 * size, 6 + 2 * size, 6 + 8 * size)
        pieces = zip((parts.desc, parts.avail, parts.used), sizes, strict=True)
        ring = b"".join(self.memory.read(at, length) for at, length in pieces)
        return ring + (self.memory.read(self._room, len(self._answer)) if self._answer else b"")


@dataclass(frozen=True)
class Kept:
    """What a server leaves behind and is memory, but for the guest's."""

    shared: mmap.mmap
    given_up: mmap.mmap

    @classmethod
    @contextmanager
    def of(cls, life: Life) -> Iterator[Kept]:
        """Map it."""
        with ExitStack() as held:
            maps = [mmap.mmap(fd, 0) for fd in (life.origin.shared_fd, life.given_up.given_up_fd)]
            for mapped in maps:
                held.callback(mapped.close)
            yield cls(*maps)

    def bytes(self) -> bytes:
        """All of it."""
        return self.shared[:] + self.given_up[:]


@dataclass(frozen=True)
class Request:
    """What a server is killed in.

    Attributes:
        prepare: bring about what it begins with, with a server alive.
        post: make it; nobody serves at that moment.
        look: what the server leaves behind as memory.
        done: whether it was served since it was made.
        check: look at what came out of it, with another server alive.
    """

    prepare: Callable[[], None]
    post: Callable[[], None]
    look: Callable[[], bytes]
    done: Callable[[], bool]
    check: Callable[[], None]


def sweep(life: Life, request: Request, alone: bool = True) -> None:
    """Kill a server's worker at each place of a request, each time followed by another.

    alone: it needs no help of Python.
    """
    with life.heirs() as heirs:
        heirs.succeed()
        places = _begin(heirs, request, alone).record(request.look, request.done)
        heirs.succeed()
        request.check()
        reached = 0
        for count, place in enumerate(places, 1):
            stopped = _begin(heirs, request, alone)
            if alone:
                reached += stopped.reach(place, request.done)
            else:
                reached += len(stopped.record(request.look, request.done, count)) == count
            heirs.succeed()
            request.check()
    # What threads do to each other may go by a few, no more.
    assert len(places) > FEWEST_PLACES
    assert reached > len(places) * REACHED_SHARE


def _begin(heirs: Heirs, request: Request, alone: bool) -> Stepper:
    heirs.wait_ready()
    request.prepare()
    stopped = heirs.stop_worker(alone)
    stopped.run_idle()
    request.post()
    return stopped


def sweep_calls(life: Life, request: Request) -> None:
    """The same for the thread that runs Python, at its system calls alone."""
    with life.heirs() as heirs:
        heirs.succeed()
        for places in itertools.count():
            heirs.wait_ready()
            request.prepare()
            stopped = heirs.stop_main()
            request.post()
            more = stopped.advance_calls(places, request.done)
            heirs.succeed()
            request.check()
            if not more:
                assert places > FEWEST_PLACES
                return
