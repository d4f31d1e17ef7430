"""The fakes against the specifications' figures, and against a small back end of their own."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.balloon import BalloonDriver, BalloonQueue, pack_stats
from tests.fakes.driver import Buffer, InterruptMissing, QueueFull, RingOptions
from tests.fakes.loopback import Loopback
from tests.fakes.machine import Machine, Setup
from tests.fakes.memory import MIB, GuestMemory
from tests.fakes.messages import Request, WireRegion, memory_slot, vring_addr
from tests.fakes.packed import PackedQueue
from tests.fakes.split import SplitQueue

LAYOUTS = [
    Setup(packed=packed, event_idx=event_idx, indirect=indirect)
    for packed in (False, True)
    for event_idx in (False, True)
    for indirect in (False, True)
]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory.flat(16 * MIB) as ram:
        yield ram


@pytest.fixture(params=LAYOUTS, ids=lambda setup: setup.label)
def balloon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BalloonDriver]:
    backend = Loopback(tmp_path / "loop.sock")
    backend.start()
    with Machine.boot(tmp_path / "loop.sock", request.param) as machine:
        yield BalloonDriver(machine)
    backend.join(10)
    assert not backend.is_alive()


def test_memory_region_is_the_32_bytes_of_the_specification() -> None:
    region = WireRegion(0x1000, 0x2000, 0x7F00_0000_3000, 0x4000)

    assert memory_slot(region) == bytes.fromhex(
        "0000000000000000 0010000000000000 0020000000000000 003000 00007f0000 0040000000000000"
    )


def test_ring_addresses_are_sent_as_descriptor_used_available_log() -> None:
    assert vring_addr(1, 0xA, 0xB, 0xC, 1, 0xD) == struct.pack("=2I4Q", 1, 1, 0xA, 0xC, 0xB, 0xD)


def test_split_ring_holds_the_bytes_of_the_specification(memory: GuestMemory) -> None:
    queue = SplitQueue(memory, 4)
    queue.add_chain([Buffer(0x1_0000, 8)])
    queue.add_chain([Buffer(0x2_0000, 16), Buffer(0x3_0000, 32, writable=True)])

    assert memory.read(queue.parts.desc, 64) == b"".join(
        (
            struct.pack("<QIHH", 0x1_0000, 8, 0, 0),
            struct.pack("<QIHH", 0x2_0000, 16, 1, 2),
            struct.pack("<QIHH", 0x3_0000, 32, 2, 0),
            bytes(16),
        )
    )
    assert memory.read(queue.parts.avail, 14) == struct.pack("<7H", 0, 2, 0, 1, 0, 0, 0)
    queue.close()


def test_packed_ring_holds_the_bytes_of_the_specification(memory: GuestMemory) -> None:
    queue = PackedQueue(memory, 4)
    queue.add_chain([Buffer(0x1_0000, 8)])
    queue.add_chain([Buffer(0x2_0000, 16), Buffer(0x3_0000, 32, writable=True)])

    assert memory.read(queue.parts.desc, 64) == b"".join(
        (
            struct.pack("<QIHH", 0x1_0000, 8, 0, 0x80),
            struct.pack("<QIHH", 0x2_0000, 16, 1, 0x81),
            struct.pack("<QIHH", 0x3_0000, 32, 1, 0x82),
            bytes(16),
        )
    )
    queue.close()


def test_packed_ring_turns_its_flags_over_when_it_wraps(memory: GuestMemory) -> None:
    queue = PackedQueue(memory, 2)
    for token in (0, 1):
        queue.add_chain([Buffer(0x1_0000, 8)])
        memory.write_number(queue.parts.desc + 16 * token + 14, 0x8080, 2)  # the device used it
    assert [used.token for used in queue.collect()] == [0, 1]

    queue.add_chain([Buffer(0x1_0000, 8)])

    assert queue.read_flags(0) == 0x8000  # available in a round whose wrap counter is 0
    assert not queue.collect()
    queue.close()


def test_split_indirect_table_is_linked_and_packed_one_is_not(memory: GuestMemory) -> None:
    chain = [Buffer(0x1_0000, 8), Buffer(0x2_0000, 16, writable=True)]
    split, packed = SplitQueue(memory, 4), PackedQueue(memory, 4)
    split.add_chain(chain, indirect=True)
    packed.add_chain(chain, indirect=True)

    table, size, flags, _ = struct.unpack("<QIHH", memory.read(split.parts.desc, 16))
    assert (size, flags) == (32, 4)
    assert memory.read(table, 32) == struct.pack("<QIHHQIHH", 0x1_0000, 8, 1, 1, 0x2_0000, 16, 2, 0)
    table, size, _, flags = struct.unpack("<QIHH", memory.read(packed.parts.desc, 16))
    assert (size, flags) == (32, 0x84)
    assert memory.read(table, 32) == struct.pack("<QIHHQIHH", 0x1_0000, 8, 0, 0, 0x2_0000, 16, 0, 2)
    split.close()
    packed.close()


def test_split_event_index_sits_behind_the_rings(memory: GuestMemory) -> None:
    queue = SplitQueue(memory, 4, RingOptions(event_idx=True))
    queue.collect()
    assert memory.read_number(queue.parts.avail + 4 + 8, 2) == 0
    memory.write_number(queue.parts.used + 4 + 32, 1, 2)  # avail_event: tell me of entry 1

    queue.add_chain([Buffer(0x1_0000, 8)])
    assert not queue.kick_wanted()
    queue.add_chain([Buffer(0x1_0000, 8)])
    assert queue.kick_wanted()
    queue.close()


def test_unpublished_chains_are_invisible_until_published(memory: GuestMemory) -> None:
    split, packed = SplitQueue(memory, 4), PackedQueue(memory, 4)
    for queue in (split, packed):
        queue.add_chain([Buffer(0x1_0000, 8)], publish=False)
        queue.add_chain([Buffer(0x1_0000, 8)], publish=False)
    assert memory.read_number(split.parts.avail + 2, 2) == 0
    assert packed.read_flags(0) == 0x8000

    split.publish()
    packed.publish()

    assert memory.read_number(split.parts.avail + 2, 2) == 2
    assert packed.read_flags(0) == 0x80
    split.close()
    packed.close()


def test_full_ring_is_reported(memory: GuestMemory) -> None:
    for queue in (SplitQueue(memory, 2), PackedQueue(memory, 2)):
        with pytest.raises(QueueFull):
            queue.add_chain([Buffer(0, 1)] * 3)
        queue.close()


def test_buffers_that_come_back_without_a_call_are_noticed(memory: GuestMemory) -> None:
    queue = PackedQueue(memory, 2)
    queue.add_chain([Buffer(0x1_0000, 8)])
    os.eventfd_write(queue.call_fd, 1)
    memory.write_number(queue.parts.desc + 14, 0x8080, 2)
    assert queue.wait_used()
    queue.calls()

    queue.add_chain([Buffer(0x1_0000, 8)])
    queue._pending.clear()
    with pytest.raises(TimeoutError):
        queue.wait_used(timeout_s=0.01)

    class Late(PackedQueue):
        def collect(self) -> list:  # type: ignore[type-arg]
            found, self.looked = super().collect() if self.looked else [], True
            return found

        looked = False

    late = Late(memory, 2)
    late.add_chain([Buffer(0x1_0000, 8)])
    memory.write_number(late.parts.desc + 14, 0x8080, 2)
    with pytest.raises(InterruptMissing):
        late.wait_used(timeout_s=0.01)
    queue.close()
    late.close()


def test_inflated_pages_are_gone_from_the_file(balloon: BalloonDriver) -> None:
    memory = balloon.machine.memory
    memory.touch(16 * MIB, 2 * MIB)
    assert memory.pages_present(16 * MIB, 512) == 512

    assert balloon.inflate(range(4096, 4096 + 256)).written == 0

    assert memory.pages_present(16 * MIB, 256) == 0
    assert memory.pages_present(17 * MIB, 256) == 256


def test_rings_keep_going_round(balloon: BalloonDriver) -> None:
    memory = balloon.machine.memory
    for turn in range(400):  # three times round a ring of 128
        memory.touch(16 * MIB, 4096, turn & 0xFF)
        balloon.inflate([4096])
        assert not memory.page_present(16 * MIB)


def test_reported_blocks_are_gone_from_the_file(balloon: BalloonDriver) -> None:
    memory = balloon.machine.memory
    memory.touch(16 * MIB, 4 * MIB)
    before = memory.blocks()

    balloon.report([(16 * MIB, MIB), (18 * MIB, MIB)])

    assert before - memory.blocks() == 2 * MIB
    assert memory.page_present(17 * MIB)


def test_indirect_chains_arrive(balloon: BalloonDriver) -> None:
    if not balloon.machine.setup.indirect:
        pytest.skip("not negotiated")
    balloon.machine.memory.touch(16 * MIB, 4096)
    balloon.send(BalloonQueue.INFLATE, struct.pack("<I", 4096), indirect=True)
    balloon.queue(BalloonQueue.INFLATE).wait_used()

    assert not balloon.machine.memory.page_present(16 * MIB)


def test_actual_is_written_as_qemu_forwards_it(balloon: BalloonDriver) -> None:
    balloon.write_actual(77)

    assert balloon.config().actual == 77


def test_stop_and_start_go_on_where_the_rings_stood(balloon: BalloonDriver) -> None:
    balloon.inflate([4096])
    balloon.machine.stop()
    balloon.machine.start(with_memory=False)
    balloon.machine.memory.touch(16 * MIB, 4096)
    balloon.inflate([4096])

    assert not balloon.machine.memory.page_present(16 * MIB)


def test_statistics_are_ten_byte_entries() -> None:
    assert pack_stats({4: 1}) == bytes.fromhex("0400 0100000000000000")


def test_handshake_has_qemus_order(tmp_path: Path) -> None:
    backend = Loopback(tmp_path / "loop.sock")
    backend.start()
    with Machine.boot(tmp_path / "loop.sock", Setup(queue_count=1)):
        pass
    backend.join(10)

    assert [Request(number).name for number in backend.seen] == [
        *("GET_FEATURES", "GET_PROTOCOL_FEATURES", "SET_PROTOCOL_FEATURES", "GET_QUEUE_NUM"),
        *("GET_MAX_MEM_SLOTS", "SET_BACKEND_REQ_FD", "SET_OWNER", "GET_FEATURES"),
        *("SET_VRING_CALL", "SET_VRING_ERR", "GET_CONFIG"),
        *("SET_FEATURES", "GET_STATUS", "SET_STATUS", "ADD_MEM_REG"),
        *("SET_VRING_NUM", "SET_VRING_BASE", "SET_VRING_ADDR", "SET_VRING_KICK"),
        *("SET_VRING_CALL", "SET_VRING_ENABLE", "SET_VRING_CALL", "GET_CONFIG"),
    ]


def test_memory_shapes_translate_across_their_seams() -> None:
    with GuestMemory.with_hole() as memory, pytest.raises(KeyError):
        memory.region_of(40 * MIB)
    with GuestMemory.adjacent() as memory:
        assert memory.file_offset(32 * MIB - 1) == 64 * MIB - 1
        assert memory.file_offset(32 * MIB) == 0
