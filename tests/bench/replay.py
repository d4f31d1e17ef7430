"""Inflate replay: what a real guest gave up, through vhostd's ring and worker, against QEMU's way.

The same pages in the same order three ways, each populated and mapped by a process that stands for
QEMU: through vhostd; page by page as QEMU's built-in device does it; as one punch. Pages, blocks
and used entries are checked after every single run. Must not know how vhostd does it.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vhostd.units import GiB, align_up

from tests.bench.figures import Aim, BenchFailed, Findings, Row, Spread
from tests.bench.native import Pinger, PingerRing, Programs, Vmm
from tests.bench.recording import PFNS_PER_REQUEST, Recording
from tests.fakes.balloon import BalloonQueue
from tests.fakes.driver import Queue
from tests.fakes.machine import Machine, Setup
from tests.fakes.memory import BLOCK_SIZE, MIB, PAGE_SIZE, GuestMemory, open_memfd
from tests.fakes.program import Program
from tests.fakes.split import RING_HEADER_SIZE

# Rings and request buffers lie below the recorded pages, which move up by this much.
RING_SPACE = 16 * MIB
REQUEST_SIZE = 4 * PFNS_PER_REQUEST
AIM = Aim(3.0, at_least=True)


def _pages_fd(recording: Recording) -> int:
    """An open file with the offsets of the recorded pages, for Vmm."""
    offsets = array("Q", (pfn * PAGE_SIZE + RING_SPACE for pfn in recording.pfns))
    fd = os.memfd_create("pages", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(offsets.tobytes())
    return fd


@dataclass
class Ours:
    """vhostd with a pretended VM around it: queues filled once, replayed at will."""

    program: Program
    machine: Machine
    vmm: Vmm
    pinger: Pinger
    recording: Recording
    request_count: int = field(init=False)
    cpu_s: float = 0.0  # of all batch runs
    runs: int = 0

    def __post_init__(self) -> None:
        """Write every request into guest memory and both rings."""
        memory = self.machine.memory
        requests = list(self.recording.requests())
        self.request_count = len(requests)
        base = memory.allocate(self.request_count * REQUEST_SIZE, PAGE_SIZE)
        for slot, pfns in enumerate(requests):
            content = struct.pack(
                f"<{len(pfns)}I", *(pfn + RING_SPACE // PAGE_SIZE for pfn in pfns)
            )
            memory.write(base + slot * REQUEST_SIZE, content)
            for index in (BalloonQueue.INFLATE, BalloonQueue.DEFLATE):
                queue = self.machine.queues[index]
                queue.write_descriptor(
                    queue.parts.desc, slot, base + slot * REQUEST_SIZE, len(content), 0, 0
                )
                at = queue.parts.avail + RING_HEADER_SIZE + 2 * slot
                memory.write_number(at, slot, 2)

    def batch(self) -> float:
        """All requests at once: seconds from the kick to the call after the last."""
        cpu_s = self.program.cpu_s()
        times = self._inflate(batch=self.request_count, rounds=1)
        self.cpu_s += self.program.cpu_s() - cpu_s
        self.runs += 1
        return times

    def lockstep(self) -> float:
        """One request in flight, as Linux drives its balloon: seconds for all of them."""
        return self._inflate(batch=1, rounds=self.request_count)

    def _inflate(self, batch: int, rounds: int) -> float:
        self.vmm.ask("p")
        before = self.machine.memory.blocks()
        inflate = PingerRing.of(self.machine, BalloonQueue.INFLATE)
        times = self.pinger.ring_rounds(inflate, batch, rounds)
        _check_gone(self.vmm, self.recording, before - self.machine.memory.blocks())
        self._check_used(self.machine.queues[BalloonQueue.INFLATE])
        # Not timed: the next inflation is to find the pages outside the balloon, as in a guest.
        deflate = PingerRing.of(self.machine, BalloonQueue.DEFLATE)
        self.pinger.ring_rounds(deflate, self.request_count, 1)
        return sum(times) / 1e9

    def _check_used(self, queue: Queue) -> None:
        content = self.machine.memory.read(queue.parts.used + RING_HEADER_SIZE, 8 * queue.size)
        heads = sorted(head for head, _written in struct.iter_unpack("<2I", content))
        if heads != list(range(queue.size)):
            raise BenchFailed("used entries do not name every request once")


@dataclass
class Theirs:
    """The same pages in a memory file of its own, discarded by the process standing for QEMU."""

    memory_fd: int
    vmm: Vmm
    recording: Recording
    cpu_s: float = 0.0  # of all page by page runs
    runs: int = 0

    def page_by_page(self) -> float:
        """As the built-in device: seconds for punch and MADV_DONTNEED of each page."""
        wall_s, cpu_s = self._discard("b")
        self.cpu_s += cpu_s
        self.runs += 1
        return wall_s

    def one_punch(self) -> float:
        """The host's limit: seconds for one punch that takes all of them."""
        return self._discard("w")[0]

    def _discard(self, letter: str) -> tuple[float, float]:
        self.vmm.ask("p")
        before = _blocks(self.memory_fd)
        wall_ns, cpu_ns = self.vmm.ask(letter)
        _check_gone(self.vmm, self.recording, before - _blocks(self.memory_fd))
        return wall_ns / 1e9, cpu_ns / 1e9


