"""H90 to H96: a balloon driver that asks for nonsense. The legal part is done, the rest not."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from tests.fakes.balloon import (
    COMMAND_DONE,
    COMMAND_STOP,
    BalloonDriver,
    BalloonFeature,
    BalloonQueue,
    pack_pfns,
    pack_stats,
)
from tests.fakes.driver import Buffer
from tests.fakes.machine import Setup
from tests.fakes.memory import MIB, PAGE_SIZE, GuestMemory
from tests.hostile.attack import DEADLINE_S, Attack, Verdict, serves

VICTIM_ADDR = 40 * MIB  # pages that may go or must stay
VICTIM_PFN = VICTIM_ADDR // PAGE_SIZE
PFNS_TAKEN_MAX = 1024  # of one chain; the rest is ignored
HOLED = Setup(make_memory=partial(GuestMemory.with_hole, 64 * MIB, 32 * MIB, 2 * MIB))
SEAMED = Setup(make_memory=partial(GuestMemory.adjacent, 64 * MIB, 32 * MIB))
WIDE = Setup(make_memory=partial(GuestMemory.flat, 2048 * MIB))
POISON = 0xAAAA_AAAA


def wild_pfns(guest: BalloonDriver) -> None:
    """H90: outside, top of the number space, doubled; the good ones among them are discarded."""
    memory = guest.machine.memory
    memory.touch(VICTIM_ADDR, 4 * PAGE_SIZE)
    good = [VICTIM_PFN, VICTIM_PFN + 2]
    bad = [64 * MIB // PAGE_SIZE, 0xFFFF_FFFF, 0x8000_0000, 0xFEE0_0000 >> 12, 1 << 20]
    pfns = [bad[0], good[0], bad[1], good[0], good[0], bad[2], good[1], bad[3], bad[4]]

    assert guest.inflate(pfns).written == 0

    present = [memory.page_present(VICTIM_ADDR + n * PAGE_SIZE) for n in range(4)]
    assert present == [False, True, False, True]
    guest.deflate(pfns)


def pfns_around_a_hole(guest: BalloonDriver) -> None:
    """H90: a run that goes through a hole in guest memory."""
    memory = guest.machine.memory
    low, high = memory.regions
    memory.touch(low.end - 2 * PAGE_SIZE, 2 * PAGE_SIZE)
    memory.touch(high.guest_addr, 2 * PAGE_SIZE)
    first, last = low.end // PAGE_SIZE - 1, high.guest_addr // PAGE_SIZE
    assert last - first < PFNS_TAKEN_MAX

    guest.inflate(range(first, last + 1))

    assert memory.pages_present(low.end - 2 * PAGE_SIZE, 2) == 1
    assert memory.pages_present(high.guest_addr, 2) == 1


def too_many_pfns(guest: BalloonDriver) -> None:
    """H90: more page numbers than one chain may carry."""
    memory = guest.machine.memory
    count = PFNS_TAKEN_MAX + 64
    memory.touch(VICTIM_ADDR, count * PAGE_SIZE)

    guest.inflate(range(VICTIM_PFN, VICTIM_PFN + count))

    assert memory.pages_present(VICTIM_ADDR, PFNS_TAKEN_MAX) == 0
    assert memory.pages_present(VICTIM_ADDR + PFNS_TAKEN_MAX * PAGE_SIZE, 64) == 64
    guest.deflate(range(VICTIM_PFN, VICTIM_PFN + PFNS_TAKEN_MAX))


def gigabyte_of_pfns(guest: BalloonDriver) -> None:
    """H90: one descriptor of 1 GiB; neither time nor memory may follow its length."""
    memory = guest.machine.memory
    queue = guest.queue(BalloonQueue.INFLATE)
    before = memory.blocks()
    queue.add_chain([Buffer(1024 * MIB, 1024 * MIB)])
    queue.notify()
    assert queue.wait_used(timeout_s=2.0)[0].written == 0
    assert memory.blocks() - before < MIB, "the whole list was read"


def pfns_in_pieces(guest: BalloonDriver) -> None:
    """Framing: one page number spread over several descriptors is still one."""
    memory = guest.machine.memory
    memory.touch(VICTIM_ADDR, 3 * PAGE_SIZE)
    at = 12 * MIB
    memory.write(at, pack_pfns([VICTIM_PFN, VICTIM_PFN + 2]))
    queue = guest.queue(BalloonQueue.INFLATE)
    queue.add_chain([Buffer(at, 1), Buffer(at + 1, 5), Buffer(at + 6, 2)])
    queue.notify()
    queue.wait_used()
    present = [memory.page_present(VICTIM_ADDR + n * PAGE_SIZE) for n in range(3)]
    assert present == [False, True, False]
    guest.deflate([VICTIM_PFN, VICTIM_PFN + 2])


def ragged_list(guest: BalloonDriver, index: BalloonQueue, tail: int) -> None:
    """H91: bytes that are no whole page number are ignored, those before them are not."""
    memory = guest.machine.memory
    memory.touch(VICTIM_ADDR, PAGE_SIZE)
    guest.send(index, pack_pfns([VICTIM_PFN]) + b"\xff" * tail)
    assert guest.queue(index).wait_used()[0].written == 0
    if index is BalloonQueue.INFLATE:
        assert not memory.page_present(VICTIM_ADDR)


def less_than_a_pfn(guest: BalloonDriver, size: int) -> None:
    """H91: not even one page number."""
    guest.send(BalloonQueue.INFLATE, b"\x01" * size)
    assert guest.queue(BalloonQueue.INFLATE).wait_used()[0].written == 0


def deflate_what_is_not_in(guest: BalloonDriver) -> None:
    """H92: page contents survive a deflate that never was inflated."""
    memory = guest.machine.memory
    memory.touch(VICTIM_ADDR, PAGE_SIZE, 0x5C)
    guest.deflate([VICTIM_PFN, VICTIM_PFN, 0xFFFF_FFFF])
    assert memory.read(VICTIM_ADDR, PAGE_SIZE) == b"\x5c" * PAGE_SIZE


def inflate_twice(guest: BalloonDriver) -> None:
    """H92."""
    memory = guest.machine.memory
    for _ in range(2):
        memory.touch(VICTIM_ADDR, PAGE_SIZE)
        guest.inflate([VICTIM_PFN])
        assert not memory.page_present(VICTIM_ADDR)
    guest.deflate([VICTIM_PFN])


# -- statistics -----------------------------------------------------------------------------------

STATISTICS: dict[str, bytes] = {
    "5-bytes": b"\1" * 5,
    "13-bytes": pack_stats([(4, 1)]) + b"\1" * 3,
    "unknown-tags": pack_stats([(16, 1), (0xFFFF, 2), (0x8000, 3), (4, 4)]),
    "tags-doubled": pack_stats([(4, 1), (4, 2), (4, (1 << 64) - 1)]),
    "values-huge": pack_stats([(tag, (1 << 64) - 1) for tag in range(16)]),
    "64-kib": pack_stats([(tag & 0xFFFF, tag) for tag in range(6553)]),
    "all-ones": b"\xff" * 160,
}


def statistics(guest: BalloonDriver, content: bytes) -> None:
    """H94: whatever they say, a second buffer makes the device give the first one back."""
    queue = guest.queue(BalloonQueue.STATS)
    guest.give_stats(content)
    guest.give_stats(pack_stats([(4, 1)]))
    assert queue.wait_used(timeout_s=DEADLINE_S)[0].written == 0
    assert not queue.wait_err(0), "the queue was quarantined"
    guest.machine.restart_ring(BalloonQueue.STATS)


def statistics_pile_up(guest: BalloonDriver) -> None:
    """H94: many buffers at once; the device holds one and gives the others back."""
    queue = guest.queue(BalloonQueue.STATS)
    guest.machine.restart_ring(BalloonQueue.STATS)
    address = 12 * MIB
    for _ in range(queue.size):
        queue.add_chain([Buffer(address, 10)])
    queue.kick()
    queue.wait_used(queue.size - 1, timeout_s=DEADLINE_S)
    guest.machine.restart_ring(BalloonQueue.STATS)


# -- reporting ------------------------------------------------------------------------------------


def report_outside(guest: BalloonDriver) -> None:
    """H95, H78, H79: ranges that are not guest memory, one good one among them."""
    memory = guest.machine.memory
    memory.touch(VICTIM_ADDR, PAGE_SIZE)
    ranges = [
        (1 << 50, PAGE_SIZE),
        ((1 << 64) - PAGE_SIZE, PAGE_SIZE),
        (VICTIM_ADDR, PAGE_SIZE),
        (64 * MIB, 2 * MIB),
        (0xFFFF_F000, 0xFFFF_F000),
    ]
    assert guest.report(ranges).written == 0
    assert not memory.page_present(VICTIM_ADDR)


def report_beyond_the_end(guest: BalloonDriver) -> None:
    """H95: a range that starts in guest memory and does not end there."""
    guest.machine.memory.touch(63 * MIB, PAGE_SIZE)
    guest.report([(63 * MIB, 2 * MIB)])
    guest.report([(63 * MIB, 0xFFFF_FFFF)])


def report_over_a_seam(guest: BalloonDriver) -> None:
    """H95: one range in two regions: each part goes from its own place in the file."""
    memory = guest.machine.memory
    seam = memory.regions[1].guest_addr
    memory.touch(seam - 2 * PAGE_SIZE, 2 * PAGE_SIZE)
    memory.touch(seam, 2 * PAGE_SIZE)
    guest.report([(seam - PAGE_SIZE, 2 * PAGE_SIZE)])
    assert memory.page_present(seam - 2 * PAGE_SIZE)
    assert not memory.page_present(seam - PAGE_SIZE)
    assert not memory.page_present(seam)
    assert memory.page_present(seam + PAGE_SIZE)


def report_over_a_hole(guest: BalloonDriver) -> None:
    """H95: nothing outside the range is touched, whatever becomes of its two ends."""
    memory = guest.machine.memory
    low, high = memory.regions
    memory.touch(low.end - 2 * PAGE_SIZE, PAGE_SIZE)
    memory.touch(high.guest_addr + PAGE_SIZE, PAGE_SIZE)
    guest.report([(low.end - PAGE_SIZE, high.guest_addr - low.end + 2 * PAGE_SIZE)])
    assert memory.page_present(low.end - 2 * PAGE_SIZE)
    assert memory.page_present(high.guest_addr + PAGE_SIZE)


def report_unaligned(guest: BalloonDriver) -> None:
    """H95: only whole pages inside the range go; their neighbours keep every byte."""
    memory = guest.machine.memory
    memory.touch(VICTIM_ADDR, 4 * PAGE_SIZE, 0x5C)
    guest.report([(VICTIM_ADDR + 100, 2 * PAGE_SIZE)])
    assert memory.read(VICTIM_ADDR, 100) == b"\x5c" * 100
    tail = VICTIM_ADDR + 100 + 2 * PAGE_SIZE
    rest = VICTIM_ADDR + 4 * PAGE_SIZE - tail
    assert memory.read(tail, rest) == b"\x5c" * rest


def report_overlapping(guest: BalloonDriver) -> None:
    """H95: the same pages many times over."""
    memory = guest.machine.memory
    memory.touch(VICTIM_ADDR, 8 * PAGE_SIZE)
    guest.report([(VICTIM_ADDR + n * PAGE_SIZE, 4 * PAGE_SIZE) for n in (0, 2, 1, 2, 4)])
    assert memory.pages_present(VICTIM_ADDR, 8) == 0


def report_poisoned(guest: BalloonDriver) -> None:
    """H95: with a poison value other than 0 a reported page may not turn to zeroes."""
    memory = guest.machine.memory
    assert guest.machine.features & BalloonFeature.PAGE_POISON
    memory.touch(VICTIM_ADDR, PAGE_SIZE, 0xAA)
    assert guest.write_poison(POISON) == 0
    guest.report([(VICTIM_ADDR, PAGE_SIZE)])
    assert memory.read(VICTIM_ADDR, PAGE_SIZE) == b"\xaa" * PAGE_SIZE
    assert guest.write_poison(0) == 0
    guest.report([(VICTIM_ADDR, PAGE_SIZE)])
    assert not memory.page_present(VICTIM_ADDR)


# -- hinting --------------------------------------------------------------------------------------


def hint_nonsense(guest: BalloonDriver) -> None:
    """H96: nobody asked for hints: ids and blocks are given back, no page is discarded."""
    memory = guest.machine.memory
    memory.touch(VICTIM_ADDR, PAGE_SIZE, 0x5C)
    for command in (COMMAND_STOP, COMMAND_DONE, 2, 0x8000_0000, 0xFFFF_FFFF, 2):
        assert guest.hint_command(command).written == 0
        assert guest.hint_block(VICTIM_ADDR, PAGE_SIZE).written == 0
    assert memory.read(VICTIM_ADDR, PAGE_SIZE) == b"\x5c" * PAGE_SIZE


def hint_of_wrong_size(guest: BalloonDriver) -> None:
    """H96: ids of 1, 3, 5 and 64 Ki bytes, and blocks nowhere."""
    for size in (1, 3, 5, 1 << 16):
        assert guest.hint_bytes(b"\2" * size).written == 0
    for address, size in ((1 << 50, PAGE_SIZE), (64 * MIB, PAGE_SIZE), (VICTIM_ADDR, 1)):
        assert guest.hint_block(address, size).written == 0


def hint_both_ways(guest: BalloonDriver) -> None:
    """H96: an id and a block in one chain."""
    queue = guest.queue(BalloonQueue.HINT)
    guest.machine.memory.write(12 * MIB, struct.pack("<I", 2))
    queue.add_chain([Buffer(12 * MIB, 4), Buffer(VICTIM_ADDR, PAGE_SIZE, True)])
    queue.notify()
    assert queue.wait_used(interrupts=False)[0].written == 0


def everything_at_once(guest: BalloonDriver) -> None:
    """Five queues loaded before any is waited for."""
    serves(guest, BalloonQueue.INFLATE)
    guest.give_stats(bytes(10))
    for index in (BalloonQueue.INFLATE, BalloonQueue.DEFLATE):
        for _ in range(32):
            guest.queue(index).add_chain([Buffer(12 * MIB, 4)], publish=False)
        guest.queue(index).publish()
        guest.queue(index).kick()
    for index in (BalloonQueue.INFLATE, BalloonQueue.DEFLATE):
        guest.queue(index).wait_used(32, timeout_s=DEADLINE_S)
    guest.machine.restart_ring(BalloonQueue.STATS)


def _attacks() -> Iterator[Attack]:
    plain, packed = Setup(), Setup(packed=True, event_idx=True)
    lists: Sequence[tuple[int, str, Callable[[BalloonDriver], None]]] = (
        (90, "pfns-wild", wild_pfns),
        (90, "pfns-too-many", too_many_pfns),
        (90, "pfns-in-pieces", pfns_in_pieces),
        (91, "inflate-ragged", partial(ragged_list, index=BalloonQueue.INFLATE, tail=3)),
        (91, "deflate-ragged", partial(ragged_list, index=BalloonQueue.DEFLATE, tail=1)),
        (91, "pfn-of-3-bytes", partial(less_than_a_pfn, size=3)),
        (92, "deflate-not-in", deflate_what_is_not_in),
        (92, "inflate-twice", inflate_twice),
        (94, "stats-pile-up", statistics_pile_up),
        (95, "report-outside", report_outside),
        (95, "report-beyond-end", report_beyond_the_end),
        (95, "report-unaligned", report_unaligned),
        (95, "report-overlapping", report_overlapping),
        (96, "hint-nonsense", hint_nonsense),
        (96, "hint-wrong-size", hint_of_wrong_size),
        (96, "hint-both-ways", hint_both_ways),
        (96, "everything-at-once", everything_at_once),
    )
    for setup in (plain, packed):
        for number, name, act in lists:
            yield Attack(number, name, Verdict.CLAMP, act, setup)
        for name, content in STATISTICS.items():
            stats = partial(statistics, content=content)
            yield Attack(94, f"stats-{name}", Verdict.CLAMP, stats, setup)
    yield Attack(90, "pfns-around-hole", Verdict.CLAMP, pfns_around_a_hole, HOLED)
    yield Attack(90, "pfns-1-gib", Verdict.CLAMP, gigabyte_of_pfns, WIDE)
    yield Attack(95, "report-over-seam", Verdict.CLAMP, report_over_a_seam, SEAMED)
    yield Attack(95, "report-over-hole", Verdict.CLAMP, report_over_a_hole, HOLED)
    yield Attack(95, "report-poisoned", Verdict.CLAMP, report_poisoned, plain)


ATTACKS = list(_attacks())
