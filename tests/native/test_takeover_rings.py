"""Where a successor finds a ring, whatever its predecessor had stored when it died.

The states are written by hand, into the memfd and the ring; the driver's view tells what is right.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import pytest
from vhostd._native import (
    Device,
    Event,
    Fault,
    Handler,
    Log,
    Mapping,
    RingFeature,
    RingPosition,
    RingSetup,
)
from vhostd._native._core import ffi

from tests.fakes.driver import Buffer, Queue, Used
from tests.fakes.eventfd import drain, wait_readable
from tests.fakes.memory import PAGE_SIZE, GuestMemory, open_memfd
from tests.fakes.packed import EVENT_DISABLE, PackedQueue
from tests.fakes.split import USED_NO_NOTIFY, SplitQueue
from tests.native.rig import CONFIG_WRITABLE, DATA_ADDR, PATIENCE_S, Guest, Host, Layout, regions
from tests.native.takeover_life import Life, Variant
from tests.native.takeover_sweep import called

RING_SIZE = 5
AVAIL, USED, WRITE = 0x80, 0x8000, 2
ASKED, ANSWER = b"question", b"answer"
SHARED = ffi.offsetof("struct vhd_shared", "rings")
PACKED = [Variant(Layout(packed=True, event_idx=event_idx)) for event_idx in (False, True)]
SPLIT = [Variant(Layout(event_idx=event_idx)) for event_idx in (False, True)]

AnyStage = TypeVar("AnyStage", bound="Stage")


@dataclass
class Stage:
    """One control ring; whoever served it is gone, or will be.

    Attributes:
        found: where the last one found it.
    """

    life: Life
    host: Host
    mapping: Mapping
    shared: mmap.mmap
    found: RingPosition = field(default_factory=RingPosition)

    @property
    def driver(self) -> Queue:
        """Its driver."""
        return self.life.drivers[0]

    @property
    def setup(self) -> RingSetup:
        """How it is started."""
        return self.life.setups[0]

    @contextmanager
    def served(self, setup: RingSetup | None = None, log: Log | None = None) -> Iterator[Device]:
        """Take it over."""
        origin = self.life.origin
        writable = CONFIG_WRITABLE
        device = Device.adopt(origin.shared_fd, origin.reply_fd, 1, len(writable), writable)
        self.host.add(device)
        with self.host.parked():
            device.set_regions(regions(self.life.memory, self.mapping))
            device.set_log(log, False)
            device.resume_ring(0, setup or self.setup)
        with self.host.parked():  # the worker opened it in between
            self.found = device.ring_statistics(0).position
            device.enable_ring(0, True)
        try:
            yield device
        finally:
            self.host.remove(device)

    def add(self, descriptors: int) -> int:
        """Make a chain of so many descriptors available; its token."""
        memory = self.life.memory
        at = memory.allocate(len(ASKED))
        memory.write(at, ASKED)
        readable = [Buffer(at, len(ASKED))] * (descriptors - 1)
        room = Buffer(memory.allocate(16), 16, writable=True)
        return self.driver.add_chain([*readable, room])

    def answer(self, device: Device, *tokens: int) -> None:
        """Just these chains come; answer them, and wait for their interrupts."""
        for _ in tokens:
            while (chain := device.take_chain(0)) is None:
                self.host.wait_event(device, Event.CHAINS)
            device.complete_chain(0, chain.token, ANSWER)
        self.await_all(*tokens)
        assert device.take_chain(0) is None

    def await_all(self, *tokens: int) -> None:
        """They come back, in this order, each once, and nothing else does."""
        back: list[Used] = []
        while len(back) < len(tokens):
            back += called(self.driver)
        assert back == [Used(token, len(ANSWER)) for token in tokens]
        assert self.driver.collect() == []

    def exchange(self, device: Device, descriptors: int) -> None:
        """Send a chain and have it answered."""
        token = self.add(descriptors)
        self.driver.notify()
        self.answer(device, token)

    def move_to(self, slot: int) -> None:
        """Serve until the ring stands at a slot of its second round."""
        with self.served() as device:
            for _ in range(self.driver.size + slot):
                self.exchange(device, 1)

    def store(self, field: str, content: bytes) -> None:
        """Write a field of the ring's record."""
        at = SHARED + ffi.offsetof("struct vhd_ring_shared", field)
        self.shared[at : at + len(content)] = content


