"""A VMM that fills its call eventfd between the worker's look at it and its write, again and again.

The worker waits in write(2) then. A shim makes each attempt hit: see fakes/poll_shim.c.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest
import trio

from tests.daemon import PROGRAMS, VhostdProcess
from tests.fakes import preload
from tests.fakes.balloon import BalloonDriver, BalloonQueue, pack_pfns
from tests.fakes.frontend import FrontEnd
from tests.fakes.machine import Machine, Setup
from tests.fakes.program import wait_until

CONFIG = """
[vm.a.balloon]
stats_interval_s = 0
[vm.b.balloon]
stats_interval_s = 0
"""
IN_TIME_S = 5.0
TOLD_TIMEOUT_S = 20.0  # after 5 s, at one of two looks with 5 s between
TEXT = "thread a has not come back for"
FULL = 2**64 - 2
WRITE = {"1", "64"}  # x86-64, arm64


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a daemon whose looks find room."""
    source = Path(preload.__file__).with_name("poll_shim.c")
    library = preload.build_library(source, tmp_path_factory.mktemp("shim"))
    return {"LD_PRELOAD": preload.preloading(library)}


def in_write(pid: int) -> bool:
    """Whether the worker of VM a in this process waits in write(2)."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text() == "a\n":
            return (task / "syscall").read_text().partition(" ")[0] in WRITE
    return False


def hold_worker(daemon: int, vm: Machine) -> None:
    """Have the VM's worker wait for the VMM."""
    os.set_blocking(vm.queues[BalloonQueue.INFLATE].call_fd, True)
    os.eventfd_write(vm.queues[BalloonQueue.INFLATE].call_fd, FULL)
    BalloonDriver(vm).send(BalloonQueue.INFLATE, pack_pfns([1]))
    assert wait_until(lambda: in_write(daemon), IN_TIME_S), "it does not wait"


@asynccontextmanager
async def held(
    folder: Path, shim: dict[str, str], *arguments: str
) -> AsyncIterator[tuple[VhostdProcess, Machine, FrontEnd]]:
    """A daemon, a VM whose worker waits for its VMM, and a front end of another VM."""
    with ExitStack() as front_ends:  # which stay until the daemon has ended
        async with VhostdProcess.start(folder, CONFIG, *arguments, environment=shim) as daemon:
            b = folder / "b-balloon.sock"
            other = front_ends.enter_context(FrontEnd.connect(b, IN_TIME_S))
            assert other.get_features()
            vm = front_ends.enter_context(Machine.boot(folder / "a-balloon.sock", Setup()))
            pid = daemon.worker if arguments else daemon.process.pid
            await trio.to_thread.run_sync(hold_worker, pid, vm)
            yield daemon, vm, other


async def doctor(daemon: VhostdProcess) -> list[dict[str, str]]:
    """What it found; it exits with 1 where something is wrong."""
    command = [str(PROGRAMS / "vhostctl"), "--socket", str(daemon.control_path), "--json", "doctor"]
    done = await trio.run_process(command, capture_stdout=True, check=False)
    rows: list[dict[str, str]] = json.loads(done.stdout)
    return rows


async def metrics(daemon: VhostdProcess) -> list[str]:
    transport = httpx.AsyncHTTPTransport(uds=str(daemon.control_path))
    async with httpx.AsyncClient(transport=transport, base_url="http://vhostd") as client:
        return (await client.get("/metrics")).text.splitlines()


async def until_stuck(daemon: VhostdProcess, stuck: bool) -> None:
    """Wait until status says of VM a that a thread does not come back, or that none does so."""
    with trio.fail_after(TOLD_TIMEOUT_S):
        while ((await daemon.status("a"))["stuck"] is not None) is not stuck:  # noqa: ASYNC110
            await trio.sleep(0.1)


async def test_it_is_told(tmp_path: Path, shim: dict[str, str]) -> None:
    async with held(tmp_path, shim) as (daemon, vm, other):
        assert (await daemon.status("a"))["stuck"] is None
        await until_stuck(daemon, stuck=True)
        assert await trio.to_thread.run_sync(other.get_features)
        assert TEXT in " ".join((await daemon.ctl("status", "a")).split())
        (row,) = [row for row in await doctor(daemon) if TEXT in row["found"]]
        assert row["name"] == "a"
        assert row["verdict"] == "failed"
        assert "end its VMM" in row["remedy"]
        told = await metrics(daemon)
        assert 'vhostd_vm_stuck{vm="a"} 1.0' in told
        assert 'vhostd_vm_stuck{vm="b"} 0.0' in told
        os.eventfd_read(vm.queues[BalloonQueue.INFLATE].call_fd)
        await until_stuck(daemon, stuck=False)
        lines = [json.loads(line) for line in daemon.log().splitlines()]
        events = [line["event"] for line in lines if "worker" in line]
        assert events == ["worker_stuck", "worker_back"]


async def test_a_daemon_ends_when_it_is_asked_to(tmp_path: Path, shim: dict[str, str]) -> None:
    async with held(tmp_path, shim) as (daemon, _, other):
        assert await trio.to_thread.run_sync(other.get_features)
        assert in_write(daemon.process.pid)  # and leaving the block sends SIGTERM


async def test_the_end_of_its_vmm_is_heard_and_the_next_is_served(
    tmp_path: Path, shim: dict[str, str]
) -> None:
    async with held(tmp_path, shim) as (daemon, vm, other):
        assert await trio.to_thread.run_sync(other.get_features)
        vm.close()
        with FrontEnd.connect(tmp_path / "a-balloon.sock", IN_TIME_S) as successor:
            assert await trio.to_thread.run_sync(successor.get_features)
            assert (await daemon.status("a"))["state"] == "connected"
        assert not in_write(daemon.process.pid)


@pytest.mark.parametrize(("end", "times"), [(signal.SIGHUP, 1), (signal.SIGKILL, 2)])
async def test_successors_serve_the_other_vm(
    tmp_path: Path, shim: dict[str, str], end: signal.Signals, times: int
) -> None:
    async with held(tmp_path, shim, "--keep") as (daemon, vm, other):
        for _ in range(times):
            before = daemon.worker
            os.kill(daemon.process.pid if end is signal.SIGHUP else before, end)
            await daemon.replaced(before, "b")
            assert await trio.to_thread.run_sync(other.get_features)
        assert "has not ended" not in daemon.log()
        assert os.eventfd_read(vm.queues[BalloonQueue.INFLATE].call_fd) >= FULL
        reader = BalloonDriver(vm).queue(BalloonQueue.INFLATE)
        assert await trio.to_thread.run_sync(reader.wait_used)
