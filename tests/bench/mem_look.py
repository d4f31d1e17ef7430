"""What it costs to look for memory in unplugged blocks, against nothing but lseek(2).

The daemon's own search through windows in which there is nothing to find, as on almost every look.
Every other block unplugged is the worst a guest can do. Must not know how it searches.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from vhostd._native import Mapping
from vhostd.backend.window import _memory_by_block
from vhostd.devices.base import GuestRange
from vhostd.devices.mem_blocks import BlockSet
from vhostd.devices.mem_window import MemOptions
from vhostd.units import BALLOON_PAGE_SIZE, GiB

from tests.bench.figures import BenchFailed, Findings, Row, Spread
from tests.fakes.memory import open_memfd

OPTIONS: Final = MemOptions("mem0", address=0x1_4000_0000, size=16 * GiB)
ROUND_S: Final = 0.02
BLOCKS: Final = OPTIONS.block_count
PLUGGED: Final = {
    "empty": range(0),
    "half plugged": range(BLOCKS // 2),
    "every other block plugged": range(0, BLOCKS, 2),
}


@dataclass(frozen=True)
class Window:
    """A memory file in which every plugged block has a page, and no other block any."""

    fd: int
    mapping: Mapping
    unplugged: Sequence[GuestRange]

    def look(self) -> dict[int, int]:
        """As the daemon does."""
        return _memory_by_block(self.mapping, 0, OPTIONS, self.unplugged)

    def seek(self) -> None:
        """The one system call each range needs."""
        for part in self.unplugged:
            try:
                os.lseek(self.fd, part.guest_addr - OPTIONS.address, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise

    def put_page(self, block: int) -> None:
        """Give a block memory."""
        os.pwrite(self.fd, b"x", block * OPTIONS.block_size)


@contextmanager
def window(plugged: Sequence[int]) -> Iterator[Window]:
    blocks = BlockSet(BLOCKS)
    for block in plugged:
        blocks.add(block, 1)
    unplugged = [OPTIONS.range(run) for run in blocks.runs(inside=False)]
    fd = open_memfd(OPTIONS.size)
    mapping = Mapping(fd)
    try:
        result = Window(fd, mapping, unplugged)
        for block in plugged:
            result.put_page(block)
        yield result
    finally:
        mapping.close()
        os.close(fd)


def check(window: Window) -> None:
    """Insist that a look finds memory where it may not be, and none elsewhere."""
    if window.look():
        raise BenchFailed("a look found memory in blocks that have none")
    window.put_page(BLOCKS - 1)
    if window.look() != {BLOCKS - 1: BALLOON_PAGE_SIZE}:
        raise BenchFailed("a look did not find the one page in an unplugged block")
    window.mapping.discard((BLOCKS - 1) * OPTIONS.block_size, OPTIONS.block_size)


def _seconds(run: Callable[[], object], rounds: int) -> float:
    started = time.perf_counter()
    for _ in range(rounds):
        run()
    return (time.perf_counter() - started) / rounds


def measure(repeats: int, findings: Findings) -> None:
    """`repeats` times looks at each window, and add rows to findings."""
    gib = OPTIONS.size // GiB
    for name, plugged in PLUGGED.items():
        with window(plugged) as found:
            check(found)
            rounds = max(1, int(ROUND_S / _seconds(found.look, 1)))
            looks, seeks = list[float](), list[float]()
            for _ in range(repeats):
                looks.append(_seconds(found.look, rounds) / gib)
                seeks.append(_seconds(found.seek, rounds) / gib)
        what = f"mem look, {gib} GiB {name}: time per GiB"
        findings.samples |= {f"{what}, vhostd, s": looks, f"{what}, lseek, s": seeks}
        mine, other = Spread.of(looks).median * 1e6, Spread.of(seeks).median * 1e6
        texts = (f"{mine:.2f} µs", f"{other:.2f} µs bare lseek")
        findings.rows.append(Row(what, *texts, Spread.of_ratios(looks, seeks)))
