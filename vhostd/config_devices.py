"""The tables of a VM's devices in the configuration: their keys, defaults and limits.

Tables in, frozen dataclasses out. Must not know other tables, nor touch what is described.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vhostd.config_reader import Mistakes, Table
from vhostd.devices.pmem import shared_memory_refusal
from vhostd.units import MiB, TiB

STATS_INTERVAL_MIN_S: Final = 0.1
"""Each request wakes the guest; more often than this it would be busy answering."""
STATS_INTERVAL_MAX_S: Final = 86400.0
MEM_BLOCK_SIZE_MIN: Final = 2 * MiB
"""A huge page of the host: a smaller block could get memory because of its neighbour's use."""
PMEM_ALIGNMENT: Final = 2 * MiB
"""Linux maps persistent memory in sections of this size."""
COLD_CACHE_MIN_S: Final = 1.0
COLD_CACHE_MAX_S: Final = 30 * 86400.0
NODE_MAX: Final = 1023
"""Linux's limit, CONFIG_NODES_SHIFT."""
GUEST_ADDRESS_MAX: Final = 1 << 52
DEVICE_SIZE_MAX: Final = 16 * TiB


@dataclass(frozen=True, slots=True)
class BalloonConfig:
    """[vm.NAME.balloon]; the meaning of the switches is in the device's BalloonOptions.

    Attributes:
        socket: absolute path; by default NAME-balloon.sock in the runtime directory.
        stats_interval_s: 0 asks only on request.
    """

    socket: Path
    free_page_reporting: bool = True
    free_page_hinting: bool = True
    deflate_on_oom: bool = True
    page_poison: bool = True
    packed: bool = True
    in_order: bool = True
    stats_interval_s: float = 5.0


@dataclass(frozen=True, slots=True)
class MemConfig:
    """One of [[vm.NAME.mem]]; sizes in bytes, multiples of block_size.

    Attributes:
        socket: absolute path; by default NAME-ID.sock in the runtime directory.
        window_address: guest-physical address of the VMM's hidden memory window.
        size: of the window.
        node: NUMA node in the guest; host_node: on the host, None: any.
        prealloc: allocate a block's memory before the guest may use it.
        on_violation: what to do about memory in unplugged blocks; "stop" needs the VM's qmp.
    """

    id: str
    socket: Path
    window_address: int
    size: int
    block_size: int = 2 * MiB
    requested_size: int = 0
    node: int = 0
    host_node: int | None = None
    prealloc: bool = False
    on_violation: str = "report"
    packed: bool = True
    in_order: bool = True


@dataclass(frozen=True, slots=True)
class PmemConfig:
    """One of [[vm.NAME.pmem]]; sizes in bytes.

    Attributes:
        socket: absolute path; by default NAME-ID.sock in the runtime directory.
        file: the raw image, or a block device; size: of it, as the guest sees it.
        mode: "shmem", or "window" with a window_address (guest-physical).
        node: NUMA node of the window in the guest.
        writeback_limit: begin to write to the disk when more than this is dirty; 0: the kernel's
            own habits.
        cold_cache_s: give back the page cache of an image nobody used for so long; 0: never.
        readahead: "normal" or "sequential".
    """

    id: str
    socket: Path
    file: Path
    size: int
    mode: str = "shmem"
    window_address: int = 0
    node: int = 0
    readonly: bool = False
    writeback_limit: int = 64 * MiB
    cold_cache_s: float = 0.0
    readahead: str = "normal"
    packed: bool = True
    in_order: bool = True


def read_balloon(table: Table, socket: Path) -> BalloonConfig:
    """[vm.NAME.balloon]."""
    default = BalloonConfig(socket)
    config = BalloonConfig(
        socket=socket,
        free_page_reporting=table.boolean("free_page_reporting", default.free_page_reporting),
        free_page_hinting=table.boolean("free_page_hinting", default.free_page_hinting),
        deflate_on_oom=table.boolean("deflate_on_oom", default.deflate_on_oom),
        page_poison=table.boolean("page_poison", default.page_poison),
        packed=table.boolean("packed", default.packed),
        in_order=table.boolean("in_order", default.in_order),
        stats_interval_s=table.number("stats_interval_s", default.stats_interval_s),
    )
    interval_s = config.stats_interval_s
    if interval_s and not STATS_INTERVAL_MIN_S <= interval_s <= STATS_INTERVAL_MAX_S:
        table.mistake(
            "stats_interval_s",
            f"{interval_s:g} is out of range; write 0 (only on request) or"
            f" {STATS_INTERVAL_MIN_S:g} to {STATS_INTERVAL_MAX_S:g} seconds",
        )
    table.end()
    return config


def _window(table: Table, alignment: int, *, required: bool) -> int:
    address = table.size("window_address", required=required)
    if address is not None and (address % alignment or not 0 < address < GUEST_ADDRESS_MAX):
        table.mistake(
            "window_address",
            f"{address:#x} must be a multiple of {alignment:#x}, above 0 and below 2^52,"
            " because the guest maps it in such blocks",
        )
    return address or 0


def _multiple(table: Table, key: str, size: int | None, alignment: int, smallest: int) -> None:
    if size is None:
        return
    if size % alignment or not smallest <= size <= DEVICE_SIZE_MAX:
        table.mistake(
            key, f"{size} must be a multiple of {alignment}, from {smallest} to {DEVICE_SIZE_MAX}"
        )


