"""A set of device blocks, one byte each so that searching a range is one call into C.

Knows block numbers only; must not know sizes, addresses or what being in the set means.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

Run: TypeAlias = tuple[int, int]
"""Blocks that follow each other: the first one's number, and how many."""


class BlockSet:
    """Blocks 0 to count-1, each in the set or not.

    Attributes:
        size: blocks in the set.
    """

    def __init__(self, count: int) -> None:
        self.size = 0
        self._blocks = bytearray(count)

    def __len__(self) -> int:
        """Blocks there are, in the set or not."""
        return len(self._blocks)

    def has_any(self, first: int, count: int) -> bool:
        """Whether one of these blocks is in the set."""
        return self._blocks.find(1, first, first + count) >= 0

    def has_all(self, first: int, count: int) -> bool:
        """Whether each of these blocks is in the set."""
        return self._blocks.find(0, first, first + count) < 0

    def add(self, first: int, count: int) -> None:
        """Put these blocks in; some may be in already."""
        self.size += self._blocks.count(0, first, first + count)
        self._blocks[first : first + count] = b"\1" * count

    def remove(self, first: int, count: int) -> None:
        """Take these blocks out; some may be out already."""
        self.size -= self._blocks.count(1, first, first + count)
        self._blocks[first : first + count] = bytes(count)

    def clear(self) -> None:
        """Take all out."""
        self.remove(0, len(self._blocks))

    def runs(
        self, *, inside: bool = True, first: int = 0, count: int | None = None
    ) -> Iterator[Run]:
        """The longest runs of blocks in the set, or out of it, in order; all, or some blocks'."""
        wanted, other = (1, 0) if inside else (0, 1)
        stop = len(self._blocks) if count is None else first + count
        first = self._blocks.find(wanted, first, stop)
        while first >= 0:
            end = self._blocks.find(other, first, stop)
            if end < 0:
                end = stop
            yield first, end - first
            first = self._blocks.find(wanted, end, stop)

    def copy(self) -> BlockSet:
        """A set of its own with the same blocks."""
        result = BlockSet(len(self))
        result._blocks[:] = self._blocks
        result.size = self.size
        return result

    def update(self, other: BlockSet) -> None:
        """Put the other's blocks in."""
        for first, count in other.runs():
            self.add(first, count)

    def difference_update(self, other: BlockSet) -> None:
        """Take the other's blocks out."""
        for first, count in other.runs():
            self.remove(first, count)
