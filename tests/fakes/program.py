"""The program under test as a real process, and what can be seen of it from outside.

Knows how to start, watch and end it; knows no message.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0
LOOK_AGAIN_S = 0.01  # /proc has nothing to wait on


def executable(name: str) -> Path:
    """Return the console script next to the running interpreter."""
    return Path(sys.executable).parent / name


@dataclass
class Program:
    """A running daemon that listens on socket_path."""

    process: subprocess.Popen[bytes]
    socket_path: Path
    log_path: Path

    @classmethod
    def start(
        cls, name: str, folder: Path, arguments: Sequence[str] = (), *, sock: str = "device.sock"
    ) -> Program:
        """Start name --socket-path=FOLDER/sock and wait until it accepts connections."""
        socket_path = folder / sock
        log_path = folder / f"{sock}.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [str(executable(name)), f"--socket-path={socket_path}", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        program = cls(process, socket_path, log_path)
        try:
            program.wait_listening()
        except BaseException:
            program.kill()
            raise
        return program

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        return self.process.pid

    def wait_listening(self) -> None:
        """Wait until connections are accepted."""

        def listens() -> bool:
            assert self.process.poll() is None, f"the program ended:\n{self.log()}"
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(str(self.socket_path))
                except (FileNotFoundError, ConnectionRefusedError):
                    return False
            return True

        assert wait_until(listens, START_TIMEOUT_S), f"it never listened:\n{self.log()}"

    def log(self, size: int = 6000) -> str:
        """Return the end of what it wrote."""
        return self.log_path.read_text(errors="replace")[-size:]

    def alive(self) -> bool:
        """Return whether the process still runs."""
        return self.process.poll() is None

    def terminate(self) -> int:
        """Send SIGTERM and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)

    # -- what can be seen of it --------------------------------------------------------------

    def fds(self) -> dict[int, str]:
        """Return its open descriptors and what they point to."""
        found: dict[int, str] = {}
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                found[int(link.name)] = str(link.readlink())
            except FileNotFoundError:  # closed while we looked
                continue
        return found

    def maps(self) -> list[str]:
        """Return the lines of its memory map."""
        return Path(f"/proc/{self.pid}/maps").read_text().splitlines()

    def resident_size(self) -> int:
        """Return the anonymous memory it holds, in bytes; guest RAM is not its own."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no RssAnon")

    def threads(self) -> int:
        """Return how many threads it has."""
        return len(list(Path(f"/proc/{self.pid}/task").iterdir()))

    def cpu_s(self) -> float:
        """Return the processor time it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Look until condition holds; return False when it does not in time.

    Only for states of another process that no descriptor announces.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_AGAIN_S)
    return True
