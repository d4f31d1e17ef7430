"""One hostile input with its verdict, and what each verdict must look like from outside."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from tests.fakes.balloon import BalloonDriver, BalloonQueue
from tests.fakes.eventfd import new_eventfd
from tests.fakes.machine import Setup
from tests.fakes.memory import MIB, PAGE_SIZE, open_memfd
from tests.fakes.messages import HEADER_SIZE, Request

PROOF_ADDR = 24 * MIB  # guest memory that shows whether the device still works
PROOF_PAGES = 8
DEADLINE_S = 10.0  # for anything the program must do in bounded time


class Verdict(Enum):
    """What the program must do with the input."""

    REFUSE = "R"  # non-zero acknowledgement, state unchanged, connection kept
    QUARANTINE = "Q"  # that queue stops until its next set-up, the others run on
    IGNORE = "I"  # no effect
    DROP = "D"  # connection closed
    CLAMP = "X"  # the legal part is done


@dataclass(frozen=True)
class Attack:
    """act() does it to a running balloon and checks what only it can know.

    watches: it must look for a while to see that nothing happens.
    """

    number: int
    name: str
    verdict: Verdict
    act: Callable[[BalloonDriver], None]
    setup: Setup = field(default_factory=Setup)
    queue: BalloonQueue | None = None  # the one that must be quarantined
    watches: bool = False

    @property
    def label(self) -> str:
        """The test's id."""
        words = [f"H{self.number}", self.name, self.verdict.value, self.setup.label]
        if self.queue is not None:
            words.insert(2, self.queue.name.lower())
        return "-".join(words)


def strike(attack: Attack, guest: BalloonDriver) -> None:
    """Do it once and check the verdict; afterwards the device runs whole again, or is gone."""
    attack.act(guest)
    if attack.verdict is Verdict.DROP:
        assert guest.machine.front.wait_closed(DEADLINE_S), "the connection was kept"
        return
    if attack.verdict is Verdict.QUARANTINE:
        assert attack.queue is not None, "an attack for quarantine must name its queue"
        check_quarantined(guest, attack.queue)
        guest.machine.restart_ring(attack.queue)
        serves(guest, attack.queue)
    serves(guest)


def refused(
    guest: BalloonDriver, request: int, payload: bytes = b"", fds: Sequence[int] = ()
) -> None:
    """Send and insist on a refusal that keeps the connection."""
    verdict = guest.machine.front.ack(request, payload, fds)
    assert verdict != 0, f"request {request} was accepted"
    guest.machine.front.get_features()


def accepted(
    guest: BalloonDriver, request: int, payload: bytes = b"", fds: Sequence[int] = ()
) -> None:
    """Send and insist on an acknowledgement of 0."""
    assert guest.machine.front.ack(request, payload, fds) == 0, f"request {request} was refused"


def refused_in_shape(
    guest: BalloonDriver, request: int, payload: bytes, size: int, fds: Sequence[int] = ()
) -> bytes:
    """Send a request that always has a reply; the error must come in the reply's own shape."""
    reply = guest.machine.front.ask(request, payload, fds)
    reply.close_fds()
    assert len(reply.payload) == size, f"{len(reply.payload)} bytes, the shape has {size}"
    guest.machine.front.get_features()
    return reply.payload


def check_quarantined(guest: BalloonDriver, index: BalloonQueue) -> None:
    """The queue's err eventfd was signalled, and every other queue goes on."""
    queue = guest.queue(index)
    assert queue.wait_err(DEADLINE_S), f"{index.name} was not reported broken"
    queue.kick()  # a broken ring is not looked at again
    others = [BalloonQueue.INFLATE, BalloonQueue.DEFLATE, BalloonQueue.REPORT]
    for other in others:
        if other is not index:
            serves(guest, other)


def serves(guest: BalloonDriver, index: BalloonQueue = BalloonQueue.INFLATE) -> None:
    """Use a queue legally and look at guest memory for the effect."""
    memory = guest.machine.memory
    first_pfn = PROOF_ADDR // PAGE_SIZE
    pfns = range(first_pfn, first_pfn + PROOF_PAGES)
    size = PROOF_PAGES * PAGE_SIZE
    if index is BalloonQueue.INFLATE:
        memory.touch(PROOF_ADDR, size)
        assert guest.inflate(pfns).written == 0
        assert memory.pages_present(PROOF_ADDR, PROOF_PAGES) == 0, "inflate punched no holes"
    elif index is BalloonQueue.DEFLATE:
        assert guest.deflate(pfns).written == 0
    elif index is BalloonQueue.REPORT:
        memory.touch(PROOF_ADDR, size)
        assert guest.report([(PROOF_ADDR, size)]).written == 0
        assert memory.pages_present(PROOF_ADDR, PROOF_PAGES) == 0, "report punched no holes"
    elif index is BalloonQueue.HINT:
        assert guest.hint_command(0).written == 0
    else:
        # The device holds one statistics buffer: a second one brings the first back.
        guest.give_stats(bytes(10))
        guest.give_stats(bytes(10))
        guest.wait_stats_request()


@contextlib.contextmanager
def closing(*fds: int) -> Iterator[tuple[int, ...]]:
    """Close descriptors at the end; ours, the program has its own copies."""
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


@contextlib.contextmanager
def fds_for(request: int) -> Iterator[tuple[int, ...]]:
    """Fresh descriptors as the request legally carries them."""
    if request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        with closing(new_eventfd()) as fds:
            yield fds
    elif request in (Request.ADD_MEM_REG, Request.SET_MEM_TABLE, Request.SET_LOG_BASE):
        with closing(open_memfd(4 * MIB)) as fds:
            yield fds
    else:
        yield ()


def split_message(message: bytes) -> tuple[bytes, bytes]:
    """Cut a message's bytes into header and payload."""
    return message[:HEADER_SIZE], message[HEADER_SIZE:]
