"""H70 to H76, H79, H84 to H89: rings as a hostile guest writes them, split and packed.

The verdict is quarantine of that queue in bounded time, unless an attack says otherwise.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from functools import partial

from tests.fakes import handshake
from tests.fakes.balloon import BalloonDriver, BalloonQueue
from tests.fakes.driver import DESCRIPTOR_SIZE, Buffer, DescriptorFlags, Queue
from tests.fakes.eventfd import wait_readable
from tests.fakes.machine import Setup
from tests.fakes.memory import PAGE_SIZE
from tests.fakes.packed import PackedQueue
from tests.fakes.split import INDEX_MODULUS, SplitQueue
from tests.hostile.attack import DEADLINE_S, Attack, Verdict, serves
from tests.hostile.attacks_chains import (
    DATA_ADDR,
    INDIRECT,
    INDIRECT_SPLIT,
    NEXT,
    PACKED,
    SPLIT,
    TABLE_ADDR,
    TARGETS,
    WRITE,
    RawAct,
    aimed,
    expose,
    on_queue,
    table_entry,
    writable,
)

QUIET_S = 0.2


def split_queue(guest: BalloonDriver, index: BalloonQueue) -> SplitQueue:
    """The queue, known to be split."""
    queue = guest.queue(index)
    assert isinstance(queue, SplitQueue)
    return queue


def packed_queue(guest: BalloonDriver, index: BalloonQueue) -> PackedQueue:
    """The queue, known to be packed."""
    queue = guest.queue(index)
    assert isinstance(queue, PackedQueue)
    return queue


def stays_untouched(queue: Queue) -> bool:
    """Watch a ring for a while; calls for earlier buffers may still come in and prove nothing."""
    end = time.monotonic() + QUIET_S
    while (remaining_s := end - time.monotonic()) > 0:
        if wait_readable(queue.call_fd, remaining_s):
            queue.calls()
        if queue.collect():
            return False
    return True


# -- split rings ----------------------------------------------------------------------------------


def avail_jump(guest: BalloonDriver, index: BalloonQueue, distance: int) -> None:
    """H70: avail.idx runs further than the ring is long."""
    queue = split_queue(guest, index)
    queue.write_avail_index((queue.next_avail + distance) % INDEX_MODULUS)
    queue.kick()


def head_beyond(guest: BalloonDriver, index: BalloonQueue, head: int) -> None:
    """H71."""
    queue = split_queue(guest, index)
    queue.expose_raw(head)
    queue.kick()


def linked(
    guest: BalloonDriver, index: BalloonQueue, links: Sequence[int], length: int = 4
) -> None:
    """H72 to H75: descriptor n leads to links[n]."""
    queue = split_queue(guest, index)
    flags = NEXT | (WRITE if writable(index) else 0)
    for slot, following in enumerate(links):
        queue.write_slot(slot, DATA_ADDR, length, flags, following)
    queue.expose_raw(0)
    queue.kick()


def loop_in_a_table(guest: BalloonDriver, index: BalloonQueue) -> None:
    """H74: the two descriptors of an indirect table lead to each other."""
    queue = split_queue(guest, index)
    flags = NEXT | (WRITE if writable(index) else 0)
    queue.write_descriptor(TABLE_ADDR, 0, DATA_ADDR, 4, flags, 1)
    queue.write_descriptor(TABLE_ADDR, 1, DATA_ADDR, 4, flags, 0)
    queue.write_slot(0, TABLE_ADDR, 2 * DESCRIPTOR_SIZE, INDIRECT)
    queue.expose_raw(0)
    queue.kick()


def next_leaves_the_table(guest: BalloonDriver, index: BalloonQueue) -> None:
    """H72: next is legal for the ring, not for its indirect table."""
    queue = split_queue(guest, index)
    flags = NEXT | (WRITE if writable(index) else 0)
    queue.write_descriptor(TABLE_ADDR, 0, DATA_ADDR, 4, flags, 2)
    queue.write_descriptor(TABLE_ADDR, 1, DATA_ADDR, 4, flags & ~NEXT, 0)
    queue.write_slot(0, TABLE_ADDR, 2 * DESCRIPTOR_SIZE, INDIRECT)
    queue.expose_raw(0)
    queue.kick()


def same_head_twice(guest: BalloonDriver, index: BalloonQueue) -> None:
    """H76: the statistics queue holds the first while the second arrives."""
    queue = split_queue(guest, index)
    queue.write_slot(0, DATA_ADDR, 10)
    queue.expose_raw(0, 0)
    queue.kick()


# -- packed rings ---------------------------------------------------------------------------------


def id_beyond(guest: BalloonDriver, index: BalloonQueue, token: int) -> None:
    """H85."""
    queue = packed_queue(guest, index)
    queue.expose_raw(DATA_ADDR, PAGE_SIZE, token, WRITE if writable(index) else 0)
    queue.kick()


def endless_packed_chain(guest: BalloonDriver, index: BalloonQueue) -> None:
    """H75: every descriptor of the ring is available and says that more follows."""
    queue = packed_queue(guest, index)
    flags = NEXT | (WRITE if writable(index) else 0)
    for _ in range(queue.size):
        queue.expose_raw(DATA_ADDR, PAGE_SIZE, 0, flags)
    queue.kick()


def packed_flags_that_mean_nothing(guest: BalloonDriver, index: BalloonQueue) -> None:
    """H85: "used" in the present round, and a hole before the next available slot."""
    guest.machine.restart_ring(index)  # an empty ring: no call of an earlier buffer is due
    queue = packed_queue(guest, index)
    at = queue.next_avail
    queue.write_slot(at, DATA_ADDR, 4, 0, DescriptorFlags.AVAIL | DescriptorFlags.USED)
    queue.write_slot((at + 2) % queue.size, DATA_ADDR, 4, 0, queue.avail_flags())
    queue.kick()
    assert not wait_readable(queue.call_fd, QUIET_S), "something was taken"
    guest.machine.restart_ring(index)


def ring_as_data(guest: BalloonDriver) -> None:
    """H79: the page numbers are the ring's own bytes; any result is the guest's own fault."""
    queue = guest.queue(BalloonQueue.DEFLATE)
    size = queue.size * DESCRIPTOR_SIZE
    expose(guest, BalloonQueue.DEFLATE, [Buffer(queue.parts.desc, size)])
    assert queue.wait_used(timeout_s=DEADLINE_S)


def rings_reported_free(guest: BalloonDriver) -> None:
    """H79: the pages the rings lie in are given up; the guest broke its own device only."""
    first = guest.queue(BalloonQueue.INFLATE).parts.desc // PAGE_SIZE * PAGE_SIZE
    expose(guest, BalloonQueue.REPORT, [Buffer(first, 16 * PAGE_SIZE, True)])
    wait_readable(guest.queue(BalloonQueue.REPORT).call_fd, QUIET_S)
    guest.machine.restart_afresh()


def event_index_nonsense(guest: BalloonDriver) -> None:
    """H84: used_event anywhere: buffers come back all the same, calls stay fewer than buffers."""
    queue = split_queue(guest, BalloonQueue.DEFLATE)
    source = random.Random(84)
    queue.interrupts_off = True  # keeps collect() from correcting used_event
    queue.calls()
    rounds = 64
    for _ in range(rounds):
        queue.write_used_event(source.randrange(INDEX_MODULUS))
        queue.add_chain([Buffer(DATA_ADDR, 4)])
        queue.kick()
        queue.wait_used(interrupts=False)
    assert queue.calls() <= rounds
    queue.interrupts_off = False
    queue.collect()
    serves(guest, BalloonQueue.DEFLATE)  # raises InterruptMissing if the call is lost


def packed_event_nonsense(guest: BalloonDriver) -> None:
    """H84: the driver's event structure holds reserved flags and offsets outside the ring."""
    queue = packed_queue(guest, BalloonQueue.DEFLATE)
    source = random.Random(85)
    queue.interrupts_off = True
    queue.calls()
    rounds = 64
    for _ in range(rounds):
        offset, flags = source.randrange(1 << 15), source.randrange(1 << 16)
        queue.write_driver_event(offset, bool(source.getrandbits(1)), flags)
        queue.add_chain([Buffer(DATA_ADDR, 4)])
        queue.kick()
        queue.wait_used(interrupts=False)
    assert queue.calls() <= rounds
    queue.set_interrupts(True)
    queue.collect()
    serves(guest, BalloonQueue.DEFLATE)


