"""`python -m tests.bench`: measure everything in one run, print the ratios, say what was aimed at.

Exit code 0 when everything was measured, aims met or not; 1 when something could not be measured
or did not do what it must; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio
from vhostd.units import GiB, MiB, format_size

from tests.bench import (
    guest_run,
    mem_look,
    mem_run,
    pmem_run,
    recording,
    replay,
    takeover_run,
    wakeup,
)
from tests.bench.figures import BenchFailed, Findings
from tests.bench.native import build
from tests.bench.pmem_run import PmemEffort
from tests.daemon import ControlFailed, DaemonFailed
from tests.vm.cache import StackError
from tests.vm.guest import GuestBootError, GuestCommandError, QemuDied

PARTS = ("replay", "wakeup", "guest", "mem", "pmem", "takeover")
MEMORY_NEEDED = 4 * GiB
MEMORY_NEEDED_MEM = 8 * GiB  # two guests with all they were given, side by side
FAILURES = (
    BenchFailed, StackError, GuestBootError, GuestCommandError, QemuDied, DaemonFailed,
    ControlFailed, OSError,
)  # fmt: skip


@dataclass(frozen=True)
class Effort:
    """How often each part is repeated, and how much a guest inflates.

    resizes: of virtio-mem, each twice: with and without memory in what is unplugged; and once more.
    """

    replays: int
    wakeups: int
    rounds: int
    guests: int
    guest_size: int
    looks: int
    resizes: int
    resets: int
    pmem: PmemEffort
    kills: int


FULL = Effort(
    replays=10,
    wakeups=20,
    rounds=2000,
    guests=3,
    guest_size=GiB,
    looks=20,
    resizes=5,
    resets=3,
    pmem=PmemEffort(rounds=16, flushes=500, writes=240, early=6),
    kills=100,
)
QUICK = Effort(
    replays=3,
    wakeups=5,
    rounds=1000,
    guests=1,
    guest_size=512 * MiB,
    looks=5,
    resizes=1,
    resets=1,
    pmem=PmemEffort(rounds=4, flushes=250, writes=96, early=2),
    kills=20,
)


def _host() -> dict[str, str | float]:
    """What the figures were measured on."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "host": platform.node(),
        "kernel": platform.release(),
        "processor": models[0] if models else platform.machine(),
        "processors": os.cpu_count() or 0,
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_at_start": round(os.getloadavg()[0], 1),
        "shmem_huge_pages": Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
        .read_text()
        .partition("[")[2]
        .partition("]")[0],
    }


def _check_memory(needed: int) -> None:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
            if available < needed:
                has, wants = format_size(available), format_size(needed)
                raise BenchFailed(f"{has} of memory available, {wants} needed")


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _measure(parts: Sequence[str], effort: Effort, folder: Path, findings: Findings) -> None:
    _check_memory(MEMORY_NEEDED_MEM if "mem" in parts else MEMORY_NEEDED)
    programs = build(folder)
    if "replay" in parts:
        for name in reversed(recording.names()):
            _say(f"replaying 1 GiB as recorded, {name}, {effort.replays} times each way")
            own = folder / f"replay-{name}"
            own.mkdir()
            replay.measure(programs, recording.read(name), effort.replays, own, findings)
    if "wakeup" in parts:
        _say(f"round trips, {effort.wakeups} times {effort.rounds} of each")
        wakeup.measure(programs, effort.wakeups, effort.rounds, folder, findings)
    if not {"guest", "mem", "pmem"}.isdisjoint(parts):
        trio.run(guest_run.remark_acceleration, findings)
    if "guest" in parts:
        size = format_size(effort.guest_size)
        _say(f"real guests, {size} in and out, {effort.guests} of each device")
        trio.run(partial(guest_run.measure, effort.guests, effort.guest_size, folder, findings))
    if "mem" in parts:
        _say(f"looks for memory in unplugged blocks, {effort.looks} times at each window")
        mem_look.measure(effort.looks, findings)
        size = format_size(mem_run.SIZE)
        times = f"{2 * effort.resizes + 1} times, reset {effort.resets}"
        _say(f"real guests, {size} of virtio-mem in and out {times}")
        trio.run(partial(mem_run.measure, effort.resizes, effort.resets, folder, findings))
    if "pmem" in parts:
        _say(f"a real guest makes writes durable on four disks, {effort.pmem.rounds} rounds")
        trio.run(partial(pmem_run.measure, effort.pmem, folder, findings))
    if "takeover" in parts:
        _say(f"vhostd killed {effort.kills} times with a spare process, and without; and upgraded")
        trio.run(partial(takeover_run.measure, effort.kills, folder, findings))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, a smaller guest run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw numbers there")
    parser.add_argument("--only", action="append", choices=PARTS, help="measure this part alone")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    options = _options(arguments)
    effort = QUICK if options.quick else FULL
    findings = Findings()
    host = _host()
    started = time.monotonic()
    status = 0
    try:
        with tempfile.TemporaryDirectory(prefix="vhostd-bench-") as folder:
            _measure(options.only or PARTS, effort, Path(folder), findings)
    except* FAILURES as failures:
        for failure in failures.exceptions:
            _say(str(failure))
        status = 1
    except* KeyboardInterrupt:
        _say("interrupted")
        status = 130
    if status != 0:
        return status
    head = f"{host['host']}, Linux {host['kernel']}, {host['processors']} x {host['processor']}"
    head += f", {format_size(int(host['memory']))}, load {host['load_at_start']} at the start"
    print(f"{head}; medians and p10 .. p90 over the runs")
    print(f"\n{findings.table()}\n")
    for remark in findings.remarks:
        print(f"* {remark}")
    print(f"measured in {time.monotonic() - started:.0f} s")
    if options.json is not None:
        options.json.write_text(json.dumps({"host": host, **findings.as_json()}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
