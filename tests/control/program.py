"""vhostctl as a program that a test runs: its output and its exit code. Knows no verb."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import TypeAlias

Finished: TypeAlias = "subprocess.CompletedProcess[str]"
Vhostctl: TypeAlias = Callable[..., Finished]
PROGRAM = (sys.executable, "-c", "from vhostd.control.cli import main; main()")


def run(*arguments: str, **environment: str) -> Finished:
    """Run it to its end, with these variables changed."""
    inherited = {key: value for key, value in os.environ.items() if key != "VHOSTD_SOCKET"}
    return subprocess.run(
        [*PROGRAM, *arguments],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def failed_with(finished: Finished, code: int, reason: str) -> bool:
    """One line on stderr that holds the reason, nothing on stdout."""
    assert finished.returncode == code, finished.stderr
    assert reason in finished.stderr
    assert finished.stdout == ""
    return finished.stderr.startswith("vhostctl: ") and finished.stderr.count("\n") == 1
