"""H34 to H54: memory tables and slots that lie. The old table stays in use each time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from tests.fakes import messages
from tests.fakes.balloon import BalloonDriver, BalloonQueue
from tests.fakes.driver import Buffer
from tests.fakes.machine import Setup
from tests.fakes.memory import MIB, PAGE_SIZE, GuestMemory, open_memfd
from tests.fakes.messages import ProtocolFeature, Request, WireRegion
from tests.hostile.attack import (
    PROOF_ADDR,
    Attack,
    Verdict,
    accepted,
    closing,
    refused,
    serves,
)
from tests.hostile.attacks_framing import SPARE

TOP = 1 << 64
SLOTS = Setup()
FRONTEND_SLOTS = Setup(protocol_features=SLOTS.protocol_features & ~ProtocolFeature.GPA_ADDRESSES)
TABLE = Setup(protocol_features=SLOTS.protocol_features & ~ProtocolFeature.CONFIGURE_MEM_SLOTS)
FRONTEND_TABLE = Setup(protocol_features=TABLE.protocol_features & FRONTEND_SLOTS.protocol_features)
HOLED = replace(SLOTS, make_memory=GuestMemory.with_hole)
F_SEAL_WRITE, F_SEAL_FUTURE_WRITE = 0x8, 0x10

# What one region of 1 MiB may not look like. The file behind it has 1 MiB too.
LIES: tuple[tuple[int, str, dict[str, int]], ...] = (
    (35, "size-0", {"size": 0}),
    (36, "size-unaligned", {"size": MIB - 1}),
    (36, "guest-address-unaligned", {"guest_addr": SPARE.guest_addr + 8}),
    (37, "size-2-63", {"size": 1 << 63}),
    (37, "size-2-64-less-1", {"size": TOP - 1}),
    (37, "size-2-64-less-page", {"size": TOP - PAGE_SIZE}),
    (38, "guest-address-overflow", {"guest_addr": TOP - PAGE_SIZE}),
    (38, "frontend-address-overflow", {"frontend_addr": TOP - PAGE_SIZE}),
    (38, "file-offset-overflow", {"file_offset": TOP - PAGE_SIZE}),
    (39, "guest-overlap", {"guest_addr": PROOF_ADDR, "frontend_addr": PROOF_ADDR}),
    (42, "offset-beyond-file", {"file_offset": 2 * MIB}),
    (42, "offset-at-end-of-file", {"file_offset": MIB}),
    (43, "offset-unaligned", {"file_offset": 512}),
    (44, "file-shorter-than-region", {"size": MIB + PAGE_SIZE}),
    (44, "offset-pushes-region-out", {"file_offset": PAGE_SIZE}),
)


def lie_in_a_slot(guest: BalloonDriver, changes: dict[str, int]) -> None:
    """One ADD_MEM_REG beside the guest's RAM."""
    slot = messages.memory_slot(SPARE.but(**changes))
    with closing(open_memfd(MIB)) as fds:
        refused(guest, Request.ADD_MEM_REG, slot, fds)


def table_with(guest: BalloonDriver, *extra: WireRegion) -> tuple[WireRegion, ...]:
    """The guest's own regions and some more."""
    acked = guest.machine.front.protocol_features
    guest_addresses = ProtocolFeature.GPA_ADDRESSES in acked
    return (*guest.machine.memory.wire_regions(guest_addresses=guest_addresses), *extra)


def lie_in_a_table(guest: BalloonDriver, changes: dict[str, int]) -> None:
    """One SET_MEM_TABLE whose last region is bad; the good ones must not take effect alone."""
    regions = table_with(guest, SPARE.but(**changes))
    with closing(open_memfd(MIB)) as (fd,):
        fds = [*[guest.machine.memory.fd] * (len(regions) - 1), fd]
        refused(guest, Request.SET_MEM_TABLE, messages.memory_table(regions), fds)


def count_lies(guest: BalloonDriver, count: int) -> None:
    """H34: the header of the table states a count the payload does not have."""
    regions = table_with(guest)
    payload = messages.memory_table(regions, count)
    refused(guest, Request.SET_MEM_TABLE, payload, [guest.machine.memory.fd] * len(regions))


def nine_regions(guest: BalloonDriver) -> None:
    """H34: one more than a table can hold, all of them well formed."""
    spares = [
        SPARE.but(guest_addr=SPARE.guest_addr + n * MIB, frontend_addr=SPARE.guest_addr + n * MIB)
        for n in range(8)
    ]
    regions = table_with(guest, *spares)
    with closing(open_memfd(MIB)) as (fd,):
        fds = [guest.machine.memory.fd, *[fd] * len(spares)]
        refused(guest, Request.SET_MEM_TABLE, messages.memory_table(regions), fds)


