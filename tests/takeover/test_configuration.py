"""A mistake in the configuration costs the VM that it is in, and no other one its service."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import trio

from tests.daemon import VhostdProcess, children
from tests.fakes.balloon import BalloonDriver
from tests.fakes.machine import Machine

A = "[vm.a.balloon]\nstats_interval_s = 0\n"
B = "[vm.b.balloon]\nstats_interval_s = 0\n"
WRONG_A = "[vm.a.baloon]\nstats_interval_s = 0\n"
WHOLE = {
    "no TOML": A + B + "[vm.c\n",
    "a key that nobody knows": "[deamon]\n" + A + B,
    "no VM": "",
}
TIMEOUT_S = 20.0


def config_of(daemon: VhostdProcess) -> Path:
    return daemon.folder / "vhostd.toml"


async def inflate(guest: BalloonDriver, page: int) -> None:
    await trio.to_thread.run_sync(guest.inflate, [page])


def lines(daemon: VhostdProcess, event: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in daemon.log().splitlines() if line.startswith("{")]
    return [line for line in found if line["event"] == event]


async def kill(daemon: VhostdProcess, vm: str) -> None:
    worker = daemon.worker
    os.kill(worker, signal.SIGKILL)
    await daemon.replaced(worker, vm)


async def until_logged(daemon: VhostdProcess, words: str) -> None:
    with trio.fail_after(TIMEOUT_S):
        while words not in daemon.log():  # noqa: ASYNC110  # a file has no news
            await trio.sleep(0.05)


async def test_a_wrong_section_pauses_its_vm_and_the_rest_is_served(tmp_path: Path) -> None:
    async with VhostdProcess.start(tmp_path, WRONG_A + B) as daemon:
        a = await daemon.status("a")
        assert a["state"] == "paused"
        assert "vm.a.baloon: unknown key; did you mean balloon?" in a["paused"]
        assert "check-config" in a["paused_remedy"]
        assert not (tmp_path / "a-balloon.sock").exists()
        with Machine.boot(tmp_path / "b-balloon.sock") as machine:
            await inflate(BalloonDriver(machine), 100)
        (told,) = lines(daemon, "vm_paused")
        assert told["vm"] == "a" and "did you mean balloon?" in told["reason"]


async def test_a_mistake_that_came_later_pauses_its_vm_until_it_is_mended(tmp_path: Path) -> None:
    async with VhostdProcess.start(tmp_path, A + B, "--keep") as daemon:
        with (
            Machine.boot(tmp_path / "a-balloon.sock") as first,
            Machine.boot(tmp_path / "b-balloon.sock") as second,
        ):
            guests = BalloonDriver(first), BalloonDriver(second)
            for guest in guests:
                await inflate(guest, 100)
            config_of(daemon).write_text(WRONG_A + B)
            await kill(daemon, "b")
            assert (await daemon.status("a"))["state"] == "paused"
            await inflate(guests[1], 200)
            config_of(daemon).write_text(A + B)
            await kill(daemon, "a")
            for guest in guests:
                await inflate(guest, 300)
            inflated = [(await daemon.status(vm))["balloon"]["inflated"] for vm in ("a", "b")]
            assert inflated == [2 * 4096, 3 * 4096]


async def test_a_broken_file_is_not_served_and_the_one_before_is(tmp_path: Path) -> None:
    async with VhostdProcess.start(tmp_path, A + B, "--keep") as daemon:
        with Machine.boot(tmp_path / "a-balloon.sock") as machine:
            guest = BalloonDriver(machine)
            pages = 0
            for text in (*WHOLE.values(), None):
                if text is None:
                    config_of(daemon).unlink()
                else:
                    config_of(daemon).write_text(text)
                before = len(lines(daemon, "configuration_wrong"))
                await kill(daemon, "a")
                assert {vm["vm"]: vm["paused"] for vm in await daemon.statuses()} == {
                    "a": None,
                    "b": None,
                }
                pages += 1
                await inflate(guest, 100 * pages)
                told = lines(daemon, "configuration_wrong")[before:]
                assert told
                assert {line["consequence"] for line in told} == {
                    "the configuration from before is served"
                }
            assert (await daemon.status("a"))["balloon"]["inflated"] == pages * 4096


async def test_an_upgrade_waits_until_the_file_is_mended(tmp_path: Path) -> None:
    async with VhostdProcess.start(tmp_path, A + B, "--keep") as daemon:
        with Machine.boot(tmp_path / "a-balloon.sock") as machine:
            guest = BalloonDriver(machine)
            worker = daemon.worker
            config_of(daemon).write_text(WRONG_A + B)
            daemon.process.send_signal(signal.SIGHUP)
            await until_logged(daemon, "no upgrade: ")
            assert "vm.a.baloon: unknown key" in daemon.log()
            assert worker in children(daemon.process.pid)
            await inflate(guest, 100)
            config_of(daemon).write_text(A + B)
            daemon.process.send_signal(signal.SIGHUP)
            await daemon.replaced(worker, "a")
            await inflate(guest, 200)


async def test_an_address_that_can_t_be_had_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        metrics = f'[metrics]\nlisten = "127.0.0.1:{port}"\n'
        async with VhostdProcess.start(tmp_path, metrics + A) as daemon:
            with Machine.boot(tmp_path / "a-balloon.sock") as machine:
                await inflate(BalloonDriver(machine), 100)
            (told,) = lines(daemon, "host_error")
            assert f"metrics.listen: 127.0.0.1 port {port}: Address already in use" in told["error"]
            assert "then restart vhostd" in told["remedy"]
