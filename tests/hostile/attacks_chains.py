"""H75, H77 to H81: chains that are linked well and hold nonsense, and their indirect tables.

What both ring layouts can be sent; attacks_queues.py adds what each can get wrong by itself. The
verdict is quarantine of that queue in bounded time, unless an attack says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from tests.fakes.balloon import BalloonDriver, BalloonQueue
from tests.fakes.driver import DESCRIPTOR_SIZE, Buffer, DescriptorFlags, Queue
from tests.fakes.machine import Setup
from tests.fakes.memory import MIB, PAGE_SIZE
from tests.fakes.packed import PackedQueue
from tests.fakes.split import SplitQueue
from tests.hostile.attack import DEADLINE_S, Attack, Verdict, serves

DATA_ADDR = 12 * MIB  # all zero: page number 0 over and over
TABLE_ADDR = 13 * MIB  # indirect tables
UNMAPPED_ADDR = 1 << 50
TOP = 1 << 64
CHAIN_MAX = 1024  # the longest chain any known device takes
NEXT, WRITE, INDIRECT = DescriptorFlags.NEXT, DescriptorFlags.WRITE, DescriptorFlags.INDIRECT
TARGETS = (BalloonQueue.INFLATE, BalloonQueue.STATS, BalloonQueue.REPORT)
SPLIT, PACKED = Setup(), Setup(packed=True)
INDIRECT_SPLIT, INDIRECT_PACKED = Setup(indirect=True), Setup(packed=True, indirect=True)

RawAct = Callable[[BalloonDriver, BalloonQueue], None]


def expose(guest: BalloonDriver, index: BalloonQueue, buffers: Sequence[Buffer]) -> None:
    """Make a well-linked chain available, whatever its buffers say."""
    queue = guest.queue(index)
    queue.add_chain(buffers)
    queue.kick()


def writable(index: BalloonQueue) -> bool:
    """Which way the queue's buffers legally go."""
    return index is BalloonQueue.REPORT


def chain_of(guest: BalloonDriver, index: BalloonQueue, pieces: Sequence[tuple[int, int]]) -> None:
    """H77 to H79: pieces of address and size, all in the queue's legal direction."""
    expose(guest, index, [Buffer(addr, size, writable(index)) for addr, size in pieces])


def read_after_write(guest: BalloonDriver, index: BalloonQueue) -> None:
    """H81: readable descriptors must come first."""
    pieces = [Buffer(DATA_ADDR, PAGE_SIZE, True), Buffer(DATA_ADDR + PAGE_SIZE, PAGE_SIZE)]
    expose(guest, index, pieces)


def table_of(
    guest: BalloonDriver, index: BalloonQueue, addr: int, size: int, extra: int = 0
) -> None:
    """H80: the descriptor that leads to an indirect table lies about it."""
    queue = guest.queue(index)
    for slot in range(4):
        table_entry(queue, slot, WRITE if writable(index) else 0)
    if isinstance(queue, SplitQueue):
        queue.write_slot(0, addr, size, INDIRECT | extra, 1)
        queue.write_slot(1, DATA_ADDR, 4, WRITE if writable(index) else 0)
        queue.expose_raw(0)
    elif isinstance(queue, PackedQueue):
        queue.expose_raw(addr, size, 0, INDIRECT | extra)
    queue.kick()


def nested_table(guest: BalloonDriver, index: BalloonQueue) -> None:
    """H80: an indirect descriptor inside an indirect table."""
    queue = guest.queue(index)
    table_entry(queue, 0, INDIRECT, TABLE_ADDR, DESCRIPTOR_SIZE)
    if isinstance(queue, SplitQueue):
        queue.write_slot(0, TABLE_ADDR, DESCRIPTOR_SIZE, INDIRECT)
        queue.expose_raw(0)
    elif isinstance(queue, PackedQueue):
        queue.expose_raw(TABLE_ADDR, DESCRIPTOR_SIZE, 0, INDIRECT)
    queue.kick()


def long_table(guest: BalloonDriver, index: BalloonQueue) -> None:
    """H75: an honest indirect table with more entries than any device takes."""
    queue = guest.queue(index)
    flags = WRITE if writable(index) else DescriptorFlags(0)
    count = CHAIN_MAX + 1
    for slot in range(count):
        more = NEXT if isinstance(queue, SplitQueue) and slot + 1 < count else 0
        table_entry(queue, slot, flags | more)
    table_size = count * DESCRIPTOR_SIZE
    if isinstance(queue, SplitQueue):
        queue.write_slot(0, TABLE_ADDR, table_size, INDIRECT)
        queue.expose_raw(0)
    elif isinstance(queue, PackedQueue):
        queue.expose_raw(TABLE_ADDR, table_size, 0, INDIRECT)
    queue.kick()


def table_entry(queue: Queue, slot: int, flags: int, addr: int = DATA_ADDR, size: int = 4) -> None:
    if isinstance(queue, SplitQueue):
        queue.write_descriptor(TABLE_ADDR, slot, addr, size, flags, slot + 1)
    else:
        queue.write_descriptor(TABLE_ADDR, slot, addr, size, 0, flags)