def fds_do_not_match(guest: BalloonDriver) -> None:
    """H13, H17: fewer and more descriptors than regions."""
    regions = table_with(guest)
    fd = guest.machine.memory.fd
    payload = messages.memory_table(regions)
    refused(guest, Request.SET_MEM_TABLE, payload, [])
    refused(guest, Request.SET_MEM_TABLE, payload, [fd] * (len(regions) + 1))


def frontend_overlap(guest: BalloonDriver) -> None:
    """H40: ring addresses would be ambiguous."""
    own = table_with(guest)[0]
    region = SPARE.but(frontend_addr=own.frontend_addr + MIB)
    with closing(open_memfd(MIB)) as fds:
        refused(guest, Request.ADD_MEM_REG, messages.memory_slot(region), fds)


def same_region_twice(guest: BalloonDriver) -> None:
    """H41."""
    fd = guest.machine.memory.fd
    refused(guest, Request.ADD_MEM_REG, messages.memory_slot(table_with(guest)[0]), [fd])


def same_region_twice_in_a_table(guest: BalloonDriver) -> None:
    """H41."""
    regions = table_with(guest, *table_with(guest))
    fds = [guest.machine.memory.fd] * len(regions)
    refused(guest, Request.SET_MEM_TABLE, messages.memory_table(regions), fds)


def read_only_memory(guest: BalloonDriver) -> None:
    """H46: the used ring could not be written."""
    with closing(open_memfd(MIB)) as (fd,):
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        with closing(reader):
            refused(guest, Request.ADD_MEM_REG, messages.memory_slot(SPARE), [reader])


def sealed_memory(guest: BalloonDriver, seal: int) -> None:
    """H46: a memfd sealed against writing."""
    with closing(open_memfd(MIB)) as (fd,):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)
        refused(guest, Request.ADD_MEM_REG, messages.memory_slot(SPARE), [fd])


def empty_file(guest: BalloonDriver) -> None:
    """H44: nothing to map."""
    with closing(open_memfd(0)) as fds:
        refused(guest, Request.ADD_MEM_REG, messages.memory_slot(SPARE), fds)


def remove_what_is_not_there(guest: BalloonDriver) -> None:
    """H50: unknown, and known but for one field."""
    refused(guest, Request.REM_MEM_REG, messages.memory_slot(SPARE))
    with closing(open_memfd(MIB)) as fds:
        accepted(guest, Request.ADD_MEM_REG, messages.memory_slot(SPARE), fds)
    for wrong in (
        SPARE.but(guest_addr=SPARE.guest_addr + PAGE_SIZE),
        SPARE.but(size=SPARE.size - PAGE_SIZE),
        SPARE.but(frontend_addr=SPARE.frontend_addr + PAGE_SIZE),
    ):
        refused(guest, Request.REM_MEM_REG, messages.memory_slot(wrong))
    accepted(guest, Request.REM_MEM_REG, messages.memory_slot(SPARE))


def remove_with_fd(guest: BalloonDriver) -> None:
    """H50: a descriptor on REM_MEM_REG is closed, older front ends send one."""
    with closing(open_memfd(MIB)) as fds:
        accepted(guest, Request.ADD_MEM_REG, messages.memory_slot(SPARE), fds)
        accepted(guest, Request.REM_MEM_REG, messages.memory_slot(SPARE), fds)


def remove_under_a_ring(guest: BalloonDriver) -> None:
    """H51: the rings live in the guest's first region."""
    refused(guest, Request.REM_MEM_REG, messages.memory_slot(table_with(guest)[0]))


def remove_under_a_buffer(guest: BalloonDriver) -> None:
    """H51: a statistics buffer the device holds lies in the region that goes."""
    with closing(open_memfd(MIB)) as fds:
        accepted(guest, Request.ADD_MEM_REG, messages.memory_slot(SPARE), fds)
    stats = guest.queue(BalloonQueue.STATS)
    stats.add_chain([Buffer(SPARE.guest_addr, 10)])
    stats.notify()
    serves(guest)
    if guest.machine.front.ack(Request.REM_MEM_REG, messages.memory_slot(SPARE)) != 0:
        guest.machine.restart_ring(BalloonQueue.STATS)
        accepted(guest, Request.REM_MEM_REG, messages.memory_slot(SPARE))
    guest.machine.restart_ring(BalloonQueue.STATS)


def table_without_the_rings(guest: BalloonDriver) -> None:
    """H52: the new table lacks what running rings need."""
    with closing(open_memfd(MIB)) as fds:
        refused(guest, Request.SET_MEM_TABLE, messages.memory_table([SPARE]), fds)


def same_table_again(guest: BalloonDriver) -> None:
    """H52: an equal table under running rings changes nothing."""
    regions = table_with(guest)
    fds = [guest.machine.memory.fd] * len(regions)
    for _ in range(4):
        accepted(guest, Request.SET_MEM_TABLE, messages.memory_table(regions), fds)
        serves(guest)


