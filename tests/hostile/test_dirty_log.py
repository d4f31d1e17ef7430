"""Dirty logs that a VMM takes back while they are written to, or that are none."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from tests.daemon import VhostdProcess
from tests.fakes.balloon import BalloonDriver
from tests.fakes.frontend import FrontEnd
from tests.fakes.machine import Machine, Setup
from tests.fakes.memory import MIB, huge_pages, open_hugetlb, open_memfd
from tests.fakes.program import Program

CONFIG = """
[vm.a.balloon]
stats_interval_s = 0
[vm.b.balloon]
stats_interval_s = 0
"""
ANSWER_TIMEOUT_S = 5.0
LOG_ALL = 1 << 26  # VHOST_F_LOG_ALL
KILLS = 3
TRIES = 50


@contextmanager
def flipping(fd: int) -> Iterator[None]:
    """The file has no byte and all of them by turns, as quickly as may be."""
    ended = threading.Event()

    def flip() -> None:
        while not ended.is_set():
            os.ftruncate(fd, 0)
            os.ftruncate(fd, MIB)

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def begin_logging(vm: Machine, log: int) -> None:
    """As QEMU does when a migration begins."""
    vm.front.set_log_base(MIB, 0, log)
    assert vm.front.set_features(vm.features | LOG_ALL) == 0
    for index, queue in enumerate(vm.queues):
        parts = queue.parts
        assert vm.front.set_vring_addr(index, parts.desc, parts.avail, parts.used, 1, 0) == 0
    BalloonDriver(vm).inflate([1])
    assert any(os.pread(log, MIB, 0)), "nothing is marked, so that nothing is shown"


@pytest.mark.parametrize("how", ["gone", pytest.param("flipping", marks=pytest.mark.long)])
async def test_a_log_that_is_truncated_kills_no_successor(tmp_path: Path, how: str) -> None:
    async with VhostdProcess.start(tmp_path, CONFIG, "--keep") as daemon:
        with (
            FrontEnd.connect(tmp_path / "b-balloon.sock", ANSWER_TIMEOUT_S) as other,
            Machine.boot(tmp_path / "a-balloon.sock", Setup()) as vm,
        ):
            log = open_memfd(MIB)
            await trio.to_thread.run_sync(begin_logging, vm, log)
            os.ftruncate(log, 0)
            if how == "gone":
                await successors_serve(daemon, vm, other)
            else:
                with flipping(log):
                    await successors_serve(daemon, vm, other)
            os.close(log)


async def successors_serve(daemon: VhostdProcess, vm: Machine, other: FrontEnd) -> None:
    """Kill daemons, with requests of the VM in their hands; none dies of its log."""
    for _ in range(KILLS):
        before = daemon.worker
        vm.queues[0].kick()
        os.kill(before, signal.SIGKILL)
        await daemon.replaced(before, "b")
        assert await trio.to_thread.run_sync(other.get_features)
    deaths = [line for line in daemon.log().splitlines() if "died by signal" in line]
    assert len(deaths) == KILLS
    assert all("signal 9 " in line for line in deaths)


def test_a_log_of_huge_pages_leaves_no_mapping(tmp_path: Path) -> None:
    """Its part must be mapped in whole huge pages; each that could not be unmapped was one more."""
    program = Program.start("vhostd-balloon", tmp_path)
    try:
        with huge_pages(1), Machine.boot(program.socket_path, Setup()) as vm:
            log = open_hugetlb(2 * MIB)
            vm.front.set_log_base(4096, 0, log)
            before = len(program.maps())
            for _ in range(TRIES):
                vm.front.set_log_base(4096, 0, log)
            assert len(program.maps()) <= before + 1
            BalloonDriver(vm).inflate([1])
            os.close(log)
    finally:
        program.kill()
