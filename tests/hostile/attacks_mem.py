"""H98: requests a virtio-mem device must not fall for.

Every attack finds KEPT_BLOCKS plugged from the window's start on, and must leave just these.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tests.fakes.driver import Buffer
from tests.fakes.mem import (
    BLOCK_SIZE,
    RESPONSE,
    SLOT_SIZE,
    UNTOUCHED,
    WINDOW_ADDRESS,
    WINDOW_SIZE,
    BlockState,
    MemAnswer,
    MemDriver,
    MemRequest,
    pack_request,
)
from tests.hostile.attack import DEADLINE_S
from tests.hostile.mem_machine import REQUESTED_BLOCKS, SPARE_BLOCK, USABLE_BLOCKS, serves

KEPT_BLOCKS = 4
KEPT_BYTE = 0x5C
USABLE_END = WINDOW_ADDRESS + USABLE_BLOCKS * BLOCK_SIZE
ADDRESS_END = 1 << 64
SHORT_SIZES = (1, 8, 17, 23)
SPARE_ADDRESS = WINDOW_ADDRESS + SPARE_BLOCK * BLOCK_SIZE

BAD_RANGES = {
    "address_0": (0, 1),
    "in_boot_memory": (16 << 20, 1),
    "below": (WINDOW_ADDRESS - BLOCK_SIZE, 1),
    "from_below_into_it": (WINDOW_ADDRESS - BLOCK_SIZE, 2),
    "unaligned_by_a_page": (WINDOW_ADDRESS + 4096, 1),
    "unaligned_by_a_byte": (WINDOW_ADDRESS + BLOCK_SIZE - 1, 1),
    "behind_what_is_usable": (USABLE_END, 1),
    "over_the_end_of_what_is_usable": (USABLE_END - BLOCK_SIZE, 2),
    "behind_the_window": (WINDOW_ADDRESS + WINDOW_SIZE, 1),
    "over_the_window_s_end": (WINDOW_ADDRESS + WINDOW_SIZE - BLOCK_SIZE, 2),
    "no_blocks": (WINDOW_ADDRESS, 0),
    "no_blocks_anywhere": (0, 0),
    "65535_blocks": (WINDOW_ADDRESS, 0xFFFF),
    "last_address": (ADDRESS_END - 1, 1),
    "up_to_the_end_of_addresses": (ADDRESS_END - BLOCK_SIZE, 1),
    "wraps_to_0": (ADDRESS_END - BLOCK_SIZE, 2),
    # Ends behind the window's first block if the sum is cut to 64 bits.
    "wraps_into_the_window": (ADDRESS_END - (64 << 30), (68 << 30) // BLOCK_SIZE + 1),
}
UNKNOWN_KINDS = (4, 0x100, 0x102, 0xFFFF)  # two of them end in a byte that means something


@dataclass(frozen=True)
class MemAttack:
    """act() does it to a running device and checks what it is told."""

    name: str
    act: Callable[[MemDriver], None]
    quarantines: bool = False


def prepare(guest: MemDriver) -> None:
    """Plug and fill what attacks find plugged."""
    assert guest.plug(0, KEPT_BLOCKS) is MemAnswer.ACK
    guest.fill(0, KEPT_BLOCKS, KEPT_BYTE)


def strike(attack: MemAttack, guest: MemDriver) -> None:
    """Do it once; no block changed its state, and the device serves."""
    hit(attack, guest)
    check_blocks(guest)
    serves(guest)


def hit(attack: MemAttack, guest: MemDriver) -> None:
    """Do it once; the queue runs afterwards."""
    attack.act(guest)
    guest.take_config_changes()
    if attack.quarantines:
        assert guest.queue.wait_err(DEADLINE_S), "the queue was not reported broken"
        guest.machine.restart_ring(0)


def check_blocks(guest: MemDriver) -> None:
    """The blocks plugged at first are plugged, and no others."""
    assert guest.config().plugged_size == KEPT_BLOCKS * BLOCK_SIZE
    assert guest.state(0, KEPT_BLOCKS) is BlockState.PLUGGED
    assert guest.state(KEPT_BLOCKS, USABLE_BLOCKS - KEPT_BLOCKS) is BlockState.UNPLUGGED


def refused(guest: MemDriver, kind: int, address: int, count: int) -> None:
    """It is told ERROR, and nothing of a block's state."""
    assert guest.ask(kind, address, count) == (MemAnswer.ERROR, BlockState.PLUGGED)


