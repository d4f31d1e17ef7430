"""vhostd dies, or stands for longer than its watchdog allows, between any two messages.

A conversation of several messages is a sequence of states, and a successor must go on in each of
them. Afterwards every device works, every channel is alive, and no live page is gone.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakes.frontend import FrontEnd
from tests.fakes.handshake import accepted
from tests.fakes.machine import Machine
from tests.fakes.mem import BLOCK_SIZE, BlockState, MemAnswer, MemDriver
from tests.fakes.memory import MIB, PAGE_SIZE
from tests.native.rig import wait_until
from tests.takeover.balloon_scene import BALLOON, EXTRA, BalloonVm
from tests.takeover.chain_scenes import MEM, WINDOW_SIZE
from tests.takeover.kept import Kept
from tests.takeover.scene import Answerer

pytestmark = pytest.mark.timeout(7200)

LIVE, LIVE_SIZE = 20 * MIB, 4 * MIB
"""Memory that the guest uses all the time."""
KEPT, KEPT_COUNT = 0, 4
"""Blocks that it has plugged and uses."""


class Guest:
    """A VM with a balloon and a memory device, and what must be true of it at any time."""

    def __init__(self, kept: Kept) -> None:
        """Both devices run."""
        self.kept = kept
        self._marks = 0
        self.up()

    def up(self) -> None:
        """QEMU starts, and the guest boots."""
        self.balloon = BalloonVm(self.kept)
        self.mem = MemDriver.boot(self.kept.socket("mem0"), size=WINDOW_SIZE)
        self.mem_answerer = Answerer(self.mem.machine.front)
        self.mark = self._next_mark()
        self.balloon.machine.memory.touch(LIVE, LIVE_SIZE, self.mark)
        assert self.mem.plug(KEPT, KEPT_COUNT) is MemAnswer.ACK
        self.mem.fill(KEPT, KEPT_COUNT, self.mark)

    def down(self) -> None:
        """QEMU ends."""
        self.mem_answerer.close()
        self.mem.close()
        self.balloon.close()

    def _next_mark(self) -> int:
        self._marks = self._marks % 200 + 1
        return self._marks

    @property
    def machines(self) -> tuple[Machine, Machine]:
        return self.balloon.machine, self.mem.machine

    def check(self) -> None:
        """Every device works, every channel is alive, no live page is gone."""
        live = self.balloon.machine.memory.read(LIVE, LIVE_SIZE)
        assert live == bytes([self.mark]) * LIVE_SIZE, "live memory of the guest is gone"
        self.balloon.works()
        if self.mem.state(KEPT, KEPT_COUNT) is BlockState.PLUGGED:
            assert self.mem.filled(KEPT, KEPT_COUNT, self.mark), "a plugged block is gone"
        assert self.mem.plug(40) is MemAnswer.ACK
        self.mem.fill(40, 1, 7)
        assert self.mem.filled(40, 1, 7)
        assert self.mem.unplug(40) is MemAnswer.ACK
        wait_until(lambda: self.mem.pages(40) == 0)
        for answerer, change in (
            (self.balloon.answerer, self.set_target),
            (self.mem_answerer, self.resize),
        ):
            before = answerer.changes
            change()
            wait_until(lambda a=answerer, b=before: a.changes > b or a.lost)  # type: ignore[misc]
            assert not answerer.lost, "the channel for config changes is gone"

    def set_target(self) -> None:
        """An operator wants another balloon, and the guest reads it."""
        target = PAGE_SIZE * self.balloon.next_number()
        self.kept.wish("PUT", "/balloon", target=target)
        assert self.balloon.driver.config().num_pages == target // PAGE_SIZE

    def resize(self) -> None:
        """An operator wants another size of the window, and the guest reads it."""
        size = WINDOW_SIZE - BLOCK_SIZE * (1 + self.balloon.next_number() % 4)
        self.kept.wish("PUT", "/mem", size=size, device="mem0")
        assert self.mem.config().requested_size == size


def boot(guest: Guest) -> None:
    guest.up()


def reboot(guest: Guest) -> None:
    for machine in guest.machines:
        machine.restart_afresh()


def stop_and_cont(guest: Guest) -> None:
    for machine in guest.machines:
        machine.stop()
    for machine in guest.machines:
        machine.start(with_memory=False)


def change_memory(guest: Guest) -> None:
    front = guest.balloon.front
    accepted(front.add_mem_reg(EXTRA, guest.balloon.extra.fd), "ADD_MEM_REG")
    guest.balloon.extra_works(there=True)
    accepted(front.rem_mem_reg(EXTRA), "REM_MEM_REG")
    guest.balloon.works()


def change_config(guest: Guest) -> None:
    guest.set_target()
    accepted(guest.balloon.driver.write_actual(1), "SET_CONFIG")
    guest.resize()


def unplug_and_plug(guest: Guest) -> None:
    guest.mem_answerer.close()
    guest.mem.close()
    guest.mem = MemDriver.boot(guest.kept.socket("mem0"), size=WINDOW_SIZE)
    guest.mem_answerer = Answerer(guest.mem.machine.front)
    guest.mem.fill(KEPT, KEPT_COUNT, guest.mark)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order; from_nothing: the VM is not there before."""

    run: Callable[[Guest], None]
    from_nothing: bool = False


