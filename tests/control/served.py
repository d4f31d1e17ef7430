"""A served SmallDaemon as a process of its own, which a test can kill; `python -m` runs one.

Its standard input takes one command a line and its output answers each with the same line.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from vhostd.units import MiB

from tests.control.daemon import RunningDaemon, SmallDaemon, running_daemon

LOOK_AGAIN_S: Final = 0.01
WAIT_MAX_S: Final = 30.0
COMMANDS: Final[Mapping[str, Callable[[SmallDaemon], None]]] = {
    "reach 1 MiB": lambda daemon: daemon.web.reach(MiB),
    "plug 64 MiB": lambda daemon: daemon.web.plug(0, 32),
    "statistics": lambda daemon: daemon.web.send_statistics(),
    "mute": lambda daemon: daemon.web.mute(),
    "request 64 MiB": lambda daemon: daemon.web.request_mem(64 * MiB),
}
WAITED_FOR: Final = "waited for"
"""Answered once a client waits for an event."""


class Served:
    """The end tests hold."""

    def __init__(self, folder: Path, commands: Sequence[str], first_event: int) -> None:
        """Start it and wait until it serves the folder; its events count from there."""
        arguments = [str(folder), str(first_event), *commands]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.control.served", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._expect("ready")

    def do(self, command: str) -> None:
        """Have one command carried out."""
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        self._expect(command)

    def _expect(self, line: str) -> None:
        assert self._process.stdout is not None
        while (found := self._process.stdout.readline()) != line + "\n":
            assert found, "the served daemon ended"

    def kill(self) -> None:
        """End it with no chance to say anything."""
        self._process.kill()
        self._process.communicate()

    def stop(self) -> None:
        """End it in order."""
        self._process.communicate(timeout=WAIT_MAX_S)


@contextmanager
def serving(folder: Path, *commands: str, first_event: int = 1) -> Iterator[Served]:
    """One that is killed at the end, if it has not ended before.

    commands: carried out before it serves, like what a successor finds recorded.
    """
    served = Served(folder, commands, first_event)
    try:
        yield served
    finally:
        served.kill()


def _carry_out(running: RunningDaemon, command: str) -> None:
    if command != WAITED_FOR:
        running.do(lambda: COMMANDS[command](running.daemon))
        return
    deadline_s = time.monotonic() + WAIT_MAX_S
    while not running.daemon.events.subscribers:
        assert time.monotonic() < deadline_s, "no client waits"
        time.sleep(LOOK_AGAIN_S)


def main() -> None:
    """Serve until the input ends."""
    folder, first_event, *commands = sys.argv[1:]

    def prepare(daemon: SmallDaemon) -> None:
        for command in commands:
            COMMANDS[command](daemon)

    with running_daemon(Path(folder), first_event=int(first_event), prepare=prepare) as running:
        print("ready", flush=True)
        for line in sys.stdin:
            _carry_out(running, line.strip())
            print(line, end="", flush=True)


if __name__ == "__main__":
    main()