def wrong_direction(guest: BalloonDriver, index: BalloonQueue) -> None:
    """H81: well formed but meaningless: given back without an effect, the queue goes on."""
    memory = guest.machine.memory
    memory.touch(DATA_ADDR, PAGE_SIZE, 0)
    expose(guest, index, [Buffer(DATA_ADDR, PAGE_SIZE, not writable(index))])
    used = guest.queue(index).wait_used(timeout_s=DEADLINE_S)
    assert used[0].written == 0
    assert memory.page_present(DATA_ADDR), "the buffer itself was discarded"
    assert memory.read(DATA_ADDR, PAGE_SIZE) == bytes(PAGE_SIZE), "a device wrote into it"
    serves(guest, index)


def contents(index: BalloonQueue) -> list[tuple[int, str, RawAct]]:
    """Return chains that are linked well and hold nonsense."""
    good, empty = (DATA_ADDR, PAGE_SIZE), (DATA_ADDR, 0)
    acts: list[tuple[int, str, RawAct]] = [
        (77, "zero-first", partial(chain_of, pieces=[empty, good])),
        (77, "zero-middle", partial(chain_of, pieces=[good, empty, good])),
        (77, "zero-last", partial(chain_of, pieces=[good, empty])),
        (77, "zero-all", partial(chain_of, pieces=[empty, empty])),
        (81, "read-after-write", read_after_write),
    ]
    if index is not BalloonQueue.REPORT:  # there the descriptor is the message: see H95
        acts += [
            (78, "length-4-gib", partial(chain_of, pieces=[(DATA_ADDR, 0xFFFF_FFFF)])),
            (78, "total-8-gib", partial(chain_of, pieces=[(DATA_ADDR, 0xFFFF_FFFF)] * 2)),
            (79, "address-wraps", partial(chain_of, pieces=[(TOP - 8, 16)])),
            (79, "address-unmapped", partial(chain_of, pieces=[(UNMAPPED_ADDR, 4)])),
            (79, "second-unmapped", partial(chain_of, pieces=[good, (UNMAPPED_ADDR, 4)])),
            (79, "leaves-memory", partial(chain_of, pieces=[(64 * MIB - 4, 8)])),
        ]
    return acts


def tables() -> list[tuple[int, str, RawAct]]:
    """Return what can be wrong with an indirect table in both layouts."""
    return [
        (80, "table-0", partial(table_of, addr=TABLE_ADDR, size=0)),
        (80, "table-8", partial(table_of, addr=TABLE_ADDR, size=8)),
        (80, "table-24", partial(table_of, addr=TABLE_ADDR, size=24)),
        (80, "table-4-gib", partial(table_of, addr=TABLE_ADDR, size=0xFFFF_FFF0)),
        (80, "table-unmapped", partial(table_of, addr=UNMAPPED_ADDR, size=16)),
        (80, "table-wraps", partial(table_of, addr=TOP - 16, size=32)),
        (80, "table-leaves-memory", partial(table_of, addr=64 * MIB - 16, size=32)),
        (80, "table-and-next", partial(table_of, addr=TABLE_ADDR, size=16, extra=NEXT)),
        (80, "table-nested", nested_table),
        (75, "table-of-1025", long_table),
    ]


def on_queue(
    index: BalloonQueue, setup: Setup, acts: Sequence[tuple[int, str, RawAct]]
) -> Iterator[Attack]:
    """Aim acts at one queue; each must end in its quarantine."""
    for number, name, act in acts:
        yield Attack(number, name, Verdict.QUARANTINE, aimed(act, index), setup, index)


def aimed(act: RawAct, index: BalloonQueue) -> Callable[[BalloonDriver], None]:
    """Fix the queue of an act."""

    def at_queue(guest: BalloonDriver) -> None:
        act(guest, index)

    return at_queue


def _attacks() -> Iterator[Attack]:
    for index in TARGETS:
        for setup in (SPLIT, PACKED):
            yield from on_queue(index, setup, contents(index))
            not_negotiated: RawAct = partial(table_of, addr=TABLE_ADDR, size=DESCRIPTOR_SIZE)
            yield from on_queue(index, setup, [(80, "not-negotiated", not_negotiated)])
        for setup in (INDIRECT_SPLIT, INDIRECT_PACKED):
            yield from on_queue(index, setup, tables())
    for setup in (Setup(event_idx=True), Setup(packed=True, event_idx=True)):
        yield from on_queue(BalloonQueue.INFLATE, setup, contents(BalloonQueue.INFLATE))
    for setup in (SPLIT, PACKED):
        for index in (BalloonQueue.INFLATE, BalloonQueue.DEFLATE, BalloonQueue.REPORT):
            name = f"{index.name.lower()}-wrong-direction"
            yield Attack(81, name, Verdict.CLAMP, aimed(wrong_direction, index), setup)


ATTACKS = list(_attacks())
