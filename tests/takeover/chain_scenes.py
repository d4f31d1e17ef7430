"""Chains that the daemon's Python serves: virtio-mem's requests, and the balloon's statistics."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import httpx

from tests.fakes.balloon import BalloonQueue, pack_stats
from tests.fakes.mem import (
    BLOCK_SIZE,
    RESPONSE,
    BlockState,
    MemAnswer,
    MemDriver,
    MemRequest,
    Posted,
    pack_request,
)
from tests.fakes.memory import MIB
from tests.native.rig import wait_until
from tests.takeover.balloon_scene import BALLOON, BalloonVm
from tests.takeover.kept import VM, Kept
from tests.takeover.scene import Answerer, Scene, readable

WINDOW_SIZE = 128 * MIB
FREE_MEMORY = 4  # VIRTIO_BALLOON_S_MEMFREE
MEM = f"""
[[vm.{VM}.mem]]
id = "mem0"
window_address = "4GiB"
size = {WINDOW_SIZE}
requested_size = {WINDOW_SIZE}
"""
FIRST, COUNT, KNOWN = 3, 4, 16
"""Blocks that are asked for, and how many from 0 on are looked at."""


@dataclass(frozen=True, slots=True)
class MemKind:
    """A request: plugged says which blocks are so before and after it."""

    request: MemRequest
    before: frozenset[int]
    after: frozenset[int]
    state: BlockState = BlockState.PLUGGED


ASKED = frozenset(range(FIRST, FIRST + COUNT))
OTHERS = frozenset({1, 9})
MEM_KINDS = [
    MemKind(MemRequest.PLUG, OTHERS, OTHERS | ASKED),
    MemKind(MemRequest.UNPLUG, OTHERS | ASKED, OTHERS),
    MemKind(MemRequest.UNPLUG_ALL, OTHERS | ASKED, frozenset()),
    MemKind(MemRequest.STATE, OTHERS | {4}, OTHERS | {4}, BlockState.MIXED),
]


class MemScene(Scene):
    """One kind of request to a virtio-mem device."""

    configuration = MEM

    def __init__(self, kind: MemKind) -> None:
        """Nobody is connected yet."""
        self._kind = kind
        self._kept: Kept
        self._driver: MemDriver
        self._answerer: Answerer
        self._posted: Posted

    def open(self, kept: Kept) -> None:
        """Connect and start."""
        self._kept = kept
        self._driver = MemDriver.boot(kept.socket("mem0"), size=WINDOW_SIZE)
        self._answerer = Answerer(self._driver.machine.front)

    def close(self) -> None:
        """Hang up."""
        self._answerer.close()
        self._driver.close()

    def ready(self) -> None:
        """Have just those blocks plugged."""
        driver = self._driver
        for block in range(KNOWN):
            if (driver.state(block) is BlockState.PLUGGED) != (block in self._kind.before):
                change = driver.plug if block in self._kind.before else driver.unplug
                # What was unplugged may be plugged again once its memory is gone.
                wait_until(partial(self._made, change, block))

    @staticmethod
    def _made(change: Callable[[int], MemAnswer], block: int) -> bool:
        answer = change(block)
        assert answer in (MemAnswer.ACK, MemAnswer.BUSY), f"answered {answer!r}"
        return answer is MemAnswer.ACK

    def ask(self) -> None:
        """Make the request available."""
        everything = self._kind.request is MemRequest.UNPLUG_ALL
        address, count = (0, 0) if everything else (self._driver.address_of(FIRST), COUNT)
        self._driver.queue.calls()
        self._posted = self._driver.post([pack_request(self._kind.request, address, count)])

    def answered(self, *, woken: bool) -> bool:
        """The chain was given back."""
        queue = self._driver.queue
        memory, used = self._driver.machine.memory, queue.parts.used + 2
        return memory.read_number(used, 2) == memory.read_number(queue.parts.avail + 2, 2)

    def check(self) -> None:
        """Acknowledged once; the blocks are as they were said to be, for guest and operator."""
        driver, kind = self._driver, self._kind
        (used,) = driver.queue.wait_used()
        assert (used.token, used.written) == (self._posted.token, RESPONSE.size)
        answer, state = driver.read_answer(self._posted)
        assert answer is MemAnswer.ACK and state is kind.state, f"{answer!r} {state!r}"
        plugged = {n for n in range(KNOWN) if driver.state(n) is BlockState.PLUGGED}
        assert plugged == kind.after
        assert driver.config().plugged_size == len(kind.after) * BLOCK_SIZE
        status = self._kept.status()["mem"][0]
        assert status["plugged"] == len(kind.after) * BLOCK_SIZE
        assert status["answers"]["error"] == 0
        for block in kind.after:
            driver.fill(block, 1, block)
        assert driver.queue.collect() == [], "a chain came back twice"
        assert not readable(driver.machine.front)


class StatisticsScene(Scene):
    """The guest hands its statistics over."""

    configuration = BALLOON

    def __init__(self) -> None:
        """Nobody is connected yet."""
        self._vm: BalloonVm

    def open(self, kept: Kept) -> None:
        """Connect and give the first numbers."""
        self._vm = BalloonVm(kept)
        self._vm.driver.give_stats(self._numbers())
        self._numbers_are_known()

    def close(self) -> None:
        """Hang up."""
        self._vm.close()

    def _numbers(self) -> bytes:
        return pack_stats({FREE_MEMORY: self._vm.next_number() * MIB})

    def _numbers_are_known(self) -> None:
        def look() -> bool:
            stats: dict[str, int] = self._vm.kept.status()["balloon"]["stats"]
            return list(stats.values()) == [self._vm.number * MIB]

        wait_until(look)

    def ready(self) -> None:
        """Have the buffer asked back, once."""
        with suppress(httpx.HTTPStatusError):  # there are no new numbers while nobody gives any
            self._vm.kept.wish("GET", "/balloon/stats?fresh=1&timeout_s=0")
        self._vm.driver.wait_stats_request()

    def ask(self) -> None:
        """Give it with new numbers."""
        self._vm.driver.give_stats(self._numbers())

    def answered(self, *, woken: bool) -> bool:
        """Nothing answers it: it was seen, and the daemon has gone back to sleep."""
        return woken

    def check(self) -> None:
        """The operator sees the numbers, and the buffer stays until it is asked for."""
        self._numbers_are_known()
        self._vm.works()
        assert self._vm.driver.queue(BalloonQueue.STATS).collect() == []

    def finish(self) -> None:
        """The buffer is there still."""
        self.ready()


CHAINS: dict[str, Callable[[], Scene]] = {
    **{kind.request.name.lower().replace("_", "-"): partial(MemScene, kind) for kind in MEM_KINDS},
    "statistics": StatisticsScene,
}
