"""A real guest's virtio-mem grows, shrinks and is reset: QEMU's built-in device against vhostd's.

Two guests of the same kind side by side, each at work while the other idles. Time runs from the
wish until the device has counted the last block and, of memory taken away, the host has the last
page; processor time goes on until the guest is quiet again. Must not know how either device works.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import trio
from vhostd.units import GiB, MiB

from tests.bench.figures import Aim, BenchFailed, Findings, Row, Spread
from tests.bench.mem_side import EVENT_DELAY_MAX_S, KERNEL, Side, Used, built_in, vhostd
from tests.vm.stack import ensure

SIZE: Final = 2 * GiB
# Linux takes movable memory for processes first, so most of this is in the window.
TOUCHED_SIZE: Final = SIZE + 300 * MiB
TOUCHED_SHARE: Final = 0.9
# Of the memory added, struct pages are taken from what the guest had before.
SEEN_SHARE: Final = 0.98
TIMEOUT_S: Final = 100.0
LOOK_INTERVAL_S: Final = 0.002
# Late events of both have come, and a guest has put online what was plugged last.
QUIET_S: Final = EVENT_DELAY_MAX_S + 0.3
AIM: Final = Aim(1.0, at_least=False)
WAYS: Final = ("vhostd", "built-in")


@dataclass(frozen=True)
class Cost:
    """What one step took; used: None where processor time says nothing."""

    wall_s: float
    used: Used | None = None


Costs: TypeAlias = dict[str, list[Cost]]


async def _note_emptied(side: Side, note: list[float]) -> None:
    """Wait until the window has no memory, and note when that was."""
    while side.resident_size() > 0:  # noqa: ASYNC110  # a file has nothing to wait on
        await trio.sleep(LOOK_INTERVAL_S)
    note.append(time.time())


async def _resize(side: Side, size: int) -> Cost:
    """Ask for a size and wait until it is reached, and until the host has what was taken away."""
    before, emptied = side.used(), list[float]()
    started_s = time.time()
    async with trio.open_nursery() as nursery:
        if size == 0:
            nursery.start_soon(_note_emptied, side, emptied)
        await side.request(size)
        plugged_s = await side.plugged(size, started_s)
    ended_s = max(plugged_s, *emptied) if emptied else plugged_s
    await trio.sleep(max(0.0, ended_s + QUIET_S - time.time()))
    return Cost(ended_s - started_s, side.used() - before)


async def _plug(side: Side, costs: Costs) -> None:
    total = (await side.guest.meminfo())["MemTotal"]
    costs["plug"].append(await _resize(side, SIZE))
    seen = (await side.guest.meminfo())["MemTotal"] - total
    if seen < SIZE * SEEN_SHARE:
        raise BenchFailed(f"real guest: {seen} of {SIZE} bytes plugged are there")


async def _unplug(side: Side, costs: Costs) -> None:
    costs["unplug, untouched"].append(await _resize(side, 0))


async def _unplug_touched(side: Side, costs: Costs) -> None:
    await _touch(side)
    costs["unplug, touched"].append(await _resize(side, 0))


async def _reset(side: Side, costs: Costs) -> None:
    await _touch(side)
    emptied = list[float]()
    started_s = time.time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_note_emptied, side, emptied)
        await side.guest.system_reset()
        plugged_s = await side.plugged(SIZE, started_s)
    costs["reset until the host has it"].append(Cost(emptied[0] - started_s))
    costs["reset until plugged again"].append(Cost(plugged_s - started_s))


async def _touch(side: Side) -> None:
    """Let the guest fill the memory plugged and free it again."""
    await side.guest.run(f"guesttool touch {TOUCHED_SIZE // MiB}", timeout_s=TIMEOUT_S)
    resident = side.resident_size()
    if resident < SIZE * TOUCHED_SHARE:
        raise BenchFailed(f"real guest: touched only {resident} of {SIZE} bytes plugged")


# Nothing is plugged before and after.
RESIZES: Final = (_plug, _unplug, _plug, _unplug_touched)


async def measure(resizes: int, resets: int, folder: Path, findings: Findings) -> None:
    """Resize and reset both guests so many times, in turn, and add rows to findings."""
    stack = await trio.to_thread.run_sync(ensure, (KERNEL,))
    costs: dict[str, Costs] = {name: defaultdict(list) for name in WAYS}
    own = folder / "mem"
    own.mkdir()
    async with vhostd(stack, own) as ours, built_in(stack) as theirs:
        pairs = list(zip(WAYS, (ours, theirs), strict=True))
        turns = Counter[str]()
        for step in (*RESIZES * resizes, _plug, *[_reset] * resets, _unplug):
            # No way is always the one after the other.
            for name, side in pairs if turns[step.__name__] % 2 == 0 else reversed(pairs):
                await _take(step, side, costs[name], name)
            turns[step.__name__] += 1
    for what, mine in costs["vhostd"].items():
        _report(f"mem {what}, {SIZE // GiB} GiB", mine, costs["built-in"][what], findings)


async def _take(
    step: Callable[[Side, Costs], Awaitable[None]], side: Side, costs: Costs, name: str
) -> None:
    try:
        with trio.fail_after(TIMEOUT_S):
            await step(side, costs)
    except trio.TooSlowError:
        what = step.__name__.strip("_")
        raise BenchFailed(f"real guest, {name}: {what} took over {TIMEOUT_S:g} s") from None


def _report(what: str, ours: list[Cost], theirs: list[Cost], findings: Findings) -> None:
    def row(unit: str, amount: Callable[[Cost], float]) -> None:
        here, there = list(map(amount, ours)), list(map(amount, theirs))
        findings.samples[f"{what}, {unit} s, vhostd"] = here
        findings.samples[f"{what}, {unit} s, built-in"] = there
        mine, other = Spread.of(here).median * 1000, Spread.of(there).median * 1000
        texts = (f"{mine:.1f} ms", f"{other:.1f} ms built-in")
        findings.rows.append(Row(f"{what}: {unit}", *texts, Spread.of_ratios(here, there), AIM))

    gib = SIZE / GiB
    row("wall", lambda cost: cost.wall_s)
    if ours[0].used is not None:
        row("CPU per GiB, no vCPUs", lambda cost: cost.used.host_s / gib if cost.used else 0)
        row("CPU per GiB, all threads", lambda cost: cost.used.all_s / gib if cost.used else 0)
