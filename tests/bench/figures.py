"""Numbers with their spread, and the rows of the final table. Knows nothing of what is measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Self


class BenchFailed(Exception):
    """What was measured did not do what it must: the figures would be worthless."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and the tenth and ninetieth percentile of repeated measurements."""

    median: float
    p10: float
    p90: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        """Sum up; with one sample all three are equal."""
        return cls(
            statistics.median(samples), at_rank(samples, 0.1), at_rank(samples, 0.9), len(samples)
        )

    @classmethod
    def of_ratios(cls, above: Sequence[float], below: Sequence[float]) -> Self:
        """Sum up above/below, pair by pair: each pair was measured side by side."""
        return cls.of([a / b for a, b in zip(above, below, strict=True)])

    def times(self) -> str:
        """Text of a ratio."""
        return f"{self.median:.2f}x [{self.p10:.2f} .. {self.p90:.2f}]"


def at_rank(samples: Sequence[float], rank: float) -> float:
    """The value below which a share `rank` (0..1) of the samples lies, interpolated."""
    ordered = sorted(samples)
    place = rank * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Aim:
    """What a median ratio is to reach."""

    limit: float
    at_least: bool

    def met(self, ratio: Spread) -> bool:
        """Whether it does."""
        return ratio.median >= self.limit if self.at_least else ratio.median <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}x"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a ratio of two things measured in the same run."""

    what: str
    ours: str
    against: str
    ratio: Spread
    aim: Aim | None = None

    def cells(self) -> tuple[str, ...]:
        """The line as text."""
        verdict = "" if self.aim is None else "yes" if self.aim.met(self.ratio) else "NO"
        count = str(self.ratio.count)
        aim = "" if self.aim is None else str(self.aim)
        return self.what, self.ours, self.against, self.ratio.times(), count, aim, verdict


@dataclass
class Findings:
    """All rows, the samples behind them, and remarks that belong below the table."""

    rows: list[Row] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def table(self) -> str:
        """The rows as aligned text."""
        heads = ("measured", "vhostd", "against", "ratio [p10 .. p90]", "runs", "aim", "met")
        lines = [heads, *(row.cells() for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
        texts = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([texts[0], "─" * max(map(len, texts)), *texts[1:]])

    def as_json(self) -> dict[str, object]:
        """Everything, for --json."""
        return {
            "rows": [
                asdict(row) | {"met": None if row.aim is None else row.aim.met(row.ratio)}
                for row in self.rows
            ],
            "samples": self.samples,
            "remarks": self.remarks,
        }