def refused_blocks(guest: MemDriver, kind: int, block: int, count: int) -> None:
    """The same by block number."""
    refused(guest, kind, guest.address_of(block), count)


def plug_beyond_requested(guest: MemDriver) -> None:
    """All or nothing: a part of it would still fit."""
    answer = guest.plug(KEPT_BLOCKS, REQUESTED_BLOCKS - KEPT_BLOCKS + 1)
    assert answer in (MemAnswer.NACK, MemAnswer.BUSY)


def unplug_all_mid_plug(guest: MemDriver) -> None:
    """UNPLUG_ALL comes while a PLUG waits for the memory of its blocks to go."""
    count = REQUESTED_BLOCKS - KEPT_BLOCKS
    assert guest.plug(KEPT_BLOCKS, count) is MemAnswer.ACK
    guest.fill(KEPT_BLOCKS, 2, 0xA5)
    posted = guest.post_all(
        [
            (MemRequest.UNPLUG, KEPT_BLOCKS, count),
            (MemRequest.PLUG, KEPT_BLOCKS, count),
            (MemRequest.UNPLUG_ALL, 0, 0),
            (MemRequest.STATE, 0, REQUESTED_BLOCKS),
            (MemRequest.PLUG, 0, KEPT_BLOCKS),
        ]
    )
    guest.queue.wait_used(len(posted))
    answers = [guest.read_answer(one) for one in posted]
    assert [answer for answer, _ in answers] == [MemAnswer.ACK] * len(posted)
    assert answers[3][1] is BlockState.UNPLUGGED
    assert guest.pages(0, KEPT_BLOCKS) == 0, "plugged with old content"
    guest.fill(0, KEPT_BLOCKS, KEPT_BYTE)


def comes_back_unused(
    guest: MemDriver, pieces: tuple[bytes, ...], rooms: tuple[int, ...] = (RESPONSE.size,)
) -> None:
    """The chain is given back with not a byte written."""
    used, response = guest.exchange(pieces, rooms)
    assert used.written == 0
    assert response == bytes([UNTOUCHED]) * sum(rooms)


def short_request(guest: MemDriver, size: int) -> None:
    """A PLUG that is cut off."""
    comes_back_unused(guest, (pack_request(MemRequest.PLUG, SPARE_ADDRESS, 1)[:size],))


def short_rooms(guest: MemDriver, *rooms: int) -> None:
    """A PLUG whose answer has no room."""
    comes_back_unused(guest, (pack_request(MemRequest.PLUG, SPARE_ADDRESS, 1),), rooms)


def room_before_request(guest: MemDriver) -> None:
    """The writable part comes first, which no virtio request may do."""
    memory = guest.machine.memory
    at = memory.allocate(64)
    memory.write(at, pack_request(MemRequest.PLUG, SPARE_ADDRESS, 1))
    guest.queue.add_chain([Buffer(at + 32, RESPONSE.size, writable=True), Buffer(at, 24)])
    guest.queue.notify()


def in_pieces(guest: MemDriver, sizes: tuple[int, ...], rooms: tuple[int, ...]) -> None:
    """A legal request in many descriptors is carried out as one in two."""
    for kind, state in ((MemRequest.PLUG, "plugged"), (MemRequest.UNPLUG, "unplugged")):
        request = pack_request(kind, SPARE_ADDRESS, 1, padding=0xFF)
        starts = [sum(sizes[:n]) for n in range(len(sizes))]
        pieces = [request[at : at + size] for at, size in zip(starts, sizes, strict=True)]
        used, response = guest.exchange(pieces, rooms)
        assert (used.written, response) == (RESPONSE.size, bytes(RESPONSE.size))
        assert guest.state(SPARE_BLOCK).name == state.upper()