def kicks_on_a_disabled_ring(guest: BalloonDriver) -> None:
    """H88: nothing is taken until the ring is enabled; then it is looked at without a kick."""
    front = guest.machine.front
    queue = guest.queue(BalloonQueue.DEFLATE)
    assert front.set_vring_enable(BalloonQueue.DEFLATE, False) == 0
    queue.add_chain([Buffer(DATA_ADDR, 4)])
    queue.kick()
    assert stays_untouched(queue), "a disabled ring was served"
    assert front.set_vring_enable(BalloonQueue.DEFLATE, True) == 0
    assert queue.wait_used(timeout_s=DEADLINE_S)


def kicks_on_a_stopped_ring(guest: BalloonDriver) -> None:
    """H88: a ring that was stopped is not touched."""
    queue = guest.queue(BalloonQueue.DEFLATE)
    guest.machine.front.get_vring_base(BalloonQueue.DEFLATE)
    queue.add_chain([Buffer(DATA_ADDR, 4)])
    queue.kick()
    assert stays_untouched(queue), "a stopped ring was served"
    serves(guest)
    guest.machine.restart_ring(BalloonQueue.DEFLATE)


def stop_while_held(guest: BalloonDriver) -> None:
    """H89: the base given back counts a held buffer as not yet taken, so none is lost."""
    machine = guest.machine
    queue = guest.queue(BalloonQueue.STATS)
    machine.restart_ring(BalloonQueue.STATS)
    guest.give_stats(bytes(10))
    serves(guest)
    base = machine.front.get_vring_base(BalloonQueue.STATS)
    assert base == queue.start_base(), f"base {base:#x}: the held buffer is lost"
    handshake.set_up_ring(machine.front, machine.memory, BalloonQueue.STATS, queue, base)
    assert machine.front.set_vring_enable(BalloonQueue.STATS, True) == 0
    guest.give_stats(bytes(10))
    guest.wait_stats_request()
    machine.restart_ring(BalloonQueue.STATS)


