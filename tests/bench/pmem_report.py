"""The rows and remarks on disks that make writes durable. Must not know how they are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from tests.bench.figures import Aim, Findings, Row, Spread
from tests.bench.pmem_host import HostSyncs
from tests.bench.pmem_side import BLOCK, BUILT_IN, HABIT, NAMES, SHMEM, WINDOW, Syncs

AT_MOST: Final = Aim(1.0, at_least=False)
AT_LEAST: Final = Aim(1.0, at_least=True)
HOST: Final = "host fdatasync"
SHORT: Final = {SHMEM: "shmem", WINDOW: "window"}

Taken: TypeAlias = Mapping[str, Sequence[Syncs]]
"""The turns of each disk, one a round."""


@dataclass(frozen=True)
class Pair:
    """Which of ours is held against what; aimed: whether an aim was set for that."""

    ours: str
    against: str
    aimed: bool = False


PAIRS: Final = (Pair(SHMEM, BUILT_IN, True), Pair(WINDOW, BUILT_IN, True), Pair(SHMEM, BLOCK))


def _rows(
    what: str,
    unit: str,
    values: Mapping[str, Sequence[float]],
    pairs: Sequence[Pair],
    aim: Aim | None,
    findings: Findings,
) -> None:
    for name, found in values.items():
        findings.samples[f"{what}, {unit}, {name}"] = list(found)
    for pair in pairs:
        ours, against = values[pair.ours], values[pair.against]
        mine, other = Spread.of(ours).median, Spread.of(against).median
        texts = (f"{mine:.0f} {unit}", f"{other:.0f} {unit} {pair.against}")
        ratio = Spread.of_ratios(ours, against)
        findings.rows.append(
            Row(f"pmem {what}, {SHORT[pair.ours]}", *texts, ratio, aim if pair.aimed else None)
        )


def report_flushes(taken: Taken, host: HostSyncs, findings: Findings) -> None:
    """Of flushes with nothing to write."""
    ranks: dict[str, tuple[Callable[[Syncs], float], list[float], Aim | None]] = {
        "p50": (lambda syncs: syncs.p50_us, [turn.p50 for turn in host.clean], AT_MOST),
        # The host's disk makes these; they are told, and nothing is aimed at.
        "p99": (lambda syncs: syncs.p99_us, [turn.p99 for turn in host.clean], None),
    }
    pairs = [*PAIRS, Pair(SHMEM, HOST)]
    for rank, (value, of_host, aim) in ranks.items():
        values = {name: list(map(value, taken[name])) for name in NAMES} | {HOST: of_host}
        _rows(f"bare flush {rank}", "µs", values, pairs, aim, findings)
    cpu_ms = {
        name: [syncs.host_s * 1000 / syncs.count * 1000 for syncs in taken[name]] for name in NAMES
    }
    _rows("CPU per 1000 bare flushes", "ms", cpu_ms, PAIRS, None, findings)
    _remark_on_host(taken, host, findings)


def _remark_on_host(taken: Taken, host: HostSyncs, findings: Findings) -> None:
    alone = Spread.of([turn.p50 for turn in host.clean])
    above = [f"{name} {_signed(Spread.of(_differences(taken[name], host)))}" for name in NAMES]
    findings.remarks.append(
        f"bare flush p50 above the host's own fdatasync of the same clean file,"
        f" {_micro(alone)}: {', '.join(above)}"
    )
    findings.remarks.append(
        "QEMU spares a virtio-blk disk that nobody wrote to the sync: its bare flush is the way"
        " there and back alone, which no pmem can do, as nobody sees what a guest writes"
    )
    rows = {
        "clean": host.clean,
        "one page dirtied through a mapping": host.pages.dirtied,
        "one page of a large folio dirtied so (all of it is written)": host.folios.dirtied,
    }
    for state, found in rows.items():
        findings.samples[f"{HOST}, {state}, p50, µs"] = [turn.p50 for turn in found]
        findings.samples[f"{HOST}, {state}, p99, µs"] = [turn.p99 for turn in found]
    texts = [
        f"{state}: p50 {_micro(Spread.of([turn.p50 for turn in found]))},"
        f" p99 {_micro(Spread.of([turn.p99 for turn in found]))}"
        for state, found in rows.items()
    ]
    findings.remarks.append(f"{HOST} by itself, {'; '.join(texts)}")


def _differences(taken: Sequence[Syncs], host: HostSyncs) -> list[float]:
    return [syncs.p50_us - turn.p50 for syncs, turn in zip(taken, host.clean, strict=True)]


def _micro(spread: Spread) -> str:
    return f"{spread.median:.0f} µs [{spread.p10:.0f} .. {spread.p90:.0f}]"


def _signed(spread: Spread) -> str:
    return f"{spread.median:+.0f} µs [{spread.p10:+.0f} .. {spread.p90:+.0f}]"


def report_rates(what: str, taken: Taken, findings: Findings) -> None:
    """Of writes with an fsync each."""
    rates = {name: [syncs.count / syncs.wall_s for syncs in taken[name]] for name in NAMES}
    _rows(what, "/s", rates, PAIRS, AT_LEAST, findings)


def report_early(what: str, taken: Taken, findings: Findings) -> None:
    """Of an fsync long after the writes."""
    took_ms = {name: [syncs.wall_s * 1000 for syncs in taken[name]] for name in (SHMEM, HABIT)}
    _rows(what, "ms", took_ms, [Pair(SHMEM, HABIT)], None, findings)