@dataclass
class PackedStage(Stage):
    """What the one that died stored, one after the other."""

    @property
    def packed(self) -> PackedQueue:
        """The driver."""
        assert isinstance(self.driver, PackedQueue)
        return self.driver

    def after(self, slots: int) -> RingPosition:
        """Where the ring stands so many slots on."""
        index, wrap = self.packed.next_used + slots, self.packed.used_wrap
        if index >= self.packed.size:
            index, wrap = index - self.packed.size, not wrap
        return RingPosition(index, index, wrap, wrap)

    def announce(self, slots: int) -> None:
        """First: what is going to be given back."""
        at = self.packed.next_used | self.packed.used_wrap << 15
        self.store("push", struct.pack("<HH", at, slots))

    def mark_used(self, token: int) -> None:
        """Second: the driver sees it."""
        flags = (AVAIL | USED if self.packed.used_wrap else 0) | WRITE
        at = self.packed.parts.desc + 16 * self.packed.next_used + 8
        self.packed.memory.write(at, struct.pack("<IHH", len(ANSWER), token, flags))

    def store_position(self, at: RingPosition) -> None:
        """Third: where the ring stands now."""
        content = (at.next_avail, at.next_used, at.avail_wrap, at.used_wrap, 0)
        self.store("position", struct.pack("<HHBBH", *content))


@contextmanager
def stage_of(kind: type[AnyStage], variant: Variant, host: Host, size: int) -> Iterator[AnyStage]:
    """A ring that was never started."""
    with Life.begin(variant, [Handler.CONTROL], size) as life:
        mapping = Mapping(life.memory.fd, life.given_up.given_up_fd)
        with mmap.mmap(life.origin.shared_fd, 0) as shared:
            yield kind(life, host, mapping, shared)
        mapping.close()


@pytest.fixture(params=PACKED, ids=str)
def packed(request: pytest.FixtureRequest, host: Host) -> Iterator[PackedStage]:
    """A packed ring of five."""
    with stage_of(PackedStage, request.param, host, RING_SIZE) as stage:
        yield stage


@pytest.fixture(params=SPLIT, ids=str)
def split(request: pytest.FixtureRequest, host: Host) -> Iterator[Stage]:
    """A split ring of four."""
    with stage_of(Stage, request.param, host, 4) as stage:
        yield stage


@pytest.fixture(params=[*SPLIT, *PACKED], ids=str)
def stage(request: pytest.FixtureRequest, host: Host) -> Iterator[Stage]:
    """Either."""
    with stage_of(Stage, request.param, host, 4) as begun:
        yield begun


# -- a packed ring's chain of three, from any slot: some lie across the ring's end -----------------


@pytest.mark.parametrize("slot", range(RING_SIZE))
@pytest.mark.parametrize("announced", [False, True])
def test_a_chain_that_was_not_given_back_comes_again(
    packed: PackedStage, slot: int, announced: bool
) -> None:
    packed.move_to(slot)
    token = packed.add(3)
    if announced:
        packed.announce(3)
    with packed.served() as device:
        assert packed.found == packed.after(0)
        packed.answer(device, token)
        packed.exchange(device, 2)


@pytest.mark.parametrize("slot", range(RING_SIZE))
@pytest.mark.parametrize("stored", [False, True])
def test_a_chain_that_was_given_back_does_not_come_again(
    packed: PackedStage, slot: int, stored: bool
) -> None:
    packed.move_to(slot)
    token = packed.add(3)
    packed.announce(3)
    packed.mark_used(token)
    if stored:
        packed.store_position(packed.after(3))
    with packed.served() as device:
        assert packed.found == packed.after(3)
        packed.await_all(token)
        packed.exchange(device, 2)


@pytest.mark.parametrize("slot", range(RING_SIZE))
def test_nor_does_it_when_the_driver_has_filled_the_ring_again_meanwhile(
    packed: PackedStage, slot: int
) -> None:
    packed.move_to(slot)
    token = packed.add(3)
    packed.announce(3)
    packed.mark_used(token)
    assert packed.driver.collect() == [Used(token, len(ANSWER))]
    tokens = [packed.add(1) for _ in range(RING_SIZE)]
    with packed.served() as device:
        assert packed.found == packed.after(0)
        packed.answer(device, *tokens)


def test_what_was_inside_a_chain_a_round_ago_is_not_taken_for_given_back(
    packed: PackedStage,
) -> None:
    with packed.served() as device:
        for descriptors in (3, 2, 1):
            packed.exchange(device, descriptors)
    with packed.served() as device:
        assert packed.found == RingPosition(1, 1, 0, 0)
        packed.exchange(device, 3)


# -- a split ring's used index says it all ---------------------------------------------------------


@pytest.mark.parametrize("given_back", [0, 1, 2])
def test_a_split_ring_goes_on_after_what_is_in_the_used_ring(split: Stage, given_back: int) -> None:
    split.move_to(3)
    tokens = [split.add(1) for _ in range(3)]
    used, memory = split.driver.parts.used, split.life.memory
    index = memory.read_number(used + 2, 2)
    for number, token in enumerate(tokens[:given_back]):
        at = used + 4 + 8 * ((index + number) % split.driver.size)
        memory.write(at, struct.pack("<II", token, len(ANSWER)))
    memory.write_number(used + 2, index + given_back, 2)
    with split.served() as device:
        split.await_all(*tokens[:given_back])
        split.answer(device, *tokens[given_back:])
        split.exchange(device, 2)


