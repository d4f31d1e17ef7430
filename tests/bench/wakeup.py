"""Round trips: a kick until its call, a config read until its answer, against bare C servers.

Each repeat asks vhostd and the server in turn. The C server is what the kernel's wake-ups alone
cost on this machine at this moment. Who asks keeps to one processor, and both servers alike first
to the same one (the software's own cost shows), then to another (as a vCPU and its device mostly
are; the wake-up is nearly all of it): left alone, the scheduler moves each at its own times, and
the ratio would be that of two places. Must not know what vhostd does between.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.bench.figures import Aim, BenchFailed, Findings, Row, Spread, at_rank
from tests.bench.native import Echo, Pinger, PingerRing, Programs
from tests.fakes import messages
from tests.fakes.balloon import CONFIG, BalloonQueue, pack_pfns
from tests.fakes.eventfd import new_eventfd
from tests.fakes.machine import Machine, Setup
from tests.fakes.memory import MIB, PAGE_SIZE
from tests.fakes.messages import Flags, Request, header
from tests.fakes.program import Program
from tests.fakes.split import RING_HEADER_SIZE

KICK_AIM = Aim(1.3, at_least=False)
CONFIG_AIM = Aim(2.0, at_least=False)
WARM_UP_ROUNDS = 200
CPU_TOLD_S = 0.1  # /proc counts in steps of 10 ms: less than ten of them tell nothing
RANKS = {0.1: "p10", 0.5: "p50", 0.99: "p99"}
NEVER_INFLATED_PFN = 32 * MIB // PAGE_SIZE


@dataclass
class Side:
    """One of the two servers: how to ask it `rounds` times, and what it has used of a processor."""

    pid: int
    ask: Callable[[int], list[int]]
    cpu_s: Callable[[], float]

    def move_to(self, processor: int) -> None:
        """Keep all its threads on one processor."""
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with suppress(ProcessLookupError):  # an idle helper thread may end between the two
                os.sched_setaffinity(int(task.name), {processor})


@dataclass
class Pair:
    """Both servers of one comparison."""

    name: str
    aim: Aim
    ours: Side
    echo: Side


@contextmanager
def _vhostd(folder: Path) -> Iterator[tuple[Program, Machine]]:
    program = Program.start("vhostd-balloon", folder)
    try:
        with Machine.boot(program.socket_path, Setup(event_idx=True)) as machine:
            yield program, machine
        if (status := program.terminate()) != 0:
            raise BenchFailed(f"vhostd-balloon exited with {status}:\n{program.log()}")
    finally:
        if program.alive():
            program.kill()


def _kick_pair(programs: Programs, program: Program, machine: Machine, held: ExitStack) -> Pair:
    """Deflate requests with one page number that was never in the balloon: nothing to do."""
    pinger = Pinger(programs)
    queue = machine.queues[BalloonQueue.DEFLATE]
    content = pack_pfns([NEVER_INFLATED_PFN])
    buffer = machine.memory.allocate(len(content))
    machine.memory.write(buffer, content)
    queue.write_descriptor(queue.parts.desc, 0, buffer, len(content), 0, 0)
    for position in range(queue.size):
        machine.memory.write_number(queue.parts.avail + RING_HEADER_SIZE + 2 * position, 0, 2)
    ring = PingerRing.of(machine, BalloonQueue.DEFLATE)
    kick_fd, call_fd = new_eventfd(), new_eventfd()
    held.callback(os.close, kick_fd)
    held.callback(os.close, call_fd)
    echo = held.enter_context(Echo.on_eventfds(programs, kick_fd, call_fd))
    return Pair(
        "kick → call",
        KICK_AIM,
        Side(program.pid, lambda rounds: pinger.ring_rounds(ring, 1, rounds), program.cpu_s),
        Side(echo.pid, lambda rounds: pinger.eventfd_rounds(kick_fd, call_fd, rounds), echo.cpu_s),
    )


def _config_pair(programs: Programs, program: Program, machine: Machine, held: ExitStack) -> Pair:
    """GET_CONFIG of the whole config space, as QEMU sends it for every read of the guest."""
    pinger = Pinger(programs)
    content = machine.front.get_config(0, CONFIG.size)
    payload = messages.config(0, bytes(CONFIG.size), 0)
    request = header(Request.GET_CONFIG, Flags.VERSION, len(payload)) + payload
    answered = Flags.VERSION | Flags.REPLY
    answer = header(Request.GET_CONFIG, answered, len(payload)) + messages.config(0, content, 0)
    ours, theirs = socket.socketpair()
    held.enter_context(ours)
    echo = held.enter_context(Echo.on_socket(programs, theirs.fileno(), len(request)))
    theirs.close()
    socket_fd, echo_fd = machine.front.fileno(), ours.fileno()

    def ask_vhostd(rounds: int) -> list[int]:
        return pinger.socket_rounds(socket_fd, request, answer, rounds)

    def ask_echo(rounds: int) -> list[int]:
        return pinger.socket_rounds(echo_fd, request, request, rounds)

    return Pair(
        "GET_CONFIG",
        CONFIG_AIM,
        Side(program.pid, ask_vhostd, program.cpu_s),
        Side(echo.pid, ask_echo, echo.cpu_s),
    )


def measure(
    programs: Programs, repeats: int, rounds: int, folder: Path, findings: Findings
) -> None:
    """Both comparisons, `repeats` times `rounds` round trips each, and add rows to findings."""
    processors = sorted(os.sched_getaffinity(0))
    places = {"same processor": processors[0], "other processor": processors[-1]}
    if len(processors) == 1:
        del places["other processor"]
    with ExitStack() as held:
        program, machine = held.enter_context(_vhostd(folder))
        held.callback(os.sched_setaffinity, 0, processors)
        os.sched_setaffinity(0, processors[:1])
        for make in (_kick_pair, _config_pair):
            pair = make(programs, program, machine, held)
            for place, processor in places.items():
                pair.ours.move_to(processor)
                pair.echo.move_to(processor)
                _compare(pair, place, repeats, rounds, findings)


def _compare(pair: Pair, place: str, repeats: int, rounds: int, findings: Findings) -> None:
    sides = {"vhostd": pair.ours, "C echo": pair.echo}
    ranked: dict[str, dict[float, list[float]]] = {
        name: {rank: [] for rank in RANKS} for name in sides
    }
    cpu_s = dict.fromkeys(sides, 0.0)
    for side in sides.values():
        side.ask(WARM_UP_ROUNDS)
    for repeat in range(repeats):
        order = list(sides.items())
        for name, side in order if repeat % 2 == 0 else reversed(order):
            before = side.cpu_s()
            times = side.ask(rounds)
            cpu_s[name] += side.cpu_s() - before
            for rank, found in ranked[name].items():
                found.append(at_rank(times, rank) / 1000)
    what = f"{pair.name}, {place}"
    for rank, label in RANKS.items():
        ours, echo = ranked["vhostd"][rank], ranked["C echo"][rank]
        findings.samples[f"{what}: {label}, vhostd, µs"] = ours
        findings.samples[f"{what}: {label}, C echo, µs"] = echo
        if rank >= 0.5:
            mine, other = Spread.of(ours).median, Spread.of(echo).median
            ratio = Spread.of_ratios(ours, echo)
            row = Row(
                f"{what}: {label}", f"{mine:.1f} µs", f"{other:.1f} µs C echo", ratio, pair.aim
            )
            findings.rows.append(row)
    _report_cpu(what, cpu_s, repeats * rounds, findings)


def _report_cpu(name: str, cpu_s: dict[str, float], rounds: int, findings: Findings) -> None:
    ours_us, echo_us = (cpu_s[side] / rounds * 1e6 for side in ("vhostd", "C echo"))
    findings.samples[f"{name} CPU µs a round, vhostd and C echo"] = [ours_us, echo_us]
    if cpu_s["C echo"] >= CPU_TOLD_S:
        ratio = ours_us / echo_us
        spread = Spread(ratio, ratio, ratio, 1)
        row = Row(f"{name}: CPU", f"{ours_us:.1f} µs", f"{echo_us:.1f} µs C echo", spread)
        findings.rows.append(row)