def _blocks(fd: int) -> int:
    return os.fstat(fd).st_blocks * BLOCK_SIZE


def _check_gone(vmm: Vmm, recording: Recording, freed_size: int) -> None:
    """Insist that exactly the recorded pages have left the file."""
    (absent,) = vmm.ask("c")
    if absent != len(recording.pfns) or freed_size != recording.size:
        raise BenchFailed(
            f"{recording.name}: {absent} of {len(recording.pfns)} pages gone,"
            f" {freed_size} of {recording.size} bytes freed"
        )


@contextmanager
def _ours(programs: Programs, recording: Recording, folder: Path) -> Iterator[Ours]:
    size = RING_SPACE + align_up(recording.end, 2 * MIB)
    count = -(-len(recording.pfns) // PFNS_PER_REQUEST)
    setup = Setup(event_idx=True, queue_size=count, make_memory=lambda: GuestMemory.flat(size))
    program = Program.start("vhostd-balloon", folder)
    try:
        pages_fd = _pages_fd(recording)
        with (
            Machine.boot(program.socket_path, setup) as machine,
            Vmm(programs, machine.memory.fd, pages_fd) as vmm,
        ):
            os.close(pages_fd)
            yield Ours(program, machine, vmm, Pinger(programs), recording)
        if (status := program.terminate()) != 0:
            raise BenchFailed(f"vhostd-balloon exited with {status}:\n{program.log()}")
    finally:
        if program.alive():
            program.kill()


@contextmanager
def _theirs(programs: Programs, recording: Recording) -> Iterator[Theirs]:
    memory_fd = open_memfd(RING_SPACE + align_up(recording.end, 2 * MIB))
    pages_fd = _pages_fd(recording)
    with Vmm(programs, memory_fd, pages_fd) as vmm:
        os.close(pages_fd)
        yield Theirs(memory_fd, vmm, recording)
    os.close(memory_fd)


def measure(
    programs: Programs, recording: Recording, repeats: int, folder: Path, findings: Findings
) -> None:
    """Replay one recording `repeats` times each way, interleaved, and add rows to findings."""
    with _ours(programs, recording, folder) as ours, _theirs(programs, recording) as theirs:
        ways: list[tuple[str, Callable[[], float]]] = [
            ("batch", ours.batch),
            ("page by page", theirs.page_by_page),
            ("one punch", theirs.one_punch),
            ("lockstep", ours.lockstep),
        ]
        seconds: dict[str, list[float]] = {name: [] for name, _ in ways}
        for repeat in range(repeats):
            shift = repeat % len(ways)  # no way is always the one after a certain other
            for name, run in ways[shift:] + ways[:shift]:
                seconds[name].append(run())
        ours_cpu_s, theirs_cpu_s = ours.cpu_s / ours.runs, theirs.cpu_s / theirs.runs
    _report(recording, seconds, (ours_cpu_s, theirs_cpu_s), findings)


def _report(
    recording: Recording,
    seconds: dict[str, list[float]],
    cpu_s: tuple[float, float],
    findings: Findings,
) -> None:
    name = recording.name
    findings.samples |= {f"replay {name}, {way}, s": times for way, times in seconds.items()}
    gib = recording.size / GiB

    def rate(way: str) -> str:
        return f"{gib / Spread.of(seconds[way]).median:.2f} GiB/s"

    def row(what: str, ours: str, against: str, ratio: Spread, aim: Aim | None = None) -> None:
        findings.rows.append(Row(what, ours, against, ratio, aim))

    page, punch, batch, lockstep = (
        seconds[way] for way in ("page by page", "one punch", "batch", "lockstep")
    )
    faster = Spread.of_ratios(page, batch)
    row(
        f"inflate {name}: speed", rate("batch"), f"{rate('page by page')} built-in way", faster, AIM
    )
    limit = Spread.of_ratios(punch, batch)
    row(f"inflate {name}: speed", rate("batch"), f"{rate('one punch')} one punch", limit)
    steps = Spread.of_ratios(page, lockstep)
    one = f"inflate {name}: speed, one in flight"
    row(one, rate("lockstep"), f"{rate('page by page')} built-in way", steps)
    ours_cpu_s, theirs_cpu_s = cpu_s[0] / gib, cpu_s[1] / gib
    ratio = theirs_cpu_s / ours_cpu_s
    row(
        f"inflate {name}: CPU s per GiB",
        f"{ours_cpu_s:.3f}",
        f"{theirs_cpu_s:.3f} built-in way",
        Spread(ratio, ratio, ratio, len(batch)),
    )
    findings.samples[f"replay {name}, CPU s per GiB, vhostd and built-in way"] = [
        ours_cpu_s,
        theirs_cpu_s,
    ]
    findings.remarks.append(
        f"{name}: {recording.ranges_per_request():.1f} contiguous ranges a request of"
        f" {PFNS_PER_REQUEST} pages; {recording.origin[0]}"
    )
