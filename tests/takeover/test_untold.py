"""A guest that can't be told of a change, because its VMM hung up the channel for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from vhostd.control.diagnosis import daemon_checks

from tests.fakes.machine import Setup
from tests.fakes.mem import MemDriver
from tests.fakes.memory import MIB
from tests.native.rig import wait_until
from tests.takeover.kept import VM, Kept

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
