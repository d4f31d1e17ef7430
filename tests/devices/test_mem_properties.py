"""Any course of events against a model: a set of plugged block numbers."""

from __future__ import annotations

from struct import pack, unpack

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from vhostd.devices.base import (
    Chain,
    Complete,
    DiscardMemory,
    Effects,
    GuestRange,
    MemorySlot,
    PopulateMemory,
    PublishConfig,
    Role,
)
from vhostd.devices.mem import Mem
from vhostd.devices.mem_window import MemOptions
from vhostd.devices.verdict import Finding, Verdict
from vhostd.units import GiB, MiB

BLOCK = 2 * MiB
COUNT = 40
ADDRESS = 8 * GiB
PLUG, UNPLUG, UNPLUG_ALL, STATE = range(4)
ACK, NACK, BUSY, ERROR = range(4)
FREE = Verdict(Finding.FREE, "")
PINNED = Verdict(Finding.PINNED, "gpu0 (vfio-pci)")

blocks = st.integers(0, COUNT - 1)
counts = st.integers(1, 12)


class MemAgainstModel(RuleBasedStateMachine):
    """The driver and the host take turns; what is asked of the host is done in any order."""

    prealloc = False

    def __init__(self) -> None:
        super().__init__()
        self.mem = Mem(MemOptions("mem0", ADDRESS, COUNT * BLOCK, prealloc=self.prealloc))
        self.mem.on_verdict(FREE)
        self.plugged: set[int] = set()
        self.failed: set[int] = set()  # the host could not take them back
        self.requested = 0
        self.usable = 0
        self.nacks = 0
        self.config = bytearray(self.mem.config())
        self.discards: list[GuestRange] = []
        self.populates: list[GuestRange] = []
        self.pending: tuple[Chain, int, int] | None = None  # a PLUG without an answer yet
        self.last: tuple[Chain, bytes] | None = None
        self.answers: dict[int, bytes] = {}
        self.token = 0
        self.position = 0
        self.perform(self.mem.on_memory([MemorySlot(ADDRESS, COUNT * BLOCK)]))
        self.mem.on_features(3)
        self.perform(self.mem.on_started())

    # -- carrying effects out ------------------------------------------------------------------

    def perform(self, effects: Effects) -> None:
        for effect in effects:
            if isinstance(effect, PublishConfig):
                end = effect.offset + len(effect.data)
                self.config[effect.offset : end] = effect.data
            elif isinstance(effect, Complete):
                self.answers[effect.token] = effect.data
                if self.pending is not None and effect.token == self.pending[0].token:
                    self.settle(effect.data)
            elif isinstance(effect, DiscardMemory):
                for other in self.discards:
                    disjoint = effect.range.end <= other.guest_addr
                    assert disjoint or other.end <= effect.range.guest_addr, "discarded twice"
                self.discards.append(effect.range)
            elif isinstance(effect, PopulateMemory):
                self.populates.append(effect.range)

    def settle(self, answer: bytes) -> None:
        """The PLUG that was held got its answer: believe it, and check it against the model."""
        assert self.pending is not None
        chain, first, count = self.pending
        self.pending = None
        (code,) = unpack("<H", answer[:2])
        fits = (len(self.plugged) + count) * BLOCK <= self.requested
        if code == ACK:
            assert fits
            self.plugged |= set(range(first, first + count))
        else:
            assert code in (NACK, BUSY)
        self.count(code)
        self.last = (chain, answer)

    def count(self, code: int | None) -> None:
        """Three NACKs in a row are enough for a driver that does not listen."""
        if code == ACK:
            self.nacks = 0
        elif code == NACK:
            self.nacks += 1

    def send(self, kind: int, first: int, count: int, *, shift: int = 0) -> int | None:
        """A request; its answer, or None while it is held."""
        self.token += 1
        self.position = (self.position + 1) % 65536
        data = pack("<H6xQH6x", kind, ADDRESS + first * BLOCK + shift, count)
        chain = Chain(0, Role.GUEST_REQUEST, self.token, data, 24, 1, 10, 0, self.position)
        self.perform(self.mem.on_chain(chain, 0))
        answer = self.answers.get(self.token)
        if answer is None:
            assert kind == PLUG, "only a PLUG may be held"
            self.pending = (chain, first, count)
            return None
        assert len(answer) == 10
        self.last = (chain, answer)
        code: int = unpack("<H", answer[:2])[0]
        return code

    def legal(self, first: int, count: int) -> bool:
        return count > 0 and (first + count) * BLOCK <= self.usable

    # -- what may happen -----------------------------------------------------------------------

    @precondition(lambda self: self.pending is None)
    @rule(first=blocks, count=counts)
    def plug(self, first: int, count: int) -> None:
        wanted = set(range(first, first + count))
        before = set(self.plugged)
        fits = (len(before) + count) * BLOCK <= self.requested
        code = self.send(PLUG, first, count)
        if not self.legal(first, count):
            assert code == ERROR
        elif not fits:
            assert code == (NACK if self.nacks < 3 else BUSY)
            self.count(code)
        elif wanted & before:
            assert code == ERROR
        else:
            assert code in (ACK, None)
            if code == ACK:
                self.plugged = before | wanted
            self.count(code)

    @precondition(lambda self: self.pending is None)
    @rule(first=blocks, count=counts)
    def unplug(self, first: int, count: int) -> None:
        gone = set(range(first, first + count))
        code = self.send(UNPLUG, first, count)
        fine = self.legal(first, count) and gone <= self.plugged
        assert code == (ACK if fine else ERROR)
        if fine:
            self.plugged -= gone

    @precondition(lambda self: self.pending is None)
    @rule()
    def unplug_all(self) -> None:
        assert self.send(UNPLUG_ALL, 999, 7) == ACK
        self.plugged.clear()
        self.usable = self.wanted_usable()
        self.nacks = 0

    @precondition(lambda self: self.pending is None)
    @rule(first=blocks, count=counts)
    def state(self, first: int, count: int) -> None:
        code = self.send(STATE, first, count)
        if not self.legal(first, count):
            assert code == ERROR
            return
        here = set(range(first, first + count)) & self.plugged
        assert self.last is not None
        expected = 0 if len(here) == count else (2 if here else 1)
        assert (code, unpack("<H", self.last[1][8:])[0]) == (ACK, expected)

    @precondition(lambda self: self.pending is None)
    @rule(kind=st.integers(0, 5), shift=st.sampled_from([1, 4096, -4096]), count=counts)
    def nonsense(self, kind: int, shift: int, count: int) -> None:
        if kind != UNPLUG_ALL:
            assert self.send(kind, 3, count, shift=shift) == ERROR
            assert self.send(kind, 3, 0) == ERROR
            assert self.send(kind, 2**40, 1) == ERROR

    @rule(size=st.integers(0, COUNT))
    def resize(self, size: int) -> None:
        self.requested = size * BLOCK
        self.perform(self.mem.set_requested_size(self.requested))
        self.usable = max(self.usable, self.wanted_usable())
        self.nacks = 0

    def wanted_usable(self) -> int:
        return min(COUNT * BLOCK, self.requested + 256 * MiB) if self.requested else 0

    @precondition(lambda self: self.discards)
    @rule(which=st.integers(0, 1000), fails=st.booleans())
    def discard_a_part(self, which: int, fails: bool) -> None:
        whole = self.discards.pop(which % len(self.discards))
        first = (whole.guest_addr - ADDRESS) // BLOCK
        assert not self.plugged & set(range(first, first + whole.size // BLOCK))
        part = GuestRange(whole.guest_addr, BLOCK)
        if whole.size > BLOCK:
            self.discards.append(GuestRange(whole.guest_addr + BLOCK, whole.size - BLOCK))
        assert self.mem.discard_due(part)
        self.failed = self.failed | {first} if fails else self.failed - {first}
        self.perform(self.mem.on_discarded(part, "EIO" if fails else None))

    @precondition(lambda self: self.populates)
    @rule(fails=st.booleans())
    def populate(self, fails: bool) -> None:
        part = self.populates.pop(0)
        self.perform(self.mem.on_populated(part, "ENOSPC" if fails else None))

    @rule(replayed=st.booleans())
    def stop_and_go_on(self, replayed: bool) -> None:
        """The ring stops, and what was not given back comes again where it stood."""
        self.perform(self.mem.on_stopped())
        held, self.pending = self.pending, None
        self.perform(self.mem.on_started())
        if held is not None:
            chain, first, count = held
            self.position -= 1
            self.answers.pop(chain.token, None)
            code = self.send(PLUG, first, count)
            if code == ACK:
                self.plugged |= set(range(first, first + count))
            self.count(code)
        elif replayed and self.last is not None:
            chain, answer = self.last
            self.token += 1
            again = Chain(
                0, Role.GUEST_REQUEST, self.token, chain.data, 24, 1, 10, 0, chain.position
            )
            self.perform(self.mem.on_chain(again, 0))
            assert self.answers[self.token] == answer

    @precondition(lambda self: self.pending is None)
    @rule()
    def system_reset(self) -> None:
        self.perform(self.mem.on_stopped())
        self.perform(self.mem.on_system_reset())
        self.plugged.clear()
        self.usable = self.wanted_usable()
        self.nacks = 0
        self.perform(self.mem.on_driver_reset())
        self.last = None
        self.perform(self.mem.on_started())

    @rule()
    def inhibit_for_a_moment(self) -> None:
        """When it ends, all that is unplugged is given back: once, not again."""
        self.perform(self.mem.on_verdict(PINNED))
        assert self.mem.look_begins() == []
        self.perform(self.mem.on_looked({}))
        self.perform(self.mem.on_verdict(FREE))
        self.nacks = 0

    @precondition(lambda self: self.pending is None)
    @rule()
    def successor(self) -> None:
        """Another process takes over what this one saved."""
        saved = self.mem.save()
        heir = Mem(self.mem.options)
        heir.load(saved)
        assert heir.save() == saved
        assert heir.config() == self.mem.config()

    # -- what must hold ------------------------------------------------------------------------

    @invariant()
    def config_is_right(self) -> None:
        usable, plugged, requested = unpack("<QQQ", self.config[32:56])
        assert bytes(self.config) == self.mem.config()
        assert plugged == len(self.plugged) * BLOCK == self.mem.plugged_size
        assert (usable, requested) == (self.usable, self.requested)
        assert usable >= requested

    @invariant()
    def what_is_plugged_is_no_failure_any_more(self) -> None:
        self.failed -= self.plugged

    @invariant()
    def nothing_plugged_is_to_be_discarded(self) -> None:
        for part in self.discards:
            first = (part.guest_addr - ADDRESS) // BLOCK
            assert not self.plugged & set(range(first, first + part.size // BLOCK))

    @invariant()
    def looks_cover_what_is_unplugged_and_nothing_else(self) -> None:
        if self.discards or self.populates or self.pending is not None:
            return
        looked = set()
        for part in self.mem.look_begins():
            first = (part.guest_addr - ADDRESS) // BLOCK
            looked |= set(range(first, first + part.size // BLOCK))
        self.perform(self.mem.on_looked({}))
        assert looked == set(range(COUNT)) - self.plugged - self.failed


class PreallocAgainstModel(MemAgainstModel):
    """The same where every PLUG waits for the host."""

    prealloc = True


COURSE = settings(
    max_examples=settings().max_examples * 2 // 5,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestMem = MemAgainstModel.TestCase
TestMem.settings = COURSE
TestPrealloc = PreallocAgainstModel.TestCase
TestPrealloc.settings = COURSE
