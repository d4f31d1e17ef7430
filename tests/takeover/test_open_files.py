"""A limit of open files that is not enough for all VMs costs those beyond it, and no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio
from vhostd.config import load
from vhostd.open_files import RESERVE, need

from tests.daemon import VhostdProcess
from tests.fakes.balloon import BalloonDriver
from tests.fakes.machine import Machine

VMS = 40
CONFIGURATION = "".join(f"[vm.vm{index}.balloon]\nstats_interval_s = 0\n" for index in range(VMS))


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.fixture
def needed(tmp_path: Path) -> int:
    """Open files of one of the VMs, as it is reckoned."""
    path = tmp_path / "one.toml"
    path.write_text("[vm.web.balloon]\n")
    return need(load(path, runtime_dir=tmp_path, state_dir=tmp_path).vms["web"])


async def test_a_soft_limit_is_no_limit(tmp_path: Path) -> None:
    async with VhostdProcess.start(tmp_path, CONFIGURATION, open_files_max=(64, 4096)) as daemon:
        assert {vm["state"] for vm in await daemon.statuses()} == {"waiting"}
        with Machine.boot(tmp_path / "vm39-balloon.sock"):
            assert (await daemon.status("vm39"))["paused"] is None


async def test_vms_beyond_the_hard_limit_are_paused_and_the_rest_is_served(
    tmp_path: Path, needed: int
) -> None:
    served = 5
    hard = RESERVE + served * needed + needed // 2
    async with VhostdProcess.start(tmp_path, CONFIGURATION, open_files_max=(hard, hard)) as daemon:
        states = {vm["vm"]: vm for vm in await daemon.statuses()}
        assert [name for name, vm in states.items() if vm["paused"] is None] == [
            f"vm{index}" for index in range(served)
        ]
        wanted = RESERVE + VMS * needed
        assert f"all VMs together need {wanted}" in states["vm5"]["paused"]
        assert f"to {wanted} or more" in states["vm5"]["paused_remedy"]
        assert not (tmp_path / "vm5-balloon.sock").exists()
        lines = [json.loads(line) for line in daemon.log().splitlines()]
        told = [line for line in lines if "open files" in line.get("error", "")]
        assert len(told) == 1
        assert told[0]["consequence"] == f"{VMS - served} VMs are paused"
        before = open_files(daemon.process.pid)

        def use_all() -> int:
            machines = [Machine.boot(tmp_path / f"vm{i}-balloon.sock") for i in range(served)]
            for machine in machines:
                BalloonDriver(machine).inflate([100])
            most = open_files(daemon.process.pid)
            for machine in machines:
                machine.front.close()
            return most

        most = await trio.to_thread.run_sync(use_all)
        assert before < most <= before + served * needed
        assert most < hard - RESERVE // 2
