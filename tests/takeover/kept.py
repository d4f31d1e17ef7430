"""A daemon under its keeper: who serves now, and how it dies.

Knows processes and what the keeper prints. Must not know messages or devices.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.daemon import VhostdProcess
from tests.native.rig import wait_until

SUCCESSOR_TIMEOUT_S = 30.0
VM = "web"
_READY = re.compile(rb"PID (\d+) ready after")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has of the kernel; sizes in KiB."""

    fds: int
    mappings: int
    threads: int
    resident_size: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        """Look at a process."""
        base = Path(f"/proc/{pid}")
        status = dict(line.split(":", 1) for line in (base / "status").read_text().splitlines())
        return cls(
            fds=len(list((base / "fd").iterdir())),
            mappings=len((base / "maps").read_text().splitlines()),
            threads=int(status["Threads"]),
            resident_size=int(status["VmRSS"].split()[0]),
        )


def _state(pid: int) -> str:
    """The letter proc(5) has for it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _dead(pid: int) -> bool:
    """Nothing of it runs any more, so that its descriptors are closed."""
    try:
        return _state(pid) == "Z" and len(list(Path(f"/proc/{pid}/task").iterdir())) == 1
    except FileNotFoundError:
        return True


class Kept:
    """A keeper and the daemon of the moment."""

    def __init__(self, daemon: VhostdProcess) -> None:
        """The daemon was started with --keep."""
        self._daemon = daemon
        self.keeper = daemon.process.pid
        self.worker = 0
        self.wait_successor()

    @classmethod
    @asynccontextmanager
    async def start(cls, folder: Path, configuration: str) -> AsyncIterator[Kept]:
        """Run a keeper and its first daemon; in the end both end in order."""
        async with VhostdProcess.start(folder, configuration, "--keep") as daemon:
            yield cls(daemon)

    def wait_successor(self) -> None:
        """Wait until another daemon than the last one has taken everything over."""

        def look() -> bool:
            # Only READY says that it has nothing left to do of its start.
            ready = _READY.findall(self._daemon.log_path.read_bytes())
            return bool(ready) and int(ready[-1]) != self.worker

        before = self.worker
        try:
            wait_until(look, SUCCESSOR_TIMEOUT_S)
        except TimeoutError:
            raise AssertionError(f"nobody followed {before}:\n{self.log[-4000:]}") from None
        self.worker = int(_READY.findall(self._daemon.log_path.read_bytes())[-1])

    @contextmanager
    def dead(self, bury: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Kill the daemon; the next one starts at the end of the block.

        bury: for whoever has to let go of the dead process before its parent hears of it.
        """
        os.kill(self.keeper, signal.SIGSTOP)
        wait_until(lambda: _state(self.keeper) == "T")
        os.kill(self.worker, signal.SIGKILL)
        bury()
        wait_until(lambda: _dead(self.worker))
        yield
        # An upgrade follows at once; after several quick deaths the keeper would take its time.
        os.kill(self.keeper, signal.SIGHUP)
        os.kill(self.keeper, signal.SIGCONT)
        self.wait_successor()

    def die(self, bury: Callable[[], None] = lambda: None) -> None:
        """Kill the daemon, and wait until another has taken over."""
        with self.dead(bury):
            pass

    def socket(self, device: str) -> Path:
        """Where VMMs find a device."""
        return self._daemon.folder / f"{VM}-{device}.sock"

    @property
    def log(self) -> str:
        """All that keeper and daemons printed."""
        return self._daemon.log()

    def _ask(self, method: str, path: str, **body: object) -> httpx.Response:
        transport = httpx.HTTPTransport(uds=str(self._daemon.control_path))
        with httpx.Client(transport=transport, base_url="http://vhostd", timeout=30) as client:
            answer = client.request(method, f"/v1/vms/{VM}{path}", json=body or None)
        answer.raise_for_status()
        return answer

    def status(self) -> dict[str, Any]:
        """What the control API says of the VM."""
        found: dict[str, Any] = self._ask("GET", "").json()
        return found

    def wish(self, method: str, path: str, **body: object) -> None:
        """Have the control API do something."""
        self._ask(method, path, **body)
