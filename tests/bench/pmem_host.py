"""What a sync costs the host alone: of a clean file, and of one dirtied through a mapping.

Must not know a guest.
"""

from __future__ import annotations

import mmap
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vhostd.units import MiB

from tests.bench.figures import BenchFailed, at_rank
from tests.fakes.memory import PAGE_SIZE

SCRATCH_SIZE: Final = 8 * MiB


@dataclass(frozen=True)
class Ranks:
    """Of the syncs of one turn, in µs."""

    p50: float
    p99: float

    @classmethod
    def of(cls, times_us: Sequence[float]) -> Ranks:
        """Sum up."""
        return cls(at_rank(times_us, 0.5), at_rank(times_us, 0.99))


@dataclass
class Scratch:
    """A file and a mapping of it, and what syncs of it took after a page was dirtied."""

    fd: int
    mapping: mmap.mmap
    dirtied: list[Ranks] = field(default_factory=list)

    def turn(self, count: int) -> None:
        """Dirty a page and sync, so often."""
        times_us = []
        for _ in range(count):
            self.mapping[random.randrange(SCRATCH_SIZE)] ^= 1
            times_us.append(_timed_us(lambda: os.fdatasync(self.fd)))
        self.dirtied.append(Ranks.of(times_us))


@dataclass
class HostSyncs:
    """Made by host_syncs().

    Attributes:
        clean: of a file nobody has written to; one entry a turn.
        pages: a file whose page cache is single pages; folios: one in which it is large folios.
    """

    pages: Scratch
    folios: Scratch
    clean: list[Ranks] = field(default_factory=list)

    def turn(self, image: Path, count: int) -> None:
        """`count` syncs of the clean image, and of each of the scratch files beside it."""
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.clean.append(Ranks.of([_timed_us(lambda: os.fdatasync(fd)) for _ in range(count)]))
        finally:
            os.close(fd)
        self.pages.turn(count)
        self.folios.turn(count)


def file_system(folder: Path) -> str:
    """The kind of file system a folder is on, such as "ext4"."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == number:
            return fields[fields.index("-") + 1]
    return "an unknown file system"


def _timed_us(work: Callable[[], None]) -> float:
    started_ns = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - started_ns) / 1000


def write_all(fd: int, size: int, part: int) -> None:
    """Fill a file with zeroes and make it durable.

    part: of each write. File systems with large folios cache that much in one, and Linux 6.18
    writes all of a folio to the disk when a mapping dirties one page of it.
    """
    content = bytes(part)
    for _ in range(size // part):
        if os.write(fd, content) != part:
            raise BenchFailed("no room for the images")
    os.fsync(fd)


@contextmanager
def _scratch(folder: Path, part: int) -> Iterator[Scratch]:
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        write_all(file.fileno(), SCRATCH_SIZE, part)
        with mmap.mmap(file.fileno(), SCRATCH_SIZE) as mapping:
            yield Scratch(file.fileno(), mapping)


@contextmanager
def host_syncs(folder: Path) -> Iterator[HostSyncs]:
    """With scratch files in folder of which every block is written."""
    with _scratch(folder, PAGE_SIZE) as pages, _scratch(folder, MiB) as folios:
        yield HostSyncs(pages, folios)
