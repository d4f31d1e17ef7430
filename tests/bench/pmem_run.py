"""Disks of one real guest make writes durable, in turns: vhostd's against QEMU's own two.

Rounds with the same steps; who comes first, and after whom, differs from round to round. Must not
know how a disk gets into the guest.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import trio
from vhostd.units import KiB, MiB

from tests.bench.figures import Findings
from tests.bench.pmem_host import file_system, host_syncs
from tests.bench.pmem_report import report_early, report_flushes, report_rates
from tests.bench.pmem_side import HABIT, KERNEL, NAMES, SHMEM, Side, Syncs, disks
from tests.vm.stack import ensure

WRITE_SIZE: Final = 4 * KiB
WRITERS: Final = 8
EARLY_SIZE: Final = 256 * MiB
EARLY_WAIT_S: Final = 2.0
EARLY_FILE: Final = "big"
WARM_UP: Final = 80
SYNC_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True)
class PmemEffort:
    """How often things are done.

    Attributes:
        rounds: of everything but the last; best a multiple of four, see turns().
        flushes: bare ones, of each disk in a round; as often the host syncs by itself.
        writes: each with its fsync, of each disk in a round and by all writers together.
        early: rounds of an fsync long after the writes.
    """

    rounds: int
    flushes: int
    writes: int
    early: int


@dataclass(frozen=True)
class Step:
    """What each disk does in its turn, from so many threads: to itself, or to files on it."""

    what: str
    mounted: bool
    writers: int
    size: int

    async def run(self, side: Side, count: int) -> Syncs:
        """Take the turn: `count` fsyncs in all."""
        path = f"{side.folder}/file" if self.mounted else side.device
        return await side.sync(path, count // self.writers, self.writers, self.size)


FLUSH: Final = Step("bare flush", mounted=False, writers=1, size=0)


def _write_steps(where: str, *, mounted: bool) -> list[Step]:
    return [
        Step(f"4 KiB + fsync, {where}, {text}", mounted, writers, WRITE_SIZE)
        for writers, text in ((1, "1 writer"), (WRITERS, f"{WRITERS} writers"))
    ]


RAW_WRITES: Final = _write_steps("raw", mounted=False)
FILE_WRITES: Final = _write_steps("ext4", mounted=True)

Taken: TypeAlias = dict[str, list[Syncs]]


def turns(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: over four rounds of four, each is once at every place."""
    half = len(names) // 2 * (number // 2 % 2)
    order = [*names[half:], *names[:half]]
    return order[::-1] if number % 2 else order


async def measure(effort: PmemEffort, folder: Path, findings: Findings) -> None:
    """Run everything in one guest and add rows to findings."""
    stack = await trio.to_thread.run_sync(ensure, (KERNEL,))
    own = folder / "pmem"
    own.mkdir()
    # Not beside the sockets: temporary files may be in memory, where a sync costs nothing.
    with tempfile.TemporaryDirectory(prefix="bench-", dir=stack.cache) as image_folder:
        findings.remarks.append(f"pmem: images on {file_system(Path(image_folder))}")
        async with disks(stack, own, Path(image_folder)) as found:
            await _flush(effort, found, Path(image_folder), findings)
            await _write(effort, found, RAW_WRITES, findings)
            for side in found.values():
                await _make_files(side)
            await _write(effort, found, FILE_WRITES, findings)
            await _early(effort.early, found, findings)


async def _flush(
    effort: PmemEffort, found: dict[str, Side], image_folder: Path, findings: Findings
) -> None:
    """Flushes with nothing to write, beside the host's own syncs."""
    taken: Taken = defaultdict(list)
    for name in NAMES:
        await FLUSH.run(found[name], WARM_UP)
    with host_syncs(image_folder) as host:
        for number in range(effort.rounds):
            for name in turns(NAMES, number):
                taken[name].append(await FLUSH.run(found[name], effort.flushes))
                if name == SHMEM:
                    image = found[name].image
                    await trio.to_thread.run_sync(host.turn, image, effort.flushes)
    report_flushes(taken, host, findings)


async def _write(
    effort: PmemEffort, found: dict[str, Side], steps: Sequence[Step], findings: Findings
) -> None:
    for step in steps:
        taken: Taken = defaultdict(list)
        for name in NAMES:
            await step.run(found[name], WARM_UP)
        for number in range(effort.rounds):
            for name in turns(NAMES, number):
                taken[name].append(await step.run(found[name], effort.writes))
        report_rates(step.what, taken, findings)


async def _make_files(side: Side) -> None:
    """All blocks of the files written later are there: what is measured are writes over them."""
    await side.mount()
    for writer in range(WRITERS):
        await side.write(f"file.{writer}", MiB)  # disktool's SPAN
    await side.guest.run("sync", timeout_s=SYNC_TIMEOUT_S)


async def _early(rounds: int, found: dict[str, Side], findings: Findings) -> None:
    """How long an fsync takes when much was written and some time has passed."""
    taken: Taken = defaultdict(list)
    for name in (SHMEM, HABIT):
        await found[name].write(f"{EARLY_FILE}.0", EARLY_SIZE)
        await found[name].guest.run("sync", timeout_s=SYNC_TIMEOUT_S)
    for number in range(rounds):
        for name in turns((SHMEM, HABIT), number):
            side = found[name]
            await side.write(f"{EARLY_FILE}.0", EARLY_SIZE)
            await trio.sleep(EARLY_WAIT_S)
            taken[name].append(await side.sync(f"{side.folder}/{EARLY_FILE}", 1, 1, 0))
    what = f"fsync {EARLY_WAIT_S:g} s after writing {EARLY_SIZE // MiB} MiB"
    report_early(what, taken, findings)
