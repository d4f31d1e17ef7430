"""How long a VMM waits for an answer when vhostd is killed, or upgraded under its keeper.

Killed with a spare process that has the program loaded, and without one. Beside it, in turns, the
start of a bare Python process: what no take-over by a new process can be faster than.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import trio

from tests.bench.figures import BenchFailed, Findings, Row, Spread, at_rank
from tests.daemon import VhostdProcess
from tests.fakes.machine import Machine
from tests.fakes.messages import Request
from tests.keeper.keeping import loaded_spare
from tests.native.rig import wait_until

VM = "bench"
CONFIGURATION = f"[vm.{VM}.balloon]\n"
AIM_S = 1.0
RESTED_S = 1.1  # a daemon that lived shorter died quickly, and the keeper takes its time


def _gap_s(daemon: VhostdProcess, machine: Machine, *, spare: bool) -> float:
    """Kill the daemon and ask at once; seconds until the answer is there."""
    keeper, worker = daemon.process.pid, daemon.worker
    found = loaded_spare(keeper, worker)
    if not spare:
        os.kill(found, signal.SIGKILL)
    begun = time.perf_counter()
    os.kill(worker, signal.SIGKILL)
    machine.front.ask(Request.GET_QUEUE_NUM)
    gap_s = time.perf_counter() - begun
    wait_until(lambda: daemon.worker != worker)
    if (daemon.worker == found) is not spare:
        raise BenchFailed("another process took over than was meant to")
    return gap_s


def _upgrade_wait_s(daemon: VhostdProcess, machine: Machine) -> float:
    """Upgrade, and ask all the time; seconds of the longest wait."""
    keeper, worker = daemon.process.pid, daemon.worker
    loaded_spare(keeper, worker)  # its loading is over
    daemon.process.send_signal(signal.SIGHUP)
    waits_s: list[float] = []
    replaced = False
    while not replaced:
        replaced = daemon.worker != worker  # before the last of them
        begun = time.perf_counter()
        machine.front.ask(Request.GET_QUEUE_NUM)
        waits_s.append(time.perf_counter() - begun)
    return max(waits_s)


def _bare_start_s() -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-S", "-c", "pass"], check=True)
    return time.perf_counter() - begun


KINDS: Final[dict[str, Callable[[VhostdProcess, Machine], float]]] = {
    "SIGKILL to first reply, spare process": partial(_gap_s, spare=True),
    "SIGKILL to first reply, no spare process": partial(_gap_s, spare=False),
    "longest wait for a reply, upgrade": _upgrade_wait_s,
}


async def measure(kills: int, folder: Path, findings: Findings) -> None:
    """`kills` of each kind and as many upgrades, in turns, and add rows to findings."""
    own = folder / "takeover"
    own.mkdir()
    gaps_s: dict[str, list[float]] = {what: [] for what in KINDS}
    bare_s: list[float] = []
    async with VhostdProcess.start(own, CONFIGURATION, "--keep") as daemon:
        with Machine.boot(own / f"{VM}-balloon.sock") as machine:
            for _ in range(kills):
                for what, gap_s in KINDS.items():
                    await trio.sleep(RESTED_S)
                    gaps_s[what].append(gap_s(daemon, machine))
                bare_s.append(_bare_start_s())
    for what, gaps in gaps_s.items():
        findings.samples[f"{what}, s"] = gaps
        findings.rows.append(
            Row(
                what,
                f"{1000 * Spread.of(gaps).median:.0f} ms",
                f"{1000 * Spread.of(bare_s).median:.0f} ms bare Python start",
                Spread.of_ratios(gaps, bare_s),
            )
        )
        p99_s, most_s = at_rank(gaps, 0.99), max(gaps)
        verdict = "met" if p99_s < AIM_S else "NOT met"
        findings.remarks.append(
            f"{what}: p99 {1000 * p99_s:.0f} ms, most {1000 * most_s:.0f} ms of {len(gaps)};"
            f" aim p99 below {AIM_S:g} s: {verdict}"
        )
    findings.samples["bare Python start, s"] = bare_s