def test_a_base_that_was_not_the_used_index_stays_as_far_from_it(split: Stage) -> None:
    """The VMM said so when it started the ring; who served it never knew why."""
    driver = split.driver
    assert isinstance(driver, SplitQueue)
    for _ in range(2):
        driver.add_chain([Buffer(split.life.memory.allocate(8), 8)])  # never to be served
    setup = replace(split.setup, position=RingPosition(next_avail=2))
    for expected in ((2, 0), (3, 1)):
        with split.served(setup) as device:
            assert (split.found.next_avail, split.found.next_used) == expected
            token = split.add(1)
            driver.notify()
            while (chain := device.take_chain(0)) is None:
                split.host.wait_event(device, Event.CHAINS)
            device.complete_chain(0, chain.token, ANSWER)
            split.await_all(token)


# -- both ------------------------------------------------------------------------------------------


def test_the_driver_is_interrupted_whatever_it_said_about_that(stage: Stage) -> None:
    with stage.served() as device:
        stage.exchange(device, 1)
    stage.driver.set_interrupts(False)
    drain(stage.driver.call_fd)
    with stage.served():
        assert wait_readable(stage.driver.call_fd, PATIENCE_S)
        assert drain(stage.driver.call_fd) == 1
        assert stage.life.origin.ring_statistics(0).calls >= 1


def test_kicks_that_were_switched_off_come_again(stage: Stage) -> None:
    stage.move_to(2)
    used, memory = stage.driver.parts.used, stage.life.memory
    if stage.life.variant.layout.packed:
        memory.write_number(used + 2, EVENT_DISABLE, 2)
    else:
        memory.write_number(used, USED_NO_NOTIFY, 2)
        memory.write_number(used + 4 + 8 * stage.driver.size, 0x7FFF, 2)  # avail_event
    with stage.served() as device:
        for _ in range(6):
            stage.exchange(device, 1)


def test_another_start_begins_where_it_says(stage: Stage) -> None:
    stage.move_to(3)
    stage.driver.reset()
    setup = replace(stage.setup, start_number=2)
    with stage.served(setup) as device:
        assert (stage.found.next_avail, stage.found.next_used) == (0, 0)
        stage.exchange(device, 2)
    with stage.served(setup) as device:
        stage.exchange(device, 2)


def test_a_quarantine_lasts_until_another_start(stage: Stage) -> None:
    with stage.served() as device:
        stage.exchange(device, 1)
        stage.driver.add_chain([Buffer(1 << 40, 8)])
        stage.driver.kick()
        stage.host.wait_event(device, Event.FAULT)
        assert stage.driver.wait_err()
    with stage.served() as device:
        stage.host.wait_event(device, Event.FAULT)
        assert stage.driver.wait_err()
        stage.driver.kick()
        with stage.host.parked():
            statistics = device.ring_statistics(0)
        assert statistics.fault is Fault.ADDRESS
        assert statistics.faults == 1
    stage.driver.reset()
    with stage.served(replace(stage.setup, start_number=2)) as device:
        stage.exchange(device, 2)


def test_a_migration_copies_the_used_part_again(stage: Stage) -> None:
    """The one that died may have written there and not said so."""
    parts = stage.driver.parts
    packed = stage.life.variant.layout.packed
    stage.move_to(1)
    log_fd = open_memfd(PAGE_SIZE)
    log = Log(log_fd, PAGE_SIZE, 0)
    features = stage.setup.features | RingFeature.LOG_USED
    setup = replace(stage.setup, features=features, log_addr=parts.used)
    with stage.served(setup, log):
        bits = int.from_bytes(os.pread(log_fd, PAGE_SIZE, 0), "little")
        for part in (parts.used, *([parts.desc] if packed else [])):
            assert bits >> part // PAGE_SIZE & 1
    log.close()
    os.close(log_fd)


@pytest.mark.parametrize("what", ["the log", "guest memory"])
def test_a_file_that_was_truncated_costs_the_ring_alone(stage: Stage, what: str) -> None:
    """The VMM can do it at any time, and the next process must not die of it as this one."""
    stage.move_to(1)
    log_fd = open_memfd(PAGE_SIZE)
    log = Log(log_fd, PAGE_SIZE, 0)
    os.ftruncate(log_fd if what == "the log" else stage.life.memory.fd, 0)
    features = stage.setup.features | RingFeature.LOG_USED
    with stage.served(replace(stage.setup, features=features), log) as device:
        stage.host.wait_event(device, Event.FAULT)
        assert device.ring_statistics(0).fault is Fault.SIGBUS
        assert stage.driver.wait_err()
    with Guest.on(stage.host, GuestMemory.flat()) as other:
        other.ring(Handler.DEFLATE).send_pfns([DATA_ADDR // PAGE_SIZE])
    log.close()
    os.close(log_fd)