def frontend_address_is_not_the_guests(guest: BalloonDriver) -> None:
    """H54: GPA_ADDRESSES was acknowledged, so the two must be equal."""
    region = SPARE.but(frontend_addr=SPARE.guest_addr + MIB)
    with closing(open_memfd(MIB)) as fds:
        refused(guest, Request.ADD_MEM_REG, messages.memory_slot(region), fds)


def buffer_over_a_hole(guest: BalloonDriver) -> None:
    """H53: the middle of the descriptor is no guest memory."""
    hole = guest.machine.memory.regions[0].end
    end = guest.machine.memory.regions[1].guest_addr
    queue = guest.queue(BalloonQueue.INFLATE)
    queue.add_chain([Buffer(hole - PAGE_SIZE, end - hole + 2 * PAGE_SIZE)])
    queue.kick()


def buffer_into_a_hole(guest: BalloonDriver) -> None:
    """H53: only the first bytes of the descriptor are guest memory."""
    hole = guest.machine.memory.regions[0].end
    queue = guest.queue(BalloonQueue.INFLATE)
    queue.add_chain([Buffer(hole - 8, 16)])
    queue.kick()


def buffer_over_a_seam(guest: BalloonDriver) -> None:
    """H53's legal neighbour: two regions that touch hold one buffer."""
    memory = guest.machine.memory
    seam = memory.regions[1].guest_addr
    first_pfn = PROOF_ADDR // PAGE_SIZE
    memory.touch(PROOF_ADDR, 2 * PAGE_SIZE)
    memory.write_number(seam - 6, first_pfn, 4)
    low, high = (first_pfn + 1).to_bytes(4, "little")[:2], (first_pfn + 1).to_bytes(4, "little")[2:]
    memory.write(seam - 2, low)
    memory.write(seam, high)
    queue = guest.queue(BalloonQueue.INFLATE)
    queue.add_chain([Buffer(seam - 6, 8)])
    queue.notify()
    assert queue.wait_used()[0].written == 0
    assert memory.pages_present(PROOF_ADDR, 2) == 0


def _attacks() -> Iterator[Attack]:
    refuse, ignore = Verdict.REFUSE, Verdict.IGNORE
    for number, name, changes in LIES:
        act: Callable[[BalloonDriver], None] = partial(lie_in_a_slot, changes=changes)
        yield Attack(number, f"slot-{name}", refuse, act, FRONTEND_SLOTS)
        act = partial(lie_in_a_table, changes=changes)
        yield Attack(number, f"table-{name}", refuse, act, FRONTEND_TABLE)
    for count in (0, 2, 9, 0x8000_0000, 0xFFFF_FFFF):
        act = partial(count_lies, count=count)
        yield Attack(34, f"table-count-{count}", refuse, act, TABLE)
    yield Attack(34, "table-of-9", refuse, nine_regions, TABLE)
    yield Attack(34, "table-fd-count", refuse, fds_do_not_match, TABLE)
    yield Attack(40, "frontend-overlap", refuse, frontend_overlap, FRONTEND_SLOTS)
    yield Attack(41, "slot-twice", refuse, same_region_twice)
    yield Attack(41, "table-region-twice", refuse, same_region_twice_in_a_table, TABLE)
    yield Attack(44, "empty-file", refuse, empty_file)
    yield Attack(46, "read-only", refuse, read_only_memory)
    for seal, name in ((F_SEAL_WRITE, "write"), (F_SEAL_FUTURE_WRITE, "future-write")):
        yield Attack(46, f"sealed-{name}", refuse, partial(sealed_memory, seal=seal))
    yield Attack(50, "remove-unknown", refuse, remove_what_is_not_there)
    yield Attack(50, "remove-with-fd", ignore, remove_with_fd)
    yield Attack(51, "remove-under-ring", refuse, remove_under_a_ring)
    yield Attack(51, "remove-under-buffer", ignore, remove_under_a_buffer)
    yield Attack(52, "table-without-rings", refuse, table_without_the_rings, TABLE)
    yield Attack(52, "same-table-again", ignore, same_table_again, TABLE)
    for act, name in ((buffer_over_a_hole, "over"), (buffer_into_a_hole, "into")):
        for setup in (HOLED, replace(HOLED, packed=True)):
            yield Attack(
                53, f"buffer-{name}-hole", Verdict.QUARANTINE, act, setup, BalloonQueue.INFLATE
            )
    seamed = replace(SLOTS, make_memory=GuestMemory.adjacent)
    yield Attack(53, "buffer-over-seam", ignore, buffer_over_a_seam, seamed)
    yield Attack(54, "gpa-addresses-lie", refuse, frontend_address_is_not_the_guests)


ATTACKS = list(_attacks())
