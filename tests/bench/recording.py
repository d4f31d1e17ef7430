"""The order in which a real guest gave its pages to the balloon, as a compact file.

A gzip of text: header lines that start with "# " and say where it comes from, then one line a run
of page numbers at a constant distance: "FIRST COUNT STEP", where FIRST is relative to the last
page number before it (0 at first). Page numbers are of 4096 bytes and guest-physical. Must not
know how a recording is made or used.
"""

from __future__ import annotations

import gzip
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tests.fakes.memory import PAGE_SIZE

FOLDER = Path(__file__).parent / "data"
SUFFIX = ".pages.gz"
PFNS_PER_REQUEST = 256  # Linux, drivers/virtio/virtio_balloon.c, VIRTIO_BALLOON_ARRAY_PFNS_MAX
NEAR_PAGES = 64  # a jump longer than that starts a run of its own


@dataclass(frozen=True)
class Recording:
    """Page numbers in the guest's order, each once; a request carries the next 256 of them."""

    name: str
    origin: tuple[str, ...]
    pfns: Sequence[int]

    @property
    def size(self) -> int:
        """Bytes the guest gave up."""
        return len(self.pfns) * PAGE_SIZE

    @property
    def end(self) -> int:
        """Bytes of guest RAM the highest page needs."""
        return (max(self.pfns) + 1) * PAGE_SIZE

    def requests(self) -> Iterator[Sequence[int]]:
        """The page numbers of each request."""
        for start in range(0, len(self.pfns), PFNS_PER_REQUEST):
            yield self.pfns[start : start + PFNS_PER_REQUEST]

    def ranges_per_request(self) -> float:
        """Mean number of contiguous ranges in a request: what a perfect merge leaves to punch."""
        ranges = requests = 0
        for pfns in self.requests():
            ordered = sorted(pfns)
            ranges += 1 + sum(b - a != 1 for a, b in pairwise(ordered))
            requests += 1
        return ranges / requests


def _runs(pfns: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    start = 0
    while start < len(pfns):
        end, step = start + 1, 0
        if end < len(pfns) and abs(pfns[end] - pfns[start]) <= NEAR_PAGES:
            step = pfns[end] - pfns[start]
            while end < len(pfns) and pfns[end] - pfns[end - 1] == step:
                end += 1
        yield pfns[start], end - start, step
        start = end


def write(path: Path, origin: Iterable[str], pfns: Sequence[int]) -> None:
    """Store a recording; the same page numbers and origin give the same bytes."""
    lines = [f"# {line}" for line in origin]
    before = 0
    for first, count, step in _runs(pfns):
        lines.append(f"{first - before} {count} {step}")
        before = first + (count - 1) * step
    text = "\n".join(lines) + "\n"
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def read(name: str) -> Recording:
    """Load a recording of the data folder.

    Raises:
        ValueError: the file is damaged: a page occurs twice, or is no page number.
    """
    origin: list[str] = []
    pfns = array("Q")
    before = 0
    for line in gzip.decompress((FOLDER / f"{name}{SUFFIX}").read_bytes()).decode().splitlines():
        if line.startswith("# "):
            origin.append(line.removeprefix("# "))
            continue
        distance, count, step = map(int, line.split())
        first = before + distance
        run = range(first, first + count * step, step) if step else (first,)
        if len(run) != count or min(run) < 0:
            raise ValueError(f"recording {name}: impossible run {line!r}")
        pfns.extend(run)
        before = run[-1]
    if not pfns or len(set(pfns)) != len(pfns):
        raise ValueError(f"recording {name}: empty, or a page twice")
    return Recording(name, tuple(origin), pfns)


def names() -> list[str]:
    """The recordings at hand."""
    return sorted(path.name.removesuffix(SUFFIX) for path in FOLDER.glob(f"*{SUFFIX}"))
