"""What one VM may have kept is bounded, so that another's is never missing."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from vhostd.config import VmConfig, load
from vhostd.handover.state_dir import StateDir
from vhostd.memory.registry import FILES_PER_VM_MAX
from vhostd.takeover import inherit

from tests.daemon import VhostdProcess
from tests.fakes.balloon import BalloonDriver
from tests.fakes.machine import Machine, Setup
from tests.fakes.memory import MIB, PAGE_SIZE, open_memfd
from tests.fakes.messages import WireRegion
from tests.keeper.keeping import closing

GREEDY = "production-web-01"
CONFIGURATION = f"""
[vm.{GREEDY}.balloon]
stats_interval_s = 0
[[vm.{GREEDY}.mem]]
id = "mem0"
window_address = 0x100000000
size = "512MiB"
[vm.b.balloon]
stats_interval_s = 0
"""
FILES_FOREIGN = 0x4000_0000_0000
MEM = Setup(queue_count=1, config_size=56)


def fill(*machines: Machine) -> int:
    """Have each add files to its memory table until it is refused; how many there were."""
    count = 0
    for number, machine in enumerate(machines):
        for index in range(FILES_PER_VM_MAX + 1):
            address = FILES_FOREIGN + (number * 1024 + index) * PAGE_SIZE
            region = WireRegion(address, PAGE_SIZE, address, 0)
            with closing(fd := open_memfd(PAGE_SIZE)):
                if machine.front.add_mem_reg(region, fd):
                    break
            count += 1
    return count


async def in_thread(work: Callable[[], object]) -> None:
    await trio.to_thread.run_sync(work)


async def test_a_vm_with_many_memory_files_costs_no_other_vm_its_take_over(
    tmp_path: Path,
) -> None:
    async with VhostdProcess.start(tmp_path, CONFIGURATION, "--keep") as daemon:
        with (
            Machine.boot(tmp_path / f"{GREEDY}-balloon.sock") as balloon,
            Machine.boot(tmp_path / f"{GREEDY}-mem0.sock", MEM) as mem,
            Machine.boot(tmp_path / "b-balloon.sock") as other,
        ):
            found = await trio.to_thread.run_sync(fill, balloon, mem)
            assert found == FILES_PER_VM_MAX - 2  # each machine's own RAM is a file, too
            guest = BalloonDriver(other)
            await in_thread(lambda: guest.inflate([8 * MIB // PAGE_SIZE]))
            worker = daemon.worker
            os.kill(worker, signal.SIGKILL)
            await daemon.replaced(worker, "b")
            await in_thread(lambda: guest.inflate([16 * MIB // PAGE_SIZE]))
            assert (await daemon.status("b"))["balloon"]["inflated"] == 2 * PAGE_SIZE
            for vm in ("b", GREEDY):
                status = await daemon.status(vm)
                assert (status["kept"], status["not_kept"]) == (True, None)
            assert (await daemon.status(GREEDY))["state"] == "running"


def vms(folder: Path) -> list[VmConfig]:
    text = "".join(f"[vm.{name}.balloon]\n" for name in ("one", "two", "three"))
    path = folder / "vhostd.toml"
    path.write_text(text)
    return list(load(path, runtime_dir=folder, state_dir=folder).vms.values())


def test_vms_for_which_the_store_has_no_room_are_left_alone_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("FDSTORE", "11")  # four descriptors a VM, and three beside them
        legacy = inherit(vms(tmp_path), StateDir(None), {})
        legacy.leave()
    assert list(legacy.paused) == ["three"]
    assert "room for 11" in legacy.paused["three"].reason
    assert "to 15 or more" in legacy.paused["three"].reason
