"""Whether the program kept anything it should have given back: descriptors, mappings, memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tests.fakes.balloon import BalloonDriver, BalloonQueue
from tests.fakes.machine import Machine, Setup
from tests.fakes.program import Program, wait_until
from tests.hostile.attack import serves

RETURN_TIMEOUT_S = 10.0
SETTLED_LOOKS = 30  # about a third of a second without a change
GROWTH_MAX_SIZE = 2 << 20  # anonymous memory over all repeats of one input
NAMED_FIELDS = 6  # of a line in /proc/PID/maps that ends in a path
ANONYMOUS_SLACK = 24  # heap arenas and pooled thread stacks come and go


@dataclass(frozen=True)
class Baseline:
    """What an idle program holds."""

    fds: Counter[str]
    guest_maps: int
    anonymous_maps: int

    @classmethod
    def of(cls, program: Program) -> Baseline:
        """Look now."""
        maps = program.maps()
        guest = sum(map(is_guests, maps))
        anonymous = sum(len(line.split(maxsplit=5)) < NAMED_FIELDS for line in maps)
        return cls(Counter(map(kind, program.fds().values())), guest, anonymous)


def is_guests(line: str) -> bool:
    """Return whether a line of /proc/PID/maps is memory that came over the socket."""
    return "memfd:" in line or "/dev/shm/" in line


def kind(target: str) -> str:
    """Reduce /proc's link text to what sort of descriptor it is; inode numbers differ."""
    return target.partition(":[")[0] if ":[" in target else target


class Oracle:
    """Remembers the idle state of one program and compares later ones to it."""

    def __init__(self, program: Program) -> None:
        """Serve a legal guest of every kind first, so that caches are warm, then look."""
        self.program = program
        for packed in (False, True):
            self.serve_legally(Setup(packed=packed))
        self.idle = Baseline.of(program)
        self._equal_looks = 0
        assert wait_until(self._settled, RETURN_TIMEOUT_S), "the program never came to rest"

    def _settled(self) -> bool:
        before, self.idle = self.idle, Baseline.of(self.program)
        self._equal_looks = self._equal_looks + 1 if before == self.idle else 0
        return self._equal_looks >= SETTLED_LOOKS

    def serve_legally(self, setup: Setup | None = None) -> None:
        """A new connection, the whole handshake, and an effect on guest memory."""
        with Machine.boot(self.program.socket_path, setup) as machine:
            guest = BalloonDriver(machine)
            serves(guest)
            serves(guest, BalloonQueue.REPORT)

    def unharmed(self) -> None:
        """The program lives, holds what it held when idle, and serves the next guest."""
        program = self.program
        assert program.alive(), f"the program died:\n{program.log()}"

        def returned() -> bool:
            now = Baseline.of(program)
            return (
                now.fds.total() <= self.idle.fds.total() and now.guest_maps <= self.idle.guest_maps
            )

        if not wait_until(returned, RETURN_TIMEOUT_S):
            now = Baseline.of(program)
            extra = now.fds - self.idle.fds
            maps = [line for line in program.maps() if is_guests(line)]
            raise AssertionError(
                f"kept descriptors {dict(extra)}, guest mappings {maps} "
                f"instead of {self.idle.guest_maps}"
            )
        grown = Baseline.of(program).anonymous_maps - self.idle.anonymous_maps
        assert grown <= ANONYMOUS_SLACK, f"{grown} more anonymous mappings"
        self.serve_legally()
        log = program.log()
        assert "Traceback" not in log, log