def long_chain(guest: MemDriver) -> None:
    """What follows the request is ignored, and the room behind the response left alone."""
    more = 2048
    request = pack_request(MemRequest.STATE, WINDOW_ADDRESS, KEPT_BLOCKS + 1) + b"\xff" * more
    used, response = guest.exchange([request], [RESPONSE.size, more])
    assert used.written == RESPONSE.size
    assert response == struct.pack("<H6xH", 0, BlockState.MIXED) + bytes([UNTOUCHED]) * more


def plugged_memory_as_buffers(guest: MemDriver) -> None:
    """Request and response lie in the window itself."""
    at = WINDOW_ADDRESS + SLOT_SIZE
    guest.window.write(at, pack_request(MemRequest.STATE, WINDOW_ADDRESS, 1))
    guest.queue.add_chain([Buffer(at, 24), Buffer(at + 64, RESPONSE.size, writable=True)])
    guest.queue.notify()
    (used,) = guest.queue.wait_used()
    assert used.written == RESPONSE.size
    assert guest.window.read(at + 64, RESPONSE.size) == bytes(RESPONSE.size)


def full_ring_of_refusals(guest: MemDriver) -> None:
    """As many wrong requests at once as the ring takes."""
    count = guest.queue.size if guest.machine.setup.indirect else guest.queue.size // 2
    posted = guest.post_all([(MemRequest.PLUG, -1, 1)] * count)
    guest.queue.wait_used(count)
    assert {guest.read_answer(one)[0] for one in posted} == {MemAnswer.ERROR}


_RANGE_KINDS = (MemRequest.PLUG, MemRequest.UNPLUG, MemRequest.STATE)

ATTACKS = [
    *(
        MemAttack(f"{kind.name.lower()}-{name}", partial(refused, kind=kind, address=at, count=n))
        for kind in _RANGE_KINDS
        for name, (at, n) in BAD_RANGES.items()
    ),
    *(
        MemAttack(f"type_{kind:#x}", partial(refused_blocks, kind=kind, block=0, count=1))
        for kind in UNKNOWN_KINDS
    ),
    MemAttack("plug_beyond_requested", plug_beyond_requested),
    *(
        MemAttack(name, partial(refused_blocks, kind=kind, block=block, count=count))
        for name, kind, block, count in (
            ("plug_plugged", MemRequest.PLUG, 1, 1),
            ("plug_plugged_in_part", MemRequest.PLUG, KEPT_BLOCKS - 1, 2),
            ("unplug_unplugged", MemRequest.UNPLUG, KEPT_BLOCKS, 1),
            ("unplug_unplugged_in_part", MemRequest.UNPLUG, KEPT_BLOCKS - 1, 2),
            ("unplug_all_that_is_usable", MemRequest.UNPLUG, 0, USABLE_BLOCKS),
        )
    ),
    MemAttack("unplug_all_mid_plug", unplug_all_mid_plug),
    *(
        MemAttack(f"request_{size}_bytes", partial(short_request, size=size))
        for size in SHORT_SIZES
    ),
    MemAttack("no_request", partial(comes_back_unused, pieces=())),
    MemAttack("no_response", short_rooms),
    MemAttack("response_1_byte", lambda guest: short_rooms(guest, 1)),
    MemAttack("response_9_bytes", lambda guest: short_rooms(guest, 4, 5)),
    MemAttack("response_before_request", room_before_request, quarantines=True),
    MemAttack("pieces_of_1_byte", partial(in_pieces, sizes=(1,) * 24, rooms=(1,) * 10)),
    MemAttack("pieces_cut_fields", partial(in_pieces, sizes=(1, 12, 4, 7), rooms=(9, 1))),
    MemAttack("longer_than_it_need_be", long_chain),
    MemAttack("buffers_in_the_window", plugged_memory_as_buffers),
    MemAttack("full_ring_of_refusals", full_ring_of_refusals),
]
