"""H56 to H65: ring set-up that lies. A ring refused stays stopped and the others run on."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from tests.fakes import handshake, messages
from tests.fakes.balloon import BalloonDriver, BalloonQueue
from tests.fakes.driver import Buffer
from tests.fakes.eventfd import new_eventfd
from tests.fakes.machine import Setup
from tests.fakes.memory import MIB, open_memfd
from tests.fakes.messages import Request, u64, vring_state
from tests.hostile.attack import (
    DEADLINE_S,
    Attack,
    Verdict,
    accepted,
    closing,
    refused,
    refused_in_shape,
    serves,
)

RING = BalloonQueue.DEFLATE  # the one set up wrongly
TOP = 1 << 64
BEYOND_QUEUES = (5, 255, 0xFFFF_FFFF)
EVENTFD_FULL = TOP - 2
CALL_FLOOD = 64


@dataclass(frozen=True, slots=True)
class RingLie:
    """What differs from a legal set-up; addresses are added to guest_addr 0 of the ring's parts."""

    size: int | None = None
    base: int | None = None
    desc: int | None = None
    avail: int | None = None
    used: int | None = None


def set_up_wrongly(guest: BalloonDriver, lie: RingLie) -> None:
    """Stop one ring, set it up with a lie, insist on a refusal, then set it up honestly."""
    front, memory = guest.machine.front, guest.machine.memory
    queue = guest.queue(RING)
    front.get_vring_base(RING)
    queue.reset()
    parts = queue.parts
    addresses = [
        handshake.ring_address(front, memory, honest) if lied is None else lied
        for honest, lied in (
            (parts.desc, lie.desc),
            (parts.avail, lie.avail),
            (parts.used, lie.used),
        )
    ]
    verdicts = [
        front.set_vring_num(RING, queue.size if lie.size is None else lie.size),
        front.set_vring_base(RING, queue.start_base() if lie.base is None else lie.base),
        front.set_vring_addr(RING, *addresses),
        front.set_vring_kick(RING, queue.kick_fd),
        front.set_vring_call(RING, queue.call_fd),
        front.set_vring_enable(RING, True),
    ]
    assert any(verdicts), f"{lie} was accepted"
    serves(guest)
    guest.machine.restart_ring(RING)
    serves(guest, RING)


def wrong_index(guest: BalloonDriver, request: Request, index: int) -> None:
    """H56: a ring the device does not have."""
    if request is Request.SET_VRING_ADDR:
        payload = messages.vring_addr(index, 0, 0, 0)
    else:
        payload = vring_state(index, 1)
    refused(guest, request, payload)


def wrong_index_of_fd(guest: BalloonDriver, request: Request, index: int) -> None:
    """H56: the index is one byte here, the bits above it are reserved but for 0x100."""
    with closing(new_eventfd()) as fds:
        refused(guest, request, u64(index), fds)


def wrong_index_of_base(guest: BalloonDriver, index: int) -> None:
    """H56: a reply in shape."""
    refused_in_shape(guest, Request.GET_VRING_BASE, vring_state(index, 0), 8)


def address_lie(guest: BalloonDriver, name: str) -> None:
    """H58, H59: built at run time, for the addresses depend on what was negotiated."""
    front, memory = guest.machine.front, guest.machine.memory
    parts = guest.queue(RING).parts
    at = partial(handshake.ring_address, front, memory)
    end = at(memory.regions[0].end - 1) + 1
    lies = {
        "desc-unmapped": RingLie(desc=1 << 50),
        "avail-unmapped": RingLie(avail=1 << 50),
        "used-unmapped": RingLie(used=1 << 50),
        "desc-unaligned": RingLie(desc=at(parts.desc) + 4),
        "avail-unaligned": RingLie(avail=at(parts.avail) + 1),
        "used-unaligned": RingLie(used=at(parts.used) + 2),
        "desc-leaves-region": RingLie(desc=end - 16),
        "avail-leaves-region": RingLie(avail=end - 4),
        "used-leaves-region": RingLie(used=end - 4),
        "desc-wraps": RingLie(desc=TOP - 16),
        "avail-wraps": RingLie(avail=TOP - 4),
        "used-wraps": RingLie(used=TOP - 4),
        "used-on-avail": RingLie(used=at(parts.avail) & ~3),
        "desc-in-used": RingLie(desc=at(parts.used) + 15 & ~15, used=at(parts.used)),
        "all-the-same": RingLie(desc=at(parts.desc), avail=at(parts.desc), used=at(parts.desc)),
    }
    set_up_wrongly(guest, lies[name])


