"""What systemd says of our own unit. Must not know what it is asked for."""

from __future__ import annotations

import subprocess
from pathlib import Path, PurePath
from typing import Final

_TIMEOUT_S: Final = 2.0
_PROPERTY: Final = "FileDescriptorStoreMax"


def ask_store_max(cgroup: Path = Path("/proc/self/cgroup")) -> int | None:
    """FileDescriptorStoreMax= of our own unit, as systemd has it now; None: it does not say.

    systemd 254 and later say it without being asked: FDSTORE of sd_notify(3).
    """
    try:
        unit = _unit_of(cgroup.read_text())
        asked = subprocess.run(
            ["systemctl", "show", f"--property={_PROPERTY}", "--value", "--", unit],
            capture_output=True,
            text=True,
            check=True,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    answer = asked.stdout.strip()
    return int(answer) if answer.isdigit() else None


def _unit_of(cgroups: str) -> str:
    """The service a process belongs to: the last part of its path, cgroups(7).

    Raises:
        OSError: it belongs to none.
    """
    for line in cgroups.splitlines():
        _, controllers, path = line.split(":", 2)
        name = PurePath(path).name
        if controllers in ("", "name=systemd") and name.endswith(".service"):
            return name
    raise OSError("no service")