def read_mem(table: Table, identifier: str, socket: Path) -> MemConfig:
    """One of [[vm.NAME.mem]]; its id and socket are read already."""
    block_size = table.size("block_size", default=2 * MiB) or 0
    if block_size < MEM_BLOCK_SIZE_MIN or block_size & (block_size - 1):
        table.mistake(
            "block_size", f"{block_size} must be a power of two, {MEM_BLOCK_SIZE_MIN} or more"
        )
        block_size = 2 * MiB
    size = table.size("size", required=True)
    _multiple(table, "size", size, block_size, block_size)
    requested_size = table.size("requested_size", default=0)
    _multiple(table, "requested_size", requested_size, block_size, 0)
    if size is not None and requested_size is not None and requested_size > size:
        table.mistake("requested_size", f"{requested_size} is more than size, which is {size}")
    address = _window(table, block_size, required=True)
    default = MemConfig(identifier, socket, address, size or 0)
    return MemConfig(
        id=identifier,
        socket=socket,
        window_address=address,
        size=size or 0,
        block_size=block_size,
        requested_size=requested_size or 0,
        node=_node(table, "node") or 0,
        host_node=_node(table, "host_node"),
        prealloc=table.boolean("prealloc", default.prealloc),
        on_violation=table.choice("on_violation", ("report", "discard", "stop")) or "report",
        packed=table.boolean("packed", default.packed),
        in_order=table.boolean("in_order", default.in_order),
    )


def _node(table: Table, key: str) -> int | None:
    if key not in table:
        return None
    node = table.number(key, 0)
    if node != int(node) or not 0 <= node <= NODE_MAX:
        table.mistake(key, f"{node:g} is no NUMA node; write 0 to {NODE_MAX}")
        return 0
    return int(node)


def read_pmem(table: Table, identifier: str, socket: Path) -> PmemConfig:
    """One of [[vm.NAME.pmem]]; its id and socket are read already."""
    file = table.absolute_path("file", required=True)
    size = table.size("size", required=True)
    _multiple(table, "size", size, PMEM_ALIGNMENT, PMEM_ALIGNMENT)
    mode = table.choice("mode", ("shmem", "window")) or "shmem"
    if mode == "shmem" and size and not size % PMEM_ALIGNMENT:
        why = shared_memory_refusal(size, str(file))
        if why is not None:
            table.refusal("size", why)
    if mode == "shmem" and "window_address" in table:
        table.mistake("window_address", 'means nothing with mode = "shmem"; remove it')
    address = _window(table, PMEM_ALIGNMENT, required=mode == "window")
    default = PmemConfig(identifier, socket, file or Path("/"), size or 0)
    limit = table.size("writeback_limit", default=default.writeback_limit)
    cold_cache_s = table.number("cold_cache_s", default.cold_cache_s)
    if cold_cache_s and not COLD_CACHE_MIN_S <= cold_cache_s <= COLD_CACHE_MAX_S:
        table.mistake(
            "cold_cache_s",
            f"{cold_cache_s:g} is out of range; write 0 (never) or {COLD_CACHE_MIN_S:g} to"
            f" {COLD_CACHE_MAX_S:g} seconds",
        )
    return PmemConfig(
        id=identifier,
        socket=socket,
        file=default.file,
        size=default.size,
        mode=mode,
        window_address=address if mode == "window" else 0,
        node=_node(table, "node") or 0,
        readonly=table.boolean("readonly", default.readonly),
        writeback_limit=limit or 0,
        cold_cache_s=cold_cache_s,
        readahead=table.choice("readahead", ("normal", "sequential")) or default.readahead,
        packed=table.boolean("packed", default.packed),
        in_order=table.boolean("in_order", default.in_order),
    )


@dataclass(frozen=True, slots=True)
class WindowPlace:
    """A window of a VM: guest-physical address, bytes, and whose it is."""

    id: str
    address: int
    size: int


def check_overlap(table: Table, window: WindowPlace, others: Sequence[WindowPlace]) -> None:
    """No two windows of a VM may overlap."""
    for other in others:
        if (
            window.address < other.address + other.size
            and other.address < window.address + window.size
        ):
            table.mistake(
                "window_address",
                f"{window.address:#x} and size {window.size} overlap the window of {other.id}",
            )


def mem_from_options(
    program: str, identifier: str, socket: Path, options: Mapping[str, object]
) -> MemConfig:
    """A memory device from a command line; options are named as the table's keys, None = not given.

    Raises:
        ConfigError: some of them are wrong; all of those are named.
    """
    mistakes = Mistakes(program)
    given = {key: value for key, value in options.items() if value is not None}
    config = read_mem(Table(given, mistakes), identifier, socket)
    mistakes.raise_if_any(refusals=True)
    return config


def pmem_from_options(
    program: str, identifier: str, socket: Path, options: Mapping[str, object]
) -> PmemConfig:
    """A pmem device from a command line; options are named as the table's keys, None = not given.

    Raises:
        ConfigError: some of them are wrong; all of those are named.
    """
    mistakes = Mistakes(program)
    given = {key: value for key, value in options.items() if value is not None}
    config = read_pmem(Table(given, mistakes), identifier, socket)
    mistakes.raise_if_any(refusals=True)
    return config
