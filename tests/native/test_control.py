"""Chains through Python: up in ring order, back in ring order, and again after a stop."""

from __future__ import annotations

import errno

import pytest
from vhostd._native import Chain, Event, Handler

from tests.fakes.driver import Buffer
from tests.fakes.memory import PAGE_SIZE, GuestMemory
from tests.native.rig import DATA_ADDR, LAYOUTS, Guest, Host, Layout, Ring, wait_until

INBOX_CHAINS = 64
READABLE_MAX = 4096
ANSWER_MAX = 256
SIZE = 16


def numbered(ring: Ring, numbers: range) -> None:
    """Send chains whose content is their number, with one kick."""
    for number in numbers:
        ring.driver.add_chain(ring.buffers(bytes([number])), publish=False)
    ring.driver.publish()
    ring.driver.kick()


def take(ring: Ring, count: int) -> list[Chain]:
    """Take chains as they are handed up."""
    taken: list[Chain] = []
    while len(taken) < count:
        chain = ring.device.take_chain(ring.index)
        if chain is None:
            ring.host.wait_event(ring.device, Event.CHAINS)
        else:
            taken.append(chain)
    return taken


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_chains_come_up_in_order_and_leave_in_order(host: Host, layout: Layout) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.CONTROL, layout)
        numbered(ring, range(4))
        chains = take(ring, 4)
        assert [chain.data for chain in chains] == [b"\x00", b"\x01", b"\x02", b"\x03"]
        for chain in (chains[2], chains[1], chains[3]):
            guest.device.complete_chain(0, chain.token)
        assert ring.driver.collect() == []
        assert guest.device.ring_statistics(0).position.next_avail == 0
        guest.device.complete_chain(0, chains[0].token)
        used = ring.driver.wait_used(4)
        assert [entry.token for entry in used] == [0, 1, 2, 3]
        wait_until(lambda: guest.device.ring_statistics(0).position.next_avail == 4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_chains_not_completed_come_again_after_a_stop(host: Host, layout: Layout) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.CONTROL, layout)
        numbered(ring, range(5))
        chains = take(ring, 4)
        for chain in (chains[0], chains[2]):
            guest.device.complete_chain(0, chain.token)
        ring.driver.wait_used(1)
        position = ring.stop()
        assert (position.next_avail, position.next_used) == (1, 1)
        with pytest.raises(OSError, match="chain") as refused:
            guest.device.complete_chain(0, chains[1].token)
        assert refused.value.errno == errno.ESTALE
        assert guest.device.take_chain(0) is None
        ring.start(position)
        again = take(ring, 4)
        assert [chain.data for chain in again] == [b"\x01", b"\x02", b"\x03", b"\x04"]
        assert [chain.position for chain in again[:3]] == [chain.position for chain in chains[1:]]
        for chain in again:
            guest.device.complete_chain(0, chain.token)
        assert [used.token for used in ring.driver.wait_used(4)] == [1, 2, 3, 4]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_two_chains_have_the_same_position(host: Host, layout: Layout) -> None:
    """Whatever round of the ring, and whatever start of it, they are of."""
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.CONTROL, layout, SIZE)
        positions = []
        for at in range(3 * SIZE + 1):
            numbered(ring, range(at, at + 1))
            (chain,) = take(ring, 1)
            positions.append(chain.position)
            guest.device.complete_chain(0, chain.token)
            ring.driver.wait_used(1)
            if at % SIZE == 5:
                ring.start(ring.stop())
        assert len(set(positions)) == len(positions)
        assert [position & 0xFFFF for position in positions] == list(range(3 * SIZE + 1))


def test_a_chain_is_completed_only_once_and_only_when_taken(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.CONTROL)
        numbered(ring, range(2))
        (chain,) = take(ring, 1)
        with pytest.raises(OSError, match="chain") as refused:
            guest.device.complete_chain(0, chain.token + 1)
        assert refused.value.errno == errno.ESTALE
        guest.device.complete_chain(0, chain.token)
        ring.driver.wait_used(1)
        with pytest.raises(OSError, match="chain") as refused:
            guest.device.complete_chain(0, chain.token)
        assert refused.value.errno == errno.ESTALE


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_inbox_holds_64_chains_and_goes_on_when_there_is_room(
    host: Host, layout: Layout
) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.CONTROL, layout)
        numbered(ring, range(100))
        wait_until(lambda: guest.device.ring_statistics(0).chains == INBOX_CHAINS)
        with host.parked():  # it found no more room, and does not go round for it
            assert guest.device.ring_statistics(0).chains == INBOX_CHAINS
        for number in range(100):
            (chain,) = take(ring, 1)
            assert chain.data == bytes([number])
            guest.device.complete_chain(0, chain.token)
        assert len(ring.driver.wait_used(100)) == 100