CONVERSATIONS = {
    "boot": Conversation(boot, from_nothing=True),
    "reboot": Conversation(reboot),
    "stop and cont": Conversation(stop_and_cont),
    "memory table": Conversation(change_memory),
    "config": Conversation(change_config),
    "unplug and plug": Conversation(unplug_and_plug),
}


@contextmanager
def struck(patch: pytest.MonkeyPatch, at: int, strike: Callable[[], None]) -> Iterator[list[str]]:
    """Strike just before the message number `at`, counted from 0; what was sent until the end."""
    sent: list[str] = []
    real = FrontEnd.send

    def send(front: FrontEnd, request: int, *arguments: object, **more: object) -> None:
        if len(sent) == at:
            strike()
        sent.append(str(request))
        real(front, request, *arguments, **more)  # type: ignore[arg-type]

    with patch.context() as inside:
        inside.setattr(FrontEnd, "send", send)
        yield sent


def one(
    kept: Kept,
    patch: pytest.MonkeyPatch,
    conversation: Conversation,
    at: int,
    strike: Callable[[], None],
) -> int:
    """The conversation with a strike in it, on a new VM; how many messages it has."""
    guest = Guest(kept)
    try:
        if conversation.from_nothing:
            guest.down()
        with struck(patch, at, strike) as sent:
            conversation.run(guest)
        guest.check()
    finally:
        guest.down()
    return len(sent)


def stand(kept: Kept) -> None:
    """Stop the daemon, which the keeper's watchdog meets; it goes on with the next message."""
    os.kill(kept.worker, signal.SIGSTOP)
    kept.wait_successor()


def places(count: int, most: int | None) -> list[int]:
    """Some of the places, spread over all and with the last; None: all."""
    if most is None or count <= most:
        return list(range(count))
    return [(number + 1) * count // (most + 1) for number in range(most)]


@pytest.mark.parametrize("name", CONVERSATIONS)
async def test_a_death_between_any_two_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kills_most: int | None
) -> None:
    conversation = CONVERSATIONS[name]
    async with Kept.start(tmp_path, BALLOON + MEM) as kept:
        count = one(kept, monkeypatch, conversation, -1, lambda: None)
        for at in places(count, kills_most):
            one(kept, monkeypatch, conversation, at, kept.die)


@pytest.mark.long
@pytest.mark.parametrize("name", CONVERSATIONS)
async def test_a_stop_beyond_the_watchdog_between_any_two_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    conversation = CONVERSATIONS[name]
    async with Kept.start(tmp_path, BALLOON + MEM) as kept:
        count = one(kept, monkeypatch, conversation, -1, lambda: None)
        for at in places(count, 8):
            one(kept, monkeypatch, conversation, at, lambda: stand(kept))
