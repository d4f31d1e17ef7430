"""A memory driver that follows the requested size at random and knows what must come of it."""

from __future__ import annotations

import random

from tests.fakes.mem import BLOCK_SIZE, MemAnswer, MemDriver

RUN_MAX = 8  # blocks of one PLUG
UNPLUG_ALL_CHANCE = 0.02


class Worker:
    """A driver that knows what it plugged, and marks each block of it."""

    def __init__(self, guest: MemDriver, seed: int) -> None:
        self.guest = guest
        self.plugged: set[int] = set()
        self.answers: set[MemAnswer] = set()
        self.config_changes = 0
        self._random = random.Random(seed)

    def step(self) -> bool:
        """Go a step towards what is requested; return whether it is reached."""
        self.config_changes += self.guest.take_config_changes()
        config = self.guest.config()
        assert config.plugged_size == len(self.plugged) * BLOCK_SIZE
        assert config.plugged_size <= config.usable_size <= config.region_size
        assert config.requested_size <= config.usable_size
        wanted = config.requested_size // BLOCK_SIZE
        if wanted == len(self.plugged):
            return True
        count = min(self._random.randint(1, RUN_MAX), abs(wanted - len(self.plugged)))
        if self._random.random() < UNPLUG_ALL_CHANCE:
            assert self.guest.unplug_all() is MemAnswer.ACK
            self.plugged.clear()
        elif wanted > len(self.plugged):
            self._plug(count, config.usable_size // BLOCK_SIZE)
        else:
            self._unplug(count)
        return False

    def _plug(self, count: int, usable: int) -> None:
        places = [
            first
            for first in range(usable - count + 1)
            if self.plugged.isdisjoint(range(first, first + count))
        ]
        first = self._random.choice(places)
        answer = self.guest.plug(first, count)
        self.answers.add(answer)
        if answer is MemAnswer.ACK:
            assert self.guest.pages(first, count) == 0, "plugged with old content"
            for block in range(first, first + count):
                self.guest.window.write(self.guest.address_of(block), self._mark(block))
                self.plugged.add(block)

    def _unplug(self, count: int) -> None:
        for block in self._random.sample(sorted(self.plugged), count):
            self.check(block)
            self.answers.add(self.guest.unplug(block))
            self.plugged.remove(block)

    def check(self, block: int) -> None:
        """The mark is still there: nobody touches plugged memory."""
        mark = self._mark(block)
        assert self.guest.window.read(self.guest.address_of(block), len(mark)) == mark

    def _mark(self, block: int) -> bytes:
        return b"block %d" % block
