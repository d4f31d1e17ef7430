"""A keeper that is killed: guests are served on, and everybody is told what is missing now."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from tests.daemon import PROGRAMS, children
from tests.fakes.balloon import BalloonDriver
from tests.fakes.machine import Machine
from tests.native.rig import wait_until

CONFIGURATION = "[vm.web.balloon]\nstats_interval_s = 0\n"


def status(folder: Path) -> dict[str, Any]:
    transport = httpx.HTTPTransport(uds=str(folder / "control.sock"))
    with httpx.Client(transport=transport, base_url="http://vhostd") as client:
        found: dict[str, Any] = client.get("/v1/vms/web").json()
        return found


def test_guests_are_served_on_and_the_next_keeper_names_who_serves(tmp_path: Path) -> None:
    config, log_path = tmp_path / "vhostd.toml", tmp_path / "log"
    config.write_text(CONFIGURATION)
    directories = ["--runtime-dir", str(tmp_path), "--state-dir", str(tmp_path)]
    command = [str(PROGRAMS / "vhostd"), "run", "--config", str(config), *directories, "--keep"]
    with log_path.open("wb") as log:
        keeper = subprocess.Popen(command, stdout=log, stderr=log)
    worker = 0
    try:
        wait_until(lambda: b"ready after" in log_path.read_bytes(), 20)
        wait_until(lambda: len(children(keeper.pid)) == 2, 20)  # the spare one, too
        worker, spare = children(keeper.pid)
        with Machine.boot(tmp_path / "web-balloon.sock") as machine:
            guest = BalloonDriver(machine)
            guest.inflate([100])
            assert status(tmp_path)["kept"]
            os.kill(keeper.pid, signal.SIGKILL)
            keeper.wait()
            wait_until(lambda: not status(tmp_path)["kept"])
            wait_until(lambda: not Path(f"/proc/{spare}").exists())
            guest.inflate([200])
            assert status(tmp_path)["balloon"]["inflated"] == 2 * 4096
            after = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
            assert after.returncode == 2
            assert f"another vhostd (PID {worker}) serves this runtime directory" in after.stderr
            guest.inflate([300])
        text = log_path.read_text()
        assert "Traceback" not in text
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        (told,) = [line for line in lines if line["event"] == "no_fd_store"]
        assert told["error"] == "the keeper has ended"
        assert not [line for line in lines if line["event"] == "host_error"]
    finally:
        keeper.kill()
        with suppress(ProcessLookupError):
            if worker:
                os.kill(worker, signal.SIGTERM)
                wait_until(lambda: not Path(f"/proc/{worker}").exists())
