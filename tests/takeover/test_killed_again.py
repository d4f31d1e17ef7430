"""A successor dies as well, at once: whoever comes then finds what there was."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio

from tests.daemon import VhostdProcess
from tests.fakes.balloon import BalloonDriver
from tests.fakes.frontend import FrontEnd
from tests.fakes.machine import Machine, Setup

CONFIG = """
[vm.a.balloon]
stats_interval_s = 0
[vm.b.balloon]
stats_interval_s = 0
"""
ANSWER_TIMEOUT_S = 10.0
TIMES = 3


def log_since(daemon: VhostdProcess, size: int) -> str:
    with daemon.log_path.open(errors="replace") as log:
        log.seek(size)
        return log.read()


@pytest.mark.parametrize("sign", ["restarted PID", "vm_taken_over"])
async def test_a_successor_killed_as_soon_as_it_says_something(tmp_path: Path, sign: str) -> None:
    async with VhostdProcess.start(tmp_path, CONFIG, "--keep") as daemon:
        with (
            FrontEnd.connect(tmp_path / "b-balloon.sock", ANSWER_TIMEOUT_S) as silent,
            Machine.boot(tmp_path / "a-balloon.sock", Setup()) as vm,
        ):
            assert silent.get_features()
            for _ in range(TIMES):
                size, first = daemon.log_path.stat().st_size, daemon.worker
                os.kill(first, signal.SIGKILL)
                while sign not in log_since(daemon, size):
                    pass  # a moment later would be too late
                second = daemon.worker
                os.kill(second, signal.SIGKILL)
                await daemon.replaced(second, "b")
                assert await trio.to_thread.run_sync(silent.get_features)
                await trio.to_thread.run_sync(BalloonDriver(vm).inflate, [1])
