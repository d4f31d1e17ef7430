"""Payload layouts against hand-packed bytes, and values no state can make legal."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vhostd.errors import FrontendError
from vhostd.protocol import wire

from tests.fakes import messages

TOP = 1 << 64
u32s = st.integers(0, 2**32 - 1)
u64s = st.integers(0, 2**64 - 1)


def test_a_ring_address_is_read_in_the_order_of_the_specification() -> None:
    told = wire.VringAddr.parse(messages.vring_addr(7, desc=1, avail=2, used=3, flags=1, log=4))

    assert (told.index, told.desc, told.avail, told.used, told.log) == (7, 1, 2, 3, 4)
    assert told.flags == wire.VringFlag.LOG


def test_a_memory_slot_is_read_behind_its_padding() -> None:
    region = messages.WireRegion(0x1000, 0x2000, 0x3000, 0x4000)

    told = wire.MemorySlot.parse(messages.memory_slot(region)).region

    assert told == wire.MemoryRegion(0x1000, 0x2000, 0x3000, 0x4000)


@given(st.lists(st.tuples(u64s, u64s, u64s, u64s), min_size=1, max_size=8))
def test_a_memory_table_holds_legal_regions_only(rows: list[tuple[int, int, int, int]]) -> None:
    """H35, H37, H38: empty and wrapping regions do not exist as values."""
    payload = messages.memory_table([messages.WireRegion(*row) for row in rows])
    legal = all(
        size > 0 and max(guest, frontend, offset) + size <= TOP
        for guest, size, frontend, offset in rows
    )
    if not legal:
        with pytest.raises(FrontendError):
            wire.MemoryTable.parse(payload)
        return
    told = wire.MemoryTable.parse(payload).regions
    assert [(r.guest_addr, r.size, r.frontend_addr, r.file_offset) for r in told] == rows


@pytest.mark.parametrize("count", [0, 3, 9, 0x8000_0000, 0xFFFF_FFFF])
def test_a_memory_table_that_miscounts_is_refused(count: int) -> None:
    """H34."""
    region = messages.WireRegion(0, 4096, 0, 0)

    with pytest.raises(FrontendError):
        wire.MemoryTable.parse(messages.memory_table([region, region], count))


def test_a_memory_table_may_have_room_for_more_regions() -> None:
    """virtio_uml's struct has room for two."""
    region = messages.WireRegion(0, 4096, 0, 0)
    payload = messages.memory_table([region, messages.WireRegion(0, 0, 0, 0)], 1)

    assert len(payload) == 72
    assert wire.MemoryTable.parse(payload) == wire.MemoryTable((wire.MemoryRegion(0, 4096, 0, 0),))


def test_a_region_may_end_where_its_address_space_does() -> None:
    wire.MemoryRegion(TOP - 4096, 4096, TOP - 4096, TOP - 4096)
    wire.MemoryRegion(0, TOP, 0, 0)


@given(u32s, u32s, st.binary(max_size=300), u32s)
def test_config_space_windows_are_exact(offset: int, size: int, content: bytes, flags: int) -> None:
    """H97: what is claimed is what is there, and inside the 256 bytes there can be."""
    payload = messages.config(offset, content, flags, size)
    if size != len(content) or not 0 < size <= 256 - offset:
        with pytest.raises(FrontendError):
            wire.ConfigSpace.parse(payload)
        return
    window = wire.ConfigSpace.parse(payload)
    assert (window.offset, window.content, window.flags) == (offset, content, flags)
    assert window.pack() == payload


@given(u64s)
def test_a_ring_file_names_one_ring_and_nothing_else(value: int) -> None:
    if value > 0x1FF:
        with pytest.raises(FrontendError):
            wire.VringFile.parse(messages.u64(value))
        return
    told = wire.VringFile.parse(messages.u64(value))
    assert told == wire.VringFile(value & 0xFF, not value & messages.VRING_NO_FD)


@pytest.mark.parametrize("flags", [2, 3, 0x8000_0000])
def test_ring_address_flags_without_meaning_are_refused(flags: int) -> None:
    with pytest.raises(FrontendError):
        wire.VringAddr.parse(messages.vring_addr(0, 0, 0, 0, flags))


@pytest.mark.parametrize("padding", [b"", b"\0" * 4])
def test_inflight_is_read_with_and_without_c_padding(padding: bytes) -> None:
    told = wire.Inflight.parse(messages.inflight(1, 2, 3, 4) + padding)

    assert (told.mmap_size, told.file_offset, told.queue_count, told.queue_size) == (1, 2, 3, 4)


@pytest.mark.parametrize(("size", "offset"), [(0, 0), (TOP - 1, 2), (4096, TOP - 1)])
def test_a_log_that_wraps_or_is_empty_is_refused(size: int, offset: int) -> None:
    """H68."""
    with pytest.raises(FrontendError):
        wire.Log.parse(messages.log(size, offset))


@pytest.mark.parametrize(("direction", "phase"), [(2, 0), (7, 7), (0, 1)])
def test_device_state_without_meaning_is_refused(direction: int, phase: int) -> None:
    """H69."""
    with pytest.raises(FrontendError):
        wire.DeviceState.parse(messages.device_state(direction, phase))


def test_shared_memory_messages_have_the_layout_qemu_was_seen_to_use() -> None:
    mapping = wire.ShmemMapping(3, 0x1000, 0x2000, 0x3000, wire.ShmemMapping.WRITABLE)
    assert mapping.pack() == struct.pack("=B7x4Q", 3, 0x1000, 0x2000, 0x3000, 1)

    count, sizes = messages.unpack_shmem_config(wire.ShmemConfig((1 << 30, 4096)).pack())
    assert (count, sizes[:3], len(sizes)) == (2, (1 << 30, 4096, 0), 256)


@pytest.mark.parametrize("shape", [wire.U64, wire.VringState, wire.VringAddr, wire.Log, wire.Iotlb])
@given(data=st.data())
def test_packing_undoes_parsing(shape: type[wire.Payload], data: st.DataObject) -> None:
    payload = data.draw(st.binary(min_size=shape.LAYOUT.size, max_size=shape.LAYOUT.size))
    try:
        value = shape.parse(payload)
    except FrontendError:
        return
    padding = 6 if shape is wire.Iotlb else 0
    assert value.pack()[: len(payload) - padding] == payload[: len(payload) - padding]
