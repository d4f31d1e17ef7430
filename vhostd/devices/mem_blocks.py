"""A set of device blocks, one byte each so that searching a range is one call into C.

Knows block numbers only; must not know sizes, addresses or what being in the set means.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

Run: TypeAlias = tuple[int, int]
"""Blocks that follow each other: the first one's number, and how many."""

Change: TypeAlias = tuple[int, int, int]
"""Blocks that came or went: the first one's number, how many, and 1 or 0."""


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

    # As two large numbers: a guest can make a set of a hundred thousand runs.

    def update(self, other: BlockSet) -> None:
        """Put the other's blocks in."""
        self._set(_number(self) | _number(other))

    def difference_update(self, other: BlockSet) -> None:
        """Take the other's blocks out."""
        both = _number(self) & _number(other)
        self._set(_number(self) ^ both)

    def _set(self, number: int) -> None:
        self._blocks[:] = number.to_bytes(len(self._blocks), "little")
        self.size = self._blocks.count(1)


class RecordedBlocks(BlockSet):
    """A set that says what changed, so that a copy of it elsewhere can follow."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self._changes: list[Change] = []

    def add(self, first: int, count: int) -> None:
        super().add(first, count)
        self._changes.append((first, count, 1))

    def remove(self, first: int, count: int) -> None:
        super().remove(first, count)
        self._changes.append((first, count, 0))

    def update(self, other: BlockSet) -> None:
        """Put the other's blocks in."""
        for run in other.runs():
            self.add(*run)

    def difference_update(self, other: BlockSet) -> None:
        """Take the other's blocks out."""
        for run in other.runs():
            self.remove(*run)

    def take_changes(self) -> list[Change]:
        """What changed since this was last called, in order."""
        changes, self._changes = self._changes, []
        return changes

    def content(self) -> bytes:
        """A byte for each block: 1 or 0."""
        return bytes(self._blocks)

    def load(self, content: bytes) -> None:
        """Become the set whose content() this is; no change is told of.

        Raises:
            ValueError: it is none, or of another number of blocks.
        """
        if len(content) != len(self._blocks):
            raise ValueError(f"a set of {len(content)} blocks, not {len(self._blocks)}")
        size = content.count(1)
        if size + content.count(0) != len(content):
            raise ValueError("the saved blocks are neither in nor out")
        self._blocks[:] = content
        self.size = size
        self._changes.clear()


def _number(blocks: BlockSet) -> int:
    return int.from_bytes(blocks._blocks, "little")
