"""A limit of open files that is not enough for all VMs costs those beyond it, and no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio
from vhostd.config import VmConfig, load
from vhostd.open_files import IDLE_SHARE, RESERVE, idle_need, need

from tests.daemon import VhostdProcess
from tests.fakes.balloon import BalloonDriver
from tests.fakes.channel import ConnectionLost
from tests.fakes.machine import Machine

VMS = 40
CONFIGURATION = "".join(f"[vm.vm{index}.balloon]\nstats_interval_s = 0\n" for index in range(VMS))


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def threads(pid: int) -> list[str]:
    return [thread.read_text() for thread in Path(f"/proc/{pid}/task").glob("*/comm")]


@pytest.fixture
def web(tmp_path: Path) -> VmConfig:
    """One of the VMs."""
    path = tmp_path / "one.toml"
    path.write_text("[vm.web.balloon]\n")
    return load(path, runtime_dir=tmp_path, state_dir=tmp_path).vms["web"]


async def test_a_soft_limit_is_no_limit(tmp_path: Path) -> None:
    async with VhostdProcess.start(tmp_path, CONFIGURATION, open_files_max=(64, 4096)) as daemon:
        assert {vm["state"] for vm in await daemon.statuses()} == {"waiting"}
        # These are for VMMs.
        assert not [name for name in threads(daemon.process.pid) if name.startswith("vm")]
        with Machine.boot(tmp_path / "vm39-balloon.sock"):
            assert (await daemon.status("vm39"))["paused"] is None


async def test_vms_beyond_the_hard_limit_are_paused_and_the_rest_is_served(
    tmp_path: Path, web: VmConfig
) -> None:
    served, vmms = 30, 3
    room = served * idle_need(web) / IDLE_SHARE
    hard = RESERVE + int(room) + 1
    assert room - served * idle_need(web) >= vmms * (need(web) - idle_need(web))
    async with VhostdProcess.start(tmp_path, CONFIGURATION, open_files_max=(hard, hard)) as daemon:
        states = {vm["vm"]: vm for vm in await daemon.statuses()}
        assert [name for name, vm in states.items() if vm["paused"] is None] == [
            f"vm{index}" for index in range(served)
        ]
        wanted = RESERVE + VMS * need(web)
        assert f"all VMs together need {wanted}" in states["vm30"]["paused"]
        assert f"to {wanted} or more" in states["vm30"]["paused_remedy"]
        assert not (tmp_path / "vm30-balloon.sock").exists()
        lines = [json.loads(line) for line in daemon.log().splitlines()]
        (told,) = [line for line in lines if line["event"] == "host_error"]
        assert told["consequence"].startswith(f"{VMS - served} VMs are paused")

        def use_all() -> int:
            machines = [Machine.boot(tmp_path / f"vm{i}-balloon.sock") for i in range(vmms)]
            for machine in machines:
                BalloonDriver(machine).inflate([100])
            most = open_files(daemon.process.pid)
            with pytest.raises(ConnectionLost), Machine.boot(tmp_path / "vm3-balloon.sock"):
                pass
            for machine in machines:  # they never noticed
                BalloonDriver(machine).inflate([200])
                machine.front.close()
            return most

        assert await trio.to_thread.run_sync(use_all) < hard - RESERVE // 2
        assert f"all VMs together need {wanted}" in (await daemon.status("vm3"))["paused"]
        with Machine.boot(tmp_path / "vm4-balloon.sock"):  # those that went made room
            assert (await daemon.status("vm4"))["paused"] is None
