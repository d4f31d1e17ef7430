"""A keeper as a process of its own, and the services it starts. Knows no test."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import pytest

from tests.daemon import children
from tests.native.rig import wait_until

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 20.0
HELLO_SIZE_MAX = 1 << 20
KEEP = """
import json, sys
from pathlib import Path
from vhostd.keeper.supervisor import keep
sys.exit(keep(sys.argv[3:], socket_parent=Path(sys.argv[1]), **json.loads(sys.argv[2])))
"""
RECVFROM = {"45", "207"}  # x86-64, arm64


def loaded_spare(keeper: int, service: int) -> int:
    """Wait until a keeper's spare process waits for its turn; its process id."""
    found: list[int] = []

    def look() -> bool:
        found[:] = [pid for pid in children(keeper) if pid != service]
        try:
            call = Path(f"/proc/{found[0]}/syscall").read_text() if found else ""
        except (FileNotFoundError, ProcessLookupError):
            return False
        return call.partition(" ")[0] in RECVFROM

    wait_until(look, TIMEOUT_S)
    return found[0]


def hangs_up(fd: int, timeout_s: float = TIMEOUT_S) -> bool:
    """Wait until nobody has the other end of a pipe or socket any more."""
    poller = select.poll()
    poller.register(fd, 0)
    return bool(poller.poll(timeout_s * 1000))


class Service:
    """One life of the service, as it told about itself."""

    def __init__(self, control: socket.socket, hello: dict[str, Any]) -> None:
        self.control = control
        self.hello = hello
        self.pid: int = hello["pid"]
        self.passed: dict[str, int] = hello["passed"]

    def tell(self, *words: object, fds: Sequence[int] = ()) -> list[int]:
        """Have it do something, and wait until it and the keeper have; the descriptors it gave."""
        self.send(*words, fds=fds)
        data, given, _, _ = socket.recv_fds(self.control, 100, 253)
        assert data == b"done"
        return given

    def send(self, *words: object, fds: Sequence[int] = ()) -> None:
        """Have it do something that it does not live to tell."""
        socket.send_fds(self.control, [json.dumps(words).encode()], list(fds))

    def ready(self) -> None:
        self.tell("notify", "READY=1")

    def store(self, name: str, *fds: int, poll: bool = True) -> None:
        self.tell("store", name, poll, fds=fds)

    def give(self, name: str) -> list[int]:
        """What it was passed under a name."""
        return self.tell("give", name)

    def ends(self, timeout_s: float = TIMEOUT_S) -> bool:
        """Wait until it has ended."""
        return hangs_up(self.control.fileno(), timeout_s)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class Keeper:
    """`keep()` in a process of its own."""

    def __init__(
        self, folder: Path, argv: Sequence[str] | None, options: dict[str, object]
    ) -> None:
        self.folder = folder
        self.services: list[Service] = []
        self._log = b""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(folder / "c"))
        self._listener.listen(64)
        python = [sys.executable, "-S"]
        service = [*python, str(Path(__file__).with_name("service.py")), str(folder / "c")]
        keep = [*python, "-c", KEEP, str(folder), json.dumps(options)]
        self.process = subprocess.Popen(
            [*keep, *(service if argv is None else argv)],
            stderr=subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "LISTEN_FDS": "7"},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        self._listener.close()
        for service in self.services:
            service.control.close()  # on which those that live end by themselves

    def next_service(self) -> Service:
        """Wait for the next one to start."""
        connection = self._listener.fileno()
        with closing(end := os.pidfd_open(self.process.pid)):
            ready, _, _ = select.select([connection, end], [], [], TIMEOUT_S)
        if connection not in ready:
            self.process.kill()
            pytest.fail(f"no service was started:\n{self.log()}")
        control, _ = self._listener.accept()
        control.settimeout(TIMEOUT_S)
        service = Service(control, json.loads(control.recv(HELLO_SIZE_MAX)))
        self.services.append(service)
        return service

    def successor_of(self, service: Service) -> Service:
        """Kill a service; the next one."""
        service.kill()
        return self.next_service()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait_end(self, timeout_s: float = TIMEOUT_S) -> int:
        return self.process.wait(timeout_s)

    def wait_line(self, text: str) -> str:
        """Wait until it has said something; all it said so far."""
        assert self.process.stderr is not None
        fd = self.process.stderr.fileno()
        end_s = time.monotonic() + TIMEOUT_S
        while text.encode() not in self._log:
            left_s = end_s - time.monotonic()
            chunk = os.read(fd, 65536) if select.select([fd], [], [], max(0, left_s))[0] else b""
            assert chunk, f"{text!r} was not said, but: {self._log.decode()}"
            self._log += chunk
        return self._log.decode()

    def log(self) -> str:
        """All it said, once it has ended."""
        assert self.process.stderr is not None
        self._log += self.process.stderr.read()
        return self._log.decode()

    def open_fds(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


@contextmanager
def keeping(folder: Path, argv: Sequence[str] | None = None, **options: object) -> Iterator[Keeper]:
    """Run a keeper; quick deaths are none unless asked for, so that many fit into a test."""
    options.setdefault("quick_death_s", 0)
    with Keeper(folder, argv, options) as keeper:
        yield keeper


@contextmanager
def closing(*fds: int) -> Iterator[None]:
    """Close them in the end, unless that was done."""
    try:
        yield
    finally:
        for fd in fds:
            with suppress(OSError):
                os.close(fd)
