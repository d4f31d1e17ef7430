"""What the service manager is told, and what the files in systemd/ promise."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from vhostd import systemd
from vhostd.balloon_main import CAPABILITIES

UNITS = Path(__file__).parents[1] / "systemd"
EXPOSURE_MAX = "15"  # systemd-analyze counts 0 to 100 here; below 20 it says "safe"


def test_notify_sends_one_datagram_of_assignments(tmp_path: Path) -> None:
    path = tmp_path / "notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        assert systemd.notify("READY=1", "STATUS=up", environment={"NOTIFY_SOCKET": str(path)})
        assert manager.recv(4096) == b"READY=1\nSTATUS=up"


def test_notify_without_a_service_manager_says_so() -> None:
    assert not systemd.notify("READY=1", environment={})


def test_the_discovery_file_names_the_type_that_the_program_reports() -> None:
    discovery = json.loads((UNITS / "50-vhostd-balloon.json").read_text())
    assert discovery["type"] == CAPABILITIES["type"]
    assert Path(discovery["binary"]).name == "vhostd-balloon"


@pytest.mark.parametrize("unit", ["vhostd.service", "vhostd@.service"])
def test_the_unit_s_sandbox_is_tight(unit: str) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    result = subprocess.run(
        [analyze, "security", "--offline=yes", f"--threshold={EXPOSURE_MAX}", str(UNITS / unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
