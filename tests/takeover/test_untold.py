"""Changes that a guest was not told of: asked again, or it is said that they can't be."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from vhostd.control.diagnosis import daemon_checks

from tests.fakes.machine import Setup
from tests.fakes.mem import MemDriver
from tests.fakes.memory import MIB
from tests.native.rig import wait_until
from tests.takeover.balloon_scene import BALLOON, BalloonVm
from tests.takeover.kept import VM, Kept
from tests.takeover.scene import readable

CONFIGURATION = f"""
[vm.{VM}.balloon]
stats_interval_s = 0
[[vm.{VM}.mem]]
id = "mem0"
window_address = 0x100000000
size = "512MiB"
"""


@pytest.mark.timeout(120)
async def test_status_and_doctor_name_the_device_and_the_way_back(tmp_path: Path) -> None:
    def work(kept: Kept) -> None:
        with MemDriver.boot(kept.socket("mem0"), Setup()) as guest:
            wait_until(lambda: kept.status()["mem"][0]["state"] == "running")
            assert kept.status()["mem"][0]["untold"] is None
            channel = guest.machine.front.backend_requests
            assert channel is not None
            channel.close()
            kept.wish("PUT", "/mem", device="mem0", size=64 * MIB)
            for _ in range(2):  # by a successor too
                wait_until(lambda: kept.status()["mem"][0]["untold"] is not None)
                status = kept.status()
                assert "can't be told of a change" in status["mem"][0]["untold"]
                assert status["mem"][0]["standing"] == status["mem"][0]["untold"]
                assert status["balloon"]["untold"] is None
                (check,) = [
                    check for check in daemon_checks("", [status]) if check.verdict == "failed"
                ]
                assert check.name == f"{VM} mem0"
                assert check.remedy is not None
                assert "boots again" in check.remedy
                kept.die()

    async with Kept.start(tmp_path, CONFIGURATION) as kept:
        await trio.to_thread.run_sync(work, kept)
        assert '"device": "mem0"' in kept.log
        assert "config_change_channel_lost" in kept.log


@pytest.mark.timeout(120)
async def test_what_a_stop_withdrew_is_told_after_a_death_and_the_next_start(
    tmp_path: Path,
) -> None:
    """A VM that is paused and goes on: its driver reads nothing anew by itself."""

    def work(kept: Kept) -> None:
        vm = BalloonVm(kept)
        try:
            channel = vm.front.backend_requests
            assert channel is not None
            wait_until(lambda: kept.status()["state"] == "running")
            vm.answerer.reads = False
            kept.wish("PUT", "/balloon", target=MIB)
            wait_until(lambda: readable(channel))
            vm.machine.stop()
            kept.die()
            vm.answerer.reads = True
            wait_until(lambda: vm.answerer.withdrawn == 1)
            changes = vm.answerer.changes
            vm.machine.start(with_memory=False)
            wait_until(lambda: vm.answerer.changes > changes)
            assert not vm.answerer.lost
        finally:
            vm.close()

    async with Kept.start(tmp_path, BALLOON) as kept:
        await trio.to_thread.run_sync(work, kept)
