"""The real daemon as a child process, driven as an operator would: config file, vhostctl, curl.

Knows the contracts (programs, JSON, exit codes). Must not import the daemon's own code.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import trio

PROGRAMS = Path(sys.executable).parent
READY_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0
REPLACED_TIMEOUT_S = 60.0


class DaemonFailed(Exception):
    """vhostd ended, or did not come up; the text has what it printed."""


class ControlFailed(Exception):
    """vhostctl exited with another status than 0.

    Attributes:
        status: its exit code.
        output: its standard error.
    """

    def __init__(self, words: tuple[str, ...], status: int, output: str) -> None:
        super().__init__(f"vhostctl {' '.join(words)}: exit {status}: {output.strip()}")
        self.status = status
        self.output = output


def children(pid: int) -> list[int]:
    """Process ids of what a process has started, the oldest first."""
    words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(word) for word in words]


@dataclass
class VhostdProcess:
    """A running `vhostd run`."""

    folder: Path
    process: subprocess.Popen[bytes]
    log_path: Path

    @classmethod
    @asynccontextmanager
    async def start(
        cls,
        folder: Path,
        configuration: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        open_files_max: tuple[int, int] | None = None,
    ) -> AsyncIterator[VhostdProcess]:
        """Write the configuration into folder (also the runtime directory), start, wait for READY.

        Args:
            environment: variables of the daemon beside the few it has.
            open_files_max: its soft and hard limit of open files; None: as ours.

        Leaving the block sends SIGTERM and wants exit code 0 within STOP_TIMEOUT_S.
        """
        config_path, log_path = folder / "vhostd.toml", folder / "vhostd.log"
        notify_path = folder / "notify.sock"
        config_path.write_text(configuration)
        command = [str(PROGRAMS / "vhostd"), "run", "--config", str(config_path)]
        command += ["--runtime-dir", str(folder), "--state-dir", str(folder), *arguments]
        if open_files_max is not None:
            command = ["prlimit", "--nofile={}:{}".format(*open_files_max), "--", *command]
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
            log_path.open("ab") as log,
        ):
            notify_path.unlink(missing_ok=True)
            ready.bind(str(notify_path))
            ready.setblocking(False)
            process = subprocess.Popen(  # noqa: ASYNC220  # returns at once, see below
                # However we end, the daemon ends with us. Not trio's own open_process(): it spawns
                # from a helper thread, and the signal comes when that thread ends.
                ["setpriv", "--pdeathsig", "KILL", "--", *command],
                cwd=folder,  # nothing of this tree is found by chance
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # Ctrl-C on the terminal is for us, who end it in order
                env={
                    "NOTIFY_SOCKET": str(folder / "notify.sock"),
                    "PATH": "/usr/bin:/bin",
                    **(environment or {}),
                },
            )
            self = cls(folder, process, log_path)
            try:
                await self._wait_ready(ready)
                yield self
            finally:
                with trio.CancelScope(shield=True):
                    await self._stop()

    async def _wait_ready(self, ready: socket.socket) -> None:
        async with trio.open_nursery() as nursery:

            async def watch_end() -> None:
                await self.wait_end()
                raise DaemonFailed(f"vhostd ended before it was ready:\n{self.log()}")

            nursery.start_soon(watch_end)
            with trio.fail_after(READY_TIMEOUT_S):
                while True:
                    await trio.lowlevel.wait_readable(ready)
                    if b"READY=1" in ready.recv(4096):
                        break
            nursery.cancel_scope.cancel()

    async def wait_end(self) -> int:
        """Wait until it has ended; its exit status."""
        pidfd = os.pidfd_open(self.process.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            trio.lowlevel.notify_closing(pidfd)
            os.close(pidfd)
        return self.process.wait()

    async def _stop(self) -> None:
        early = self.process.poll()
        if early is not None:
            raise DaemonFailed(f"vhostd ended by itself with {early}:\n{self.log()}")
        self.process.send_signal(signal.SIGTERM)
        with trio.move_on_after(STOP_TIMEOUT_S) as scope:
            await self.wait_end()
        if scope.cancelled_caught:
            self.process.kill()
            self.process.wait()
            raise DaemonFailed(f"vhostd did not end on SIGTERM:\n{self.log()}")
        if self.process.returncode != 0:
            raise DaemonFailed(f"vhostd exited with {self.process.returncode}:\n{self.log()}")

    @property
    def worker(self) -> int:
        """Process id of the daemon itself where it was started with --keep.

        Raises:
            IndexError: there is none at the moment.
        """
        return children(self.process.pid)[0]  # the spare one is younger

    async def replaced(self, before: int, vm: str) -> None:
        """Wait until another worker than `before` serves a VM and answers."""
        with trio.fail_after(REPLACED_TIMEOUT_S):
            while True:
                try:
                    if self.worker != before:
                        await self.status(vm)
                        return
                except (OSError, IndexError, httpx.HTTPError):
                    pass  # between two daemons, which nothing announces
                await trio.sleep(0.05)

    def log(self) -> str:
        """All it printed so far."""
        return self.log_path.read_text(errors="replace")

    @property
    def control_path(self) -> Path:
        """The control socket."""
        return self.folder / "control.sock"

    async def ctl(self, *words: str, timeout_s: float = 60) -> str:
        """Run vhostctl and return what it printed.

        Raises:
            ControlFailed: it exited with another status than 0.
        """
        with trio.fail_after(timeout_s):
            result = await trio.run_process(
                [str(PROGRAMS / "vhostctl"), "--socket", str(self.control_path), *words],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
        if result.returncode != 0:
            raise ControlFailed(words, result.returncode, result.stderr.decode())
        return result.stdout.decode()

    async def status(self, vm: str) -> dict[str, Any]:
        """The status object of one VM, from the HTTP API (what --json status prints)."""
        status: dict[str, Any] = await self._get(f"/v1/vms/{vm}")
        return status

    async def statuses(self) -> list[dict[str, Any]]:
        """The status objects of all VMs."""
        statuses: list[dict[str, Any]] = await self._get("/v1/vms")
        return statuses

    async def _get(self, path: str) -> Any:  # noqa: ANN401  # JSON
        transport = httpx.AsyncHTTPTransport(uds=str(self.control_path))
        async with httpx.AsyncClient(transport=transport, base_url="http://vhostd") as client:
            answer = await client.get(path)
            answer.raise_for_status()
            return json.loads(answer.content)
