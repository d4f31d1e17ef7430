"""H102, H103: requests a persistent memory device must not fall for.

What matters of them: an answer of 0 only after a sync, -1 for what is no flush, nothing written
where nothing may be, and no byte of the image ever touched.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tests.fakes.driver import Buffer
from tests.hostile.attack import DEADLINE_S
from tests.hostile.pmem_machine import (
    DONE,
    FAILED,
    FLUSH,
    IMAGE_ADDRESS,
    IMAGE_SIZE,
    RESPONSE_SIZE,
    UNTOUCHED,
    PmemDriver,
    serves,
)

UNKNOWN_TYPES = (1, 2, 0x100, 0x1_0000, 0x8000_0000, 0xFFFF_FFFF)
SHORT_SIZES = (1, 2, 3)
IMAGE_END = IMAGE_ADDRESS + IMAGE_SIZE
MANY = 1000
KEPT = bytes([UNTOUCHED])

BAD_ADDRESSES = {
    "image_start": IMAGE_ADDRESS,
    "image_middle": IMAGE_ADDRESS + IMAGE_SIZE // 2,
    "image_last_bytes": IMAGE_END - 4,
    "over_the_image_s_end": IMAGE_END - 2,
    "behind_the_image": IMAGE_END,
    "into_the_image_from_below": IMAGE_ADDRESS - 2,
    "nowhere": 1 << 40,
    "last_address": (1 << 64) - 4,
    "wraps": (1 << 64) - 2,
}


@dataclass(frozen=True)
class PmemAttack:
    """act() does it to a running device and checks what it is told."""

    name: str
    act: Callable[[PmemDriver], None]
    quarantines: bool = False


def strike(attack: PmemAttack, guest: PmemDriver) -> None:
    """Do it once; the device serves afterwards, and asked the VMM for nothing."""
    attack.act(guest)
    if attack.quarantines:
        assert guest.queue.wait_err(DEADLINE_S), "the queue was not reported broken"
        guest.machine.restart_ring(0)
    serves(guest)


def fails(guest: PmemDriver, pieces: tuple[bytes, ...]) -> None:
    """It is told -1."""
    assert guest.exchange(pieces) == (RESPONSE_SIZE, FAILED)


def comes_back_unused(guest: PmemDriver, rooms: tuple[int, ...]) -> None:
    """A flush whose answer has no room is given back with not a byte written."""
    assert guest.exchange(rooms=rooms) == (0, KEPT * sum(rooms))


def in_pieces(guest: PmemDriver, pieces: tuple[bytes, ...], rooms: tuple[int, ...]) -> None:
    """A legal flush in an odd shape is done, and only four bytes are written."""
    content = DONE + KEPT * (sum(rooms) - RESPONSE_SIZE)
    assert guest.exchange(pieces, rooms) == (RESPONSE_SIZE, content)


def room_before_request(guest: PmemDriver) -> None:
    """The writable part comes first, which no virtio request may do."""
    memory = guest.machine.memory
    posted = guest.post(now=False)
    at = posted.rooms[0].guest_addr
    guest.queue.publish()
    guest.queue.notify()
    guest.queue.wait_used()
    memory.write(at, FLUSH)
    guest.queue.add_chain([Buffer(at + 8, RESPONSE_SIZE, writable=True), Buffer(at, 4)])
    guest.queue.notify()


def misaddressed(guest: PmemDriver, address: int, *, response: bool) -> None:
    """Request or response lies where the device may not look; the image is not its memory."""
    good = guest.machine.memory.regions[0].guest_addr + (2 << 20)
    guest.machine.memory.write(good, FLUSH)
    request, room = (good, address) if response else (address, good + 8)
    guest.queue.add_chain([Buffer(request, 4), Buffer(room, RESPONSE_SIZE, writable=True)])
    guest.queue.notify()


def many_flushes(guest: PmemDriver) -> None:
    """A thousand, as many at once as the ring takes."""
    left = MANY
    while left:
        count = min(left, guest.most_at_once)
        guest.flush_many(count)
        left -= count


def full_ring(guest: PmemDriver, pieces: tuple[bytes, ...], room: int, written: int) -> None:
    """As many wrong requests at once as the ring takes."""
    for _ in range(guest.most_at_once):
        guest.post(pieces, (room,), now=False)
    guest.queue.publish()
    guest.queue.notify()
    used = guest.queue.wait_used(guest.most_at_once)
    assert {one.written for one in used} == {written}


def good_among_bad(guest: PmemDriver) -> None:
    """Their answers come back in the order of the requests."""
    shapes = [((b"\7\0\0\0",), 4, FAILED), ((FLUSH,), 3, KEPT * 3), ((FLUSH,), 4, DONE)] * 3
    posted = [guest.post(pieces, (room,), now=False) for pieces, room, _ in shapes]
    guest.queue.publish()
    guest.queue.notify()
    used = guest.queue.wait_used(len(posted))
    assert [one.token for one in used] == [one.token for one in posted]
    assert [guest.content(one) for one in posted] == [content for _, _, content in shapes]


ATTACKS = [
    *(
        PmemAttack(f"type_{kind:#x}", partial(fails, pieces=(struct.pack("<I", kind),)))
        for kind in UNKNOWN_TYPES
    ),
    *(
        PmemAttack(f"request_{size}_bytes", partial(fails, pieces=(FLUSH[:size],)))
        for size in SHORT_SIZES
    ),
    PmemAttack("no_request", partial(fails, pieces=())),
    *(
        PmemAttack(f"response_{name}", partial(comes_back_unused, rooms=rooms))
        for name, rooms in {
            "none": (),
            "1_byte": (1,),
            "3_bytes": (3,),
            "3_bytes_in_pieces": (1, 1, 1),
        }.items()
    ),
    PmemAttack("pieces_of_1_byte", partial(in_pieces, pieces=(b"\0",) * 4, rooms=(1,) * 7)),
    PmemAttack(
        "longer_than_it_need_be", partial(in_pieces, pieces=(FLUSH + b"\xff" * 6000,), rooms=(99,))
    ),
    PmemAttack(
        "much_behind_the_request",
        partial(in_pieces, pieces=(b"\0\0", b"\0\0" + b"\xff" * 4096), rooms=(3, 2000)),
    ),
    PmemAttack("response_before_request", room_before_request, quarantines=True),
    *(
        PmemAttack(
            f"{'response' if response else 'request'}_{name}",
            partial(misaddressed, address=address, response=response),
            quarantines=True,
        )
        for name, address in BAD_ADDRESSES.items()
        for response in (False, True)
    ),
    PmemAttack("thousand_flushes", many_flushes),
    PmemAttack(
        "full_ring_of_unknown_types",
        partial(full_ring, pieces=(b"\1\0\0\0",), room=4, written=4),
    ),
    PmemAttack("full_ring_without_room", partial(full_ring, pieces=(FLUSH,), room=1, written=0)),
    PmemAttack("good_among_bad", good_among_bad),
]