def in_order_violated(guest: BalloonDriver) -> None:
    """H86: heads in an order of the guest's own; the device still uses them as they came."""
    queue = split_queue(guest, BalloonQueue.DEFLATE)
    for head in (5, 3, 9):
        queue.write_slot(head, DATA_ADDR, 4)
        queue.chains[head] = []
    queue.expose_raw(5, 3, 9)
    queue.kick()
    used = queue.wait_used(3, timeout_s=DEADLINE_S)
    assert [entry.token for entry in used] == [5, 3, 9]
    guest.machine.restart_ring(BalloonQueue.DEFLATE)


def mixed_chain(guest: BalloonDriver) -> None:
    """Legal: descriptors of the ring first, then one that leads to a table, WRITE set on it."""
    queue = split_queue(guest, BalloonQueue.DEFLATE)
    table_entry(queue, 0, 0)
    queue.write_slot(0, DATA_ADDR, 4, NEXT, 1)
    queue.write_slot(1, TABLE_ADDR, DESCRIPTOR_SIZE, INDIRECT | WRITE)
    queue.chains[0] = []
    queue.expose_raw(0)
    queue.kick()
    assert queue.wait_used(timeout_s=DEADLINE_S)[0].token == 0
    guest.machine.restart_ring(BalloonQueue.DEFLATE)


def _attacks() -> Iterator[Attack]:
    for index in TARGETS:
        yield from on_queue(index, SPLIT, split_raw(index))
        yield from on_queue(index, INDIRECT_SPLIT, split_indirect())
        yield from on_queue(index, PACKED, packed_raw())
    yield from _others()


def split_raw(index: BalloonQueue) -> list[tuple[int, str, RawAct]]:
    """Return what can be wrong with a split ring itself."""
    acts: list[tuple[int, str, RawAct]] = [
        (70, "avail-jumps-129", partial(avail_jump, distance=129)),
        (70, "avail-jumps-32768", partial(avail_jump, distance=32768)),
        (70, "avail-goes-back", partial(avail_jump, distance=-1)),
        (71, "head-128", partial(head_beyond, head=128)),
        (71, "head-65535", partial(head_beyond, head=0xFFFF)),
        (72, "next-128", partial(linked, links=[128])),
        (72, "next-65535", partial(linked, links=[1, 0xFFFF])),
        (73, "self-loop", partial(linked, links=[0])),
        (74, "two-loop", partial(linked, links=[1, 0])),
        (75, "whole-ring-loop", partial(linked, links=[*range(1, 128), 0])),
    ]
    if index is BalloonQueue.STATS:
        acts.append((76, "head-twice", same_head_twice))
    return acts


def split_indirect() -> list[tuple[int, str, RawAct]]:
    """Return what only a split ring's indirect table can get wrong."""
    return [(74, "loop-in-table", loop_in_a_table), (72, "next-leaves", next_leaves_the_table)]


def packed_raw() -> list[tuple[int, str, RawAct]]:
    """Return what can be wrong with a packed ring itself."""
    return [
        (85, "id-128", partial(id_beyond, token=128)),
        (85, "id-65535", partial(id_beyond, token=0xFFFF)),
        (75, "endless", endless_packed_chain),
    ]


def _others() -> Iterator[Attack]:
    ignore = Verdict.IGNORE
    for setup in (SPLIT, PACKED):
        yield Attack(79, "ring-as-data", ignore, ring_as_data, setup)
        yield Attack(79, "rings-reported", ignore, rings_reported_free, setup)
        yield Attack(88, "kick-disabled", ignore, kicks_on_a_disabled_ring, setup, watches=True)
        yield Attack(88, "kick-stopped", ignore, kicks_on_a_stopped_ring, setup, watches=True)
        yield Attack(89, "stop-while-held", ignore, stop_while_held, setup)
    act = aimed(packed_flags_that_mean_nothing, BalloonQueue.INFLATE)
    yield Attack(85, "flags-mean-nothing", ignore, act, PACKED, watches=True)
    yield Attack(84, "event-nonsense", ignore, event_index_nonsense, Setup(event_idx=True))
    packed_events = Setup(packed=True, event_idx=True)
    yield Attack(84, "event-nonsense", ignore, packed_event_nonsense, packed_events)
    yield Attack(86, "order-violated", ignore, in_order_violated, Setup(in_order=True))
    yield Attack(80, "mixed-chain", ignore, mixed_chain, INDIRECT_SPLIT)


ATTACKS = list(_attacks())