def test_a_full_inbox_does_not_spin(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.CONTROL)
        numbered(ring, range(100))
        wait_until(lambda: guest.device.ring_statistics(0).chains == INBOX_CHAINS)
        with host.parked():
            rounds = host.worker.rounds
        ring.driver.kick()
        wait_until(lambda: host.worker.rounds > rounds)
        with host.parked():
            assert host.worker.rounds <= rounds + 6


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_an_answer_is_cut_along_the_writable_descriptors(host: Host, packed: bool) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.CONTROL, Layout(packed))
        guest.memory.touch(DATA_ADDR, PAGE_SIZE, fill=0x11)
        pieces = [Buffer(DATA_ADDR + at, size, True) for at, size in ((0, 1), (10, 4), (20, 9))]
        ring.driver.add_chain([*ring.buffers(b"ask"), *pieces])
        ring.driver.notify()
        (chain,) = take(ring, 1)
        assert (chain.data, chain.writable_count, chain.writable_size) == (b"ask", 3, 14)
        assert chain.writable_addr == DATA_ADDR
        guest.device.complete_chain(0, chain.token, b"ABCDEFGH")
        (used,) = ring.driver.wait_used()
        assert used.written == 8
        expected = b"A" + b"\x11" * 9 + b"BCDE" + b"\x11" * 6 + b"FGH" + b"\x11" * 7
        assert guest.memory.read(DATA_ADDR, 30) == expected


def test_an_answer_longer_than_the_chain_is_cut(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.CONTROL)
        guest.memory.touch(DATA_ADDR, PAGE_SIZE, fill=0x11)
        ring.driver.add_chain([Buffer(DATA_ADDR, 2, True)])
        ring.driver.notify()
        (chain,) = take(ring, 1)
        with pytest.raises(OSError, match="chain") as refused:
            guest.device.complete_chain(0, chain.token, bytes(ANSWER_MAX + 1))
        assert refused.value.errno == errno.EINVAL
        guest.device.complete_chain(0, chain.token, b"ABCD")
        assert ring.driver.wait_used()[0].written == 2
        assert guest.memory.read(DATA_ADDR, 4) == b"AB\x11\x11"


def test_bytes_beyond_4096_are_counted_only(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.CONTROL)
        content = bytes(range(256)) * 17
        ring.driver.add_chain(ring.buffers(content[:100], content[100:]))
        ring.driver.notify()
        (chain,) = take(ring, 1)
        assert chain.data == content[:READABLE_MAX]
        assert chain.readable_size == len(content)


def test_blocks_need_not_lie_in_guest_memory(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.CONTROL_BLOCKS)
        ring.driver.add_chain([Buffer(1 << 40, 1 << 31, True), Buffer(1 << 41, 1 << 31, True)])
        ring.driver.notify()
        (chain,) = take(ring, 1)
        assert (chain.writable_addr, chain.writable_size) == (1 << 40, 1 << 32)
        guest.device.complete_chain(0, chain.token)
        assert ring.driver.wait_used()[0].written == 0


def test_a_ring_nobody_serves_waits_for_its_handler(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.NONE)
        numbered(ring, range(2))
        with host.parked():
            assert guest.device.ring_statistics(0).chains == 0
            guest.device.set_handler(0, Handler.CONTROL)
        assert [chain.data for chain in take(ring, 2)] == [b"\x00", b"\x01"]


def test_completions_while_parked_are_delivered_afterwards(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.CONTROL)
        numbered(ring, range(3))
        chains = take(ring, 3)
        with host.parked():
            for chain in chains:
                guest.device.complete_chain(0, chain.token)
            assert ring.driver.collect() == []
        assert len(ring.driver.wait_used(3)) == 3