ADDRESS_LIES = (
    *(f"{part}-{how}" for part in ("desc", "avail", "used") for how in ("unmapped", "unaligned")),
    *(f"{part}-{how}" for part in ("desc", "avail", "used") for how in ("leaves-region", "wraps")),
    "used-on-avail",
    "desc-in-used",
    "all-the-same",
)
# A packed ring's event structures take 4 bytes each: these addresses are legal there.
SPLIT_ONLY = (
    "avail-unaligned",
    "avail-leaves-region",
    "used-leaves-region",
    "used-on-avail",
    "desc-in-used",
)


def base_of_a_liar(guest: BalloonDriver) -> None:
    """H61: a legal number nobody was at; the ring then looks full of what was never added."""
    guest.machine.front.get_vring_base(RING)
    queue = guest.queue(RING)
    queue.reset()
    memory = guest.machine.memory
    handshake.set_up_ring(guest.machine.front, memory, RING, queue, base=1000)
    accepted(guest, Request.SET_VRING_ENABLE, vring_state(RING, 1))


def resize_while_running(guest: BalloonDriver, size: int) -> None:
    """H60."""
    refused(guest, Request.SET_VRING_NUM, vring_state(RING, size))


def move_while_running(guest: BalloonDriver) -> None:
    """The base of a running ring is the device's own."""
    refused(guest, Request.SET_VRING_BASE, vring_state(RING, 5))


def second_kick(guest: BalloonDriver) -> None:
    """H62: a new kick eventfd without a stop; the old one is closed, the new one is served."""
    queue = guest.queue(RING)
    fresh = new_eventfd()
    accepted(guest, Request.SET_VRING_KICK, u64(RING), [fresh])
    os.close(queue.kick_fd)
    queue.kick_fd = fresh
    serves(guest, RING)


def calls_come_and_go(guest: BalloonDriver) -> None:
    """Many call and err eventfds in a row, with and without a descriptor."""
    front = guest.machine.front
    queue = guest.queue(RING)
    for _ in range(CALL_FLOOD):
        for setter, fd in (
            (front.set_vring_call, queue.call_fd),
            (front.set_vring_err, queue.err_fd),
        ):
            assert setter(RING, None) == 0
            assert setter(RING, fd) == 0
    serves(guest, RING)


def kick_that_is_no_eventfd(guest: BalloonDriver, kind: str) -> None:
    """H63: refused, or served without spinning; the pipe and the socket stay readable for ever."""
    front = guest.machine.front
    front.get_vring_base(RING)
    queue = guest.queue(RING)
    queue.reset()
    pipe_reader, pipe_writer = os.pipe()
    ours, theirs = socket.socketpair()
    os.write(pipe_writer, b"x" * 64)
    ours.close()
    with theirs, closing(open_memfd(MIB), pipe_reader, pipe_writer) as (regular, reader, _writer):
        fds = {"regular": regular, "pipe": reader, "closed-peer": theirs.fileno()}
        parts = queue.parts
        addresses = [
            handshake.ring_address(front, guest.machine.memory, part)
            for part in (parts.desc, parts.avail, parts.used)
        ]
        front.set_vring_num(RING, queue.size)
        front.set_vring_base(RING, queue.start_base())
        front.set_vring_addr(RING, *addresses)
        verdict = front.ack(Request.SET_VRING_KICK, u64(RING), [fds[kind]])
        if verdict == 0:
            front.set_vring_enable(RING, True)
        serves(guest)
    guest.machine.restart_ring(RING)
    serves(guest, RING)


def full_call(guest: BalloonDriver) -> None:
    """H64: a blocking call eventfd that can take no more must not stop the device."""
    full = os.eventfd(0, os.EFD_CLOEXEC)
    os.eventfd_write(full, EVENTFD_FULL)
    queue = guest.queue(RING)
    with closing(full):
        accepted(guest, Request.SET_VRING_CALL, u64(RING), [full])
        address = guest.machine.memory.allocate(0)
        queue.add_chain([Buffer(address, 4)])
        queue.kick()
        assert queue.wait_used(timeout_s=DEADLINE_S, interrupts=False)
        serves(guest)
        accepted(guest, Request.SET_VRING_CALL, u64(RING), [queue.call_fd])


