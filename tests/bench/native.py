"""The C parts of the benchmark: compiled with the host's gcc when it starts, then driven.

Vmm is a process that stands for QEMU, Echo the least possible server, Pinger the asking side of
round trips. Must not know what is compared with what.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.bench.figures import BenchFailed
from tests.fakes.machine import Machine
from tests.fakes.split import RING_HEADER_SIZE, SplitQueue

SOURCES = Path(__file__).parent
FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror")
STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Programs:
    """What build() made."""

    vmm: Path
    echo: Path
    pinger: Path


def build(folder: Path) -> Programs:
    """Compile everything into folder.

    Raises:
        BenchFailed: gcc is missing, or refuses.
    """
    programs = Programs(folder / "vmm", folder / "echo", folder / "pinger.so")
    for target, extra in (
        (programs.vmm, ()),
        (programs.echo, ()),
        (programs.pinger, ("-shared", "-fPIC")),
    ):
        command = ["gcc", *FLAGS, *extra, "-o", str(target), str(SOURCES / f"{target.stem}.c")]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise BenchFailed("gcc not found: install gcc and libc6-dev") from error
        if result.returncode != 0:
            raise BenchFailed(f"{target.stem}.c does not compile:\n{result.stderr}")
    return programs


class _Child:
    """A process that ends at the end of its standard input."""

    def __init__(self, command: Sequence[str], fds: Sequence[int]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=fds
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def cpu_s(self) -> float:
        """The processor time it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let it end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Vmm(_Child):
    """A process that maps guest memory as QEMU does; see vmm.c for its letters."""

    def __init__(self, programs: Programs, memory_fd: int, pages_fd: int) -> None:
        fds = (memory_fd, pages_fd)
        super().__init__([str(programs.vmm), *map(str, fds)], fds)

    def ask(self, letter: str) -> list[int]:
        """Send one request and return the numbers of its answer.

        Raises:
            BenchFailed: it ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{letter}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise BenchFailed(f"the process standing for QEMU ended at '{letter}'")
        return [int(word) for word in answer.split() if word != "ok"]


class Echo(_Child):
    """The least a server can do; see echo.c."""

    @classmethod
    def on_eventfds(cls, programs: Programs, kick_fd: int, call_fd: int) -> Self:
        """Raise the call for each kick."""
        fds = (kick_fd, call_fd)
        return cls([str(programs.echo), "eventfd", *map(str, fds)], fds)

    @classmethod
    def on_socket(cls, programs: Programs, fd: int, size: int) -> Self:
        """Send every message of size bytes back."""
        return cls([str(programs.echo), "socket", str(fd), str(size)], (fd,))


class PingerRing(ctypes.Structure):
    """struct pinger_ring of pinger.c: where one split ring's four indexes lie in this process."""

    _fields_ = (
        ("avail_index", ctypes.c_void_p),
        ("used_index", ctypes.c_void_p),
        ("used_event", ctypes.c_void_p),
        ("avail_event", ctypes.c_void_p),
        ("kick", ctypes.c_int),
        ("call", ctypes.c_int),
    )

    @classmethod
    def of(cls, machine: Machine, index: int) -> Self:
        """Take queue `index` of a machine; it must be split, with event index."""
        queue = machine.queues[index]
        assert isinstance(queue, SplitQueue) and queue.options.event_idx
        avail, used = (
            machine.memory.host_addr + machine.memory.file_offset(part)
            for part in (queue.parts.avail, queue.parts.used)
        )
        return cls(
            avail + 2,
            used + 2,
            avail + RING_HEADER_SIZE + 2 * queue.size,
            used + RING_HEADER_SIZE + 8 * queue.size,
            queue.kick_fd,
            queue.call_fd,
        )


class Pinger:
    """Round trips timed in C; all return nanoseconds a round.

    Methods raise BenchFailed when an answer is late or wrong.
    """

    def __init__(self, programs: Programs) -> None:
        self._library = ctypes.CDLL(str(programs.pinger))

    def ring_rounds(self, ring: PingerRing, batch: int, rounds: int) -> list[int]:
        """Each round: make `batch` requests available, kick, wait for the call after the last."""
        times = (ctypes.c_longlong * rounds)()
        status = self._library.pinger_ring_rounds(ctypes.byref(ring), batch, rounds, times)
        return self._checked(status, times, "a ring")

    def eventfd_rounds(self, kick_fd: int, call_fd: int, rounds: int) -> list[int]:
        """Each round: kick, wait for the call."""
        times = (ctypes.c_longlong * rounds)()
        status = self._library.pinger_eventfd_rounds(kick_fd, call_fd, rounds, times)
        return self._checked(status, times, "an eventfd")

    def socket_rounds(self, fd: int, request: bytes, answer: bytes, rounds: int) -> list[int]:
        """Each round: send the request, insist on the answer, which is of the same size."""
        assert len(request) == len(answer)
        times = (ctypes.c_longlong * rounds)()
        status = self._library.pinger_socket_rounds(fd, request, answer, len(answer), rounds, times)
        return self._checked(status, times, "a socket")

    @staticmethod
    def _checked(status: int, times: ctypes.Array[ctypes.c_longlong], what: str) -> list[int]:
        if status < 0:
            name = errno.errorcode.get(-status, str(status))
            raise BenchFailed(f"round trip over {what}: {name} ({os.strerror(-status)})")
        return list(times)
