"""A balloon of which one message is watched: the scene, without the kinds of messages."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import termios
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.fakes import handshake
from tests.fakes.balloon import BalloonDriver
from tests.fakes.driver import Queue
from tests.fakes.frontend import FrontEnd
from tests.fakes.machine import Machine, Setup
from tests.fakes.memory import MIB, PAGE_SIZE, GuestMemory, Region, open_memfd
from tests.fakes.messages import HEADER_SIZE, Flags, Request, WireRegion, u64
from tests.takeover.kept import VM, Kept
from tests.takeover.scene import Answerer, Scene, nothing, readable

BALLOON = f"[vm.{VM}.balloon]\nstats_interval_s = 0\n"
PAGES_FROM, PAGES_UP_TO = 32 * MIB, 64 * MIB
EXTRA = WireRegion(64 * MIB, 2 * MIB, 64 * MIB, 0)
"""A second piece of memory, which comes and goes."""
RING = 0
"""Of which the ring messages are; its work needs no other."""


class BalloonVm:
    """A running machine with a balloon, and what must be true of it at any time."""

    def __init__(self, kept: Kept) -> None:
        """Connect and start."""
        self.kept = kept
        self.machine = Machine.boot(kept.socket("balloon"), Setup())
        self.front: FrontEnd = self.machine.front
        self.driver = BalloonDriver(self.machine)
        self.answerer = Answerer(self.front)
        self.extra = GuestMemory(open_memfd(EXTRA.size), [Region(EXTRA.guest_addr, EXTRA.size, 0)])
        self.log = os.memfd_create("log")
        os.ftruncate(self.log, PAGE_SIZE)
        self.number = 0
        self.base = 0
        self.pair: tuple[socket.socket, socket.socket]
        self._page = PAGES_FROM

    def close(self) -> None:
        """Hang up."""
        self.answerer.close()
        self.machine.close()
        self.extra.close()
        os.close(self.log)

    @property
    def ring(self) -> Queue:
        """The ring whose messages are watched."""
        return self.machine.queues[RING]

    def next_number(self) -> int:
        """One that was not used before."""
        self.number += 1
        return self.number

    def works(self) -> None:
        """A page given up goes, the guest is called, and the socket is silent."""
        address = self._page
        self._page = PAGES_FROM + (address + PAGE_SIZE - PAGES_FROM) % (PAGES_UP_TO - PAGES_FROM)
        memory = self.machine.memory
        memory.touch(address, PAGE_SIZE)
        self.ring.calls()
        self.driver.inflate([address // PAGE_SIZE])
        assert not memory.page_present(address), "the balloon was inflated, but the page is there"
        self.driver.deflate([address // PAGE_SIZE])
        assert self.ring.collect() == [], "a buffer came back twice"
        assert not readable(self.front), "more was answered than asked"

    def extra_works(self, *, there: bool) -> None:
        """A page of the second piece of memory can be given up if the balloon has it."""
        self.extra.touch(EXTRA.guest_addr, PAGE_SIZE)
        self.driver.inflate([EXTRA.guest_addr // PAGE_SIZE])
        assert self.extra.page_present(EXTRA.guest_addr) != there
        self.driver.deflate([EXTRA.guest_addr // PAGE_SIZE])

    def ring_steps(self) -> list[tuple[Request, bytes, list[int]]]:
        """What sets the ring up, in order: request, payload, descriptors."""
        queue, memory = self.ring, self.machine.memory
        parts = (queue.parts.desc, queue.parts.used, queue.parts.avail)
        desc, used, avail = (
            handshake.ring_address(self.front, memory, part).to_bytes(8, "little") for part in parts
        )
        number = RING.to_bytes(4, "little")
        return [
            (Request.SET_VRING_NUM, number + queue.size.to_bytes(4, "little"), []),
            (Request.SET_VRING_BASE, number + self.base.to_bytes(4, "little"), []),
            (Request.SET_VRING_ADDR, number + bytes(4) + desc + used + avail + bytes(8), []),
            (Request.SET_VRING_CALL, u64(RING), [queue.call_fd]),
            (Request.SET_VRING_KICK, u64(RING), [queue.kick_fd]),
        ]

    def stop_ring(self) -> None:
        """GET_VRING_BASE."""
        self.base = self.front.get_vring_base(RING)


@dataclass(frozen=True, slots=True)
class Kind:
    """A message: how to come to it, what it says, and what must be true afterwards.

    Attributes:
        payload, fds: as it is sent; answer: payload of the one right reply.
        behind: sent together with another message before it.
        told_later: the native worker answers, and tells the main thread then.
        ready: before it; after: what is true once it was answered; finish: once, in the end.
    """

    name: str
    request: Request
    payload: Callable[[BalloonVm], bytes] = lambda vm: b""
    fds: Callable[[BalloonVm], list[int]] = lambda vm: []
    answer: Callable[[BalloonVm], bytes] = lambda vm: u64(0)
    ready: Callable[[BalloonVm], None] = field(default=nothing)
    after: Callable[[BalloonVm], None] = field(default=nothing)
    finish: Callable[[BalloonVm], None] = field(default=nothing)
    behind: Request | None = None
    told_later: bool = False


class MessageScene(Scene):
    """One kind of message to a balloon."""

    configuration = BALLOON

    def __init__(self, kind: Kind) -> None:
        """Nobody is connected yet."""
        self._kind = kind
        self._vm: BalloonVm
        self._replies_size = 0

    def open(self, kept: Kept) -> None:
        """Connect and start."""
        self._vm = BalloonVm(kept)

    def close(self) -> None:
        """Hang up."""
        self._vm.close()

    def ready(self) -> None:
        """Come to where the message is sent."""
        self._kind.ready(self._vm)

    def ask(self) -> None:
        """Send it; it asks for a reply."""
        kind, vm = self._kind, self._vm
        flags = Flags.VERSION | Flags.NEED_REPLY
        self._replies_size = HEADER_SIZE + len(kind.answer(vm))
        if kind.behind is not None:
            vm.front.send(kind.behind)
            self._replies_size += HEADER_SIZE + len(u64(0))
        vm.front.send(kind.request, kind.payload(vm), kind.fds(vm), flags)

    def answered(self, *, woken: bool) -> bool:
        """All replies lie in the socket."""
        size = struct.unpack("i", fcntl.ioctl(self._vm.front, termios.FIONREAD, bytes(4)))[0]
        return bool(size >= self._replies_size) and (woken or not self._kind.told_later)

    def check(self) -> None:
        """One reply, the right one, and the balloon serves its guest."""
        kind, vm = self._kind, self._vm
        if kind.behind is not None:
            vm.front.receive_reply(kind.behind)
        reply = vm.front.receive_reply(kind.request)
        assert reply.payload == kind.answer(vm) and not reply.fds, f"answered {reply}"
        kind.after(vm)
        vm.works()
        assert not vm.answerer.lost, "the back-end channel was given up"

    def finish(self) -> None:
        """See what can be seen only once."""
        self._kind.finish(self._vm)
        status = self._vm.kept.status()
        assert status["connections"] == 1 and status["connections_refused"] == 0
