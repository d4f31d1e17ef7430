"""Descriptors on a file system that a VMM runs itself and that never answers: other VMs go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import trio

from tests.daemon import VhostdProcess, children
from tests.fakes.channel import ConnectionLost
from tests.fakes.frontend import FrontEnd
from tests.fakes.fuse import FLUSH, GETATTR, hung_file
from tests.fakes.machine import Machine, Setup
from tests.fakes.memory import MIB
from tests.fakes.messages import Request, WireRegion

CONFIG = """
[vm.a.balloon]
stats_interval_s = 0
[vm.b.balloon]
stats_interval_s = 0
"""
ANSWER_TIMEOUT_S = 2.0
SUCCESSOR_TIMEOUT_S = 30.0  # at worst the watchdog's 10, 5 for the end and 2 for the kernel
LONG = pytest.mark.long
REGION = WireRegion(1 << 40, MIB, 1 << 40, 0)

ACTS: dict[str, Callable[[FrontEnd, int], object]] = {
    "memory table": lambda front, fd: front.set_mem_table([REGION], [fd]),
    "memory slot": lambda front, fd: front.add_mem_reg(REGION, fd),
    "removed slot": lambda front, fd: front.rem_mem_reg(REGION, [fd]),
    "dirty log": lambda front, fd: front.set_log_base(MIB, 0, fd),
    "log event": lambda front, fd: front.set_log_fd(fd),
    "kick": lambda front, fd: front.set_vring_kick(0, fd),
    "call": lambda front, fd: front.set_vring_call(0, fd),
    "err": lambda front, fd: front.set_vring_err(0, fd),
    "back-end channel": lambda front, fd: front.tell(Request.SET_BACKEND_REQ_FD, b"", [fd]),
    "in-flight buffer": lambda front, fd: front.set_inflight_fd(MIB, 0, 1, 128, fd),
    "device state": lambda front, fd: front.set_device_state_fd(0, 0, fd),
    "one too many": lambda front, fd: front.ask(Request.GET_FEATURES, b"", [fd]),
    "half a message": lambda front, fd: front.raw(b"\1\0\0\0", [fd]),
}


async def answers(daemon: VhostdProcess, vm: str) -> bool:
    """Whether the daemon of now says that it serves a VM."""
    try:
        return bool((await daemon.status(vm))["state"] == "connected")
    except (OSError, httpx.HTTPError):
        return False  # between two daemons


async def test_a_file_that_hangs_stops_no_other_vm(tmp_path: Path) -> None:
    async with VhostdProcess.start(tmp_path, CONFIG) as daemon:
        with FrontEnd.connect(tmp_path / "b-balloon.sock", ANSWER_TIMEOUT_S) as other:
            with hung_file() as hung:
                for what, act in ACTS.items():
                    with Machine.boot(tmp_path / "a-balloon.sock", Setup()) as machine:
                        with suppress(ConnectionLost):
                            await trio.to_thread.run_sync(act, machine.front, hung.fd)
                        assert await trio.to_thread.run_sync(other.get_features), what
                hung.wait_asked(FLUSH)
                assert GETATTR not in hung.asked
                status = await daemon.status("b")
                assert status["state"] == "connected"
            assert await trio.to_thread.run_sync(other.get_features)


@pytest.mark.parametrize("end", [signal.SIGKILL, pytest.param(signal.SIGHUP, marks=LONG)])
async def test_a_daemon_that_can_t_end_is_followed_by_another(
    tmp_path: Path, end: signal.Signals
) -> None:
    """A thread of it waits for a VMM's file system, which no signal ends."""
    async with VhostdProcess.start(tmp_path, CONFIG, "--keep") as daemon:
        with (
            FrontEnd.connect(tmp_path / "a-balloon.sock") as bad,
            FrontEnd.connect(tmp_path / "b-balloon.sock") as other,
        ):
            assert await trio.to_thread.run_sync(other.get_features)
            with hung_file() as hung:
                await trio.to_thread.run_sync(bad.raw, b"\1\0\0\0", [hung.fd])
                await trio.to_thread.run_sync(hung.wait_asked, FLUSH)
                before = daemon.worker
                os.kill(daemon.process.pid if end is signal.SIGHUP else before, end)
                with trio.fail_after(SUCCESSOR_TIMEOUT_S):
                    while "left behind" not in daemon.log():  # noqa: ASYNC110 - nothing tells
                        await trio.sleep(0.05)
                assert await trio.to_thread.run_sync(other.get_features)
                assert children(daemon.process.pid)[0] == before
                with trio.fail_after(SUCCESSOR_TIMEOUT_S):
                    while not await answers(daemon, "b"):  # noqa: ASYNC110
                        await trio.sleep(0.05)