def enable_without_set_up(guest: BalloonDriver) -> None:
    """H65: a ring that was stopped has no kick eventfd; enabling it starts nothing."""
    front = guest.machine.front
    front.get_vring_base(RING)
    for enable in (True, False, True):
        front.set_vring_enable(RING, enable)
    serves(guest)
    guest.machine.restart_ring(RING)
    serves(guest, RING)


def enable_flood(guest: BalloonDriver) -> None:
    """H65: on and off many times; in the end the ring runs."""
    front = guest.machine.front
    for _ in range(100):
        assert front.set_vring_enable(RING, False) == 0
        assert front.set_vring_enable(RING, True) == 0
    serves(guest, RING)


def enable_with_other_numbers(guest: BalloonDriver) -> None:
    """H65: only 0 and 1 mean something."""
    guest.machine.front.ack(Request.SET_VRING_ENABLE, vring_state(RING, 0xFFFF_FFFF))
    assert guest.machine.front.set_vring_enable(RING, True) == 0
    serves(guest, RING)


def base_twice(guest: BalloonDriver) -> None:
    """GET_VRING_BASE of a ring that is stopped already."""
    front = guest.machine.front
    assert front.get_vring_base(RING) == front.get_vring_base(RING)
    guest.machine.restart_ring(RING)


def _attacks() -> Iterator[Attack]:
    refuse = Verdict.REFUSE
    for index in BEYOND_QUEUES:
        for request in (
            Request.SET_VRING_NUM,
            Request.SET_VRING_BASE,
            Request.SET_VRING_ADDR,
            Request.SET_VRING_ENABLE,
        ):
            act = partial(wrong_index, request=request, index=index)
            yield Attack(56, f"{request.name.lower()}-{index}", refuse, act)
        act = partial(wrong_index_of_base, index=index)
        yield Attack(56, f"get_vring_base-{index}", refuse, act)
    for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        for index in (5, 255):
            act = partial(wrong_index_of_fd, request=request, index=index)
            yield Attack(56, f"{request.name.lower()}-{index}", refuse, act)
    yield from _set_up()
    yield from _running()


def _set_up() -> Iterator[Attack]:
    split, packed = Setup(), Setup(packed=True)
    for setup, sizes in (
        (split, (0, 3, 32769, 65535, 0x8000_0000, 0xFFFF_FFFF)),
        (packed, (0, 32769, 65535, 0x8000_0000, 0xFFFF_FFFF)),
    ):
        for size in sizes:
            act = partial(set_up_wrongly, lie=RingLie(size=size))
            yield Attack(57, f"size-{size}", Verdict.REFUSE, act, setup)
        for name in ADDRESS_LIES:
            number = 59 if name == "desc-in-used" else 58
            if setup.packed and name in SPLIT_ONLY:
                continue
            act = partial(address_lie, name=name)
            yield Attack(number, name, Verdict.REFUSE, act, setup)
    act = partial(set_up_wrongly, lie=RingLie(base=0x1_0000))
    yield Attack(61, "base-65536", Verdict.REFUSE, act, split)
    act = partial(set_up_wrongly, lie=RingLie(base=0x8000_8000))
    yield Attack(61, "base-packed-on-split", Verdict.REFUSE, act, split)
    act = partial(set_up_wrongly, lie=RingLie(base=0x8000_8080))
    yield Attack(61, "base-beyond-ring", Verdict.REFUSE, act, packed)
    yield Attack(61, "base-1000", Verdict.QUARANTINE, base_of_a_liar, split, RING)


def _running() -> Iterator[Attack]:
    refuse, ignore = Verdict.REFUSE, Verdict.IGNORE
    for size in (64, 256):
        act = partial(resize_while_running, size=size)
        yield Attack(60, f"size-{size}-running", refuse, act)
    yield Attack(60, "base-running", refuse, move_while_running)
    yield Attack(62, "second-kick", ignore, second_kick)
    yield Attack(62, "call-flood", ignore, calls_come_and_go)
    for kind in ("regular", "pipe", "closed-peer"):
        act = partial(kick_that_is_no_eventfd, kind=kind)
        yield Attack(63, f"kick-is-{kind}", ignore, act)
    yield Attack(64, "call-full", ignore, full_call)
    yield Attack(65, "enable-without-set-up", ignore, enable_without_set_up)
    yield Attack(65, "enable-flood", ignore, enable_flood)
    yield Attack(65, "enable-other-numbers", ignore, enable_with_other_numbers)
    yield Attack(65, "base-twice", ignore, base_twice)


ATTACKS = list(_attacks())
