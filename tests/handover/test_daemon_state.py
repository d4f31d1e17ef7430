"""What outlives a daemon and its host, and state a release cannot read; no guest."""

from __future__ import annotations

import json
import os
import signal
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.daemon import ControlFailed, VhostdProcess
from tests.e2e.waiting import until
from tests.fakes.balloon import BalloonDriver, BalloonQueue
from tests.fakes.channel import ConnectionLost
from tests.fakes.machine import Machine
from tests.hostile.attack import serves

VM = "web"
MEM = """
[[vm.web.mem]]
id = "mem0"
window_address = 0x240000000
size = "1GiB"
block_size = "2MiB"
requested_size = "{requested}"
"""
CONFIGURATION = f"[vm.{VM}.balloon]\n" + MEM.format(requested="64MiB")
STATE = "memfd:vhostd-web"
SLOTS_START = 64  # bytes of a state memfd's header
VERSION_PLACE = 8  # of a state memfd's header, after its magic
UNHEARD_OF = 99
WAIT_S = 30.0
CHANGES = [
    ("balloon", "set", VM, "0"),
    ("balloon", "hint", VM),
    ("balloon", "stats", VM, "--fresh"),
    ("mem", "resize", VM, "0"),
    ("memory", "set", VM, "1G"),
    ("pmem", "flush", VM),
    ("pmem", "drop-cache", VM),
    ("pmem", "clear", VM),
]


async def sizes(daemon: VhostdProcess) -> tuple[int, int]:
    """The balloon's target and what is requested of mem0, bytes."""
    status = await daemon.status(VM)
    return status["balloon"]["target"], status["mem"][0]["requested"]


def lines(daemon: VhostdProcess, event: str) -> list[dict[str, str]]:
    """What was logged of an event."""
    return [
        line
        for text in daemon.log().splitlines()
        if text.startswith("{") and (line := json.loads(text))["event"] == event
    ]


async def test_wishes_outlive_the_daemon_and_its_host(tmp_path: Path) -> None:
    async with VhostdProcess.start(tmp_path, CONFIGURATION) as daemon:
        assert await sizes(daemon) == (0, 64 << 20)
        await daemon.ctl("balloon", "set", VM, "96M")
        await daemon.ctl("mem", "resize", VM, "512M")
    async with VhostdProcess.start(tmp_path, CONFIGURATION) as daemon:
        assert await sizes(daemon) == (96 << 20, 512 << 20)
        assert not lines(daemon, "state_set_aside")
    # What an operator writes into the file later counts more than what one said before.
    configuration = f"[vm.{VM}.balloon]\n" + MEM.format(requested="128MiB")
    async with VhostdProcess.start(tmp_path, configuration) as daemon:
        assert await sizes(daemon) == (96 << 20, 128 << 20)


async def test_damaged_state_is_set_aside_and_the_vm_begins_as_configured(tmp_path: Path) -> None:
    async with VhostdProcess.start(tmp_path, CONFIGURATION) as daemon:
        await daemon.ctl("balloon", "set", VM, "96M")
    file = tmp_path / f"{VM}.json"
    damaged = file.read_bytes().replace(b"100663296", b"100663297")
    file.write_bytes(damaged)
    async with VhostdProcess.start(tmp_path, CONFIGURATION) as daemon:
        assert await sizes(daemon) == (0, 64 << 20)
        (line,) = lines(daemon, "state_set_aside")
        assert line["file"] == str(file)
        assert await trio.Path(line["moved_to"]).read_bytes() == damaged


async def test_a_wish_that_no_longer_fits_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    async with VhostdProcess.start(tmp_path, CONFIGURATION) as daemon:
        await daemon.ctl("balloon", "set", VM, "96M")
        await daemon.ctl("mem", "resize", VM, "512M")
    smaller = CONFIGURATION.replace("1GiB", "256MiB")
    async with VhostdProcess.start(tmp_path, smaller) as daemon:
        assert await sizes(daemon) == (96 << 20, 64 << 20)
        (line,) = lines(daemon, "state_set_aside")
        assert line["device"] == "mem0"


async def killed(daemon: VhostdProcess, vm: str = VM) -> None:
    """Kill the daemon and wait until another answers."""
    before = daemon.worker
    os.kill(before, signal.SIGKILL)
    await daemon.replaced(before, vm)


def state_file(daemon: VhostdProcess) -> int:
    """The VM's state memfd; the keeper has the same in a bundle."""
    for link in Path(f"/proc/{daemon.worker}/fd").iterdir():
        if STATE in str(link.readlink()):
            return os.open(link, os.O_RDWR)
    raise AssertionError("the daemon has no state memfd")


@asynccontextmanager
async def served(folder: Path, configuration: str) -> AsyncIterator[tuple[VhostdProcess, Machine]]:
    """A kept daemon and a machine with a balloon."""
    async with VhostdProcess.start(folder, configuration, "--keep") as daemon:
        with Machine.boot(folder / f"{VM}-balloon.sock") as machine:
            yield daemon, machine


async def test_state_of_another_release_leaves_the_vm_alone_until_that_is_back(
    tmp_path: Path,
) -> None:
    async with served(tmp_path, CONFIGURATION) as (daemon, machine):
        await daemon.ctl("balloon", "set", VM, "96M")
        state = state_file(daemon)
        (version,) = struct.unpack("<I", os.pread(state, 4, VERSION_PLACE))
        os.pwrite(state, struct.pack("<I", UNHEARD_OF), VERSION_PLACE)
        await killed(daemon)
        status = await daemon.status(VM)
        assert status["state"] == "paused"
        assert str(UNHEARD_OF) in status["paused"]
        assert str(UNHEARD_OF) in await daemon.ctl("status", VM)
        for words in CHANGES:
            with pytest.raises(ControlFailed) as refusal:
                await daemon.ctl(*words)
            assert refusal.value.status == 1 and "is paused: " in refusal.value.output
        assert len(lines(daemon, "vm_paused")) == 1
        # It is not hung up, and what it asks is answered once somebody can.
        os.pwrite(state, struct.pack("<I", version), VERSION_PLACE)
        os.close(state)
        await killed(daemon)
        await trio.to_thread.run_sync(serves, BalloonDriver(machine), BalloonQueue.INFLATE)
        assert (await sizes(daemon))[0] == 96 << 20
        assert (await daemon.status(VM))["paused"] is None


async def test_a_state_that_contradicts_the_configuration_leaves_the_vm_alone(
    tmp_path: Path,
) -> None:
    async with served(tmp_path, CONFIGURATION) as (daemon, machine):
        await daemon.ctl("mem", "resize", VM, "128M")
        (tmp_path / "vhostd.toml").write_text(CONFIGURATION.replace("1GiB", "256MiB"))
        await killed(daemon)
        assert "another size" in (await daemon.status(VM))["paused"]
        (tmp_path / "vhostd.toml").write_text(CONFIGURATION)
        await killed(daemon)
        await trio.to_thread.run_sync(serves, BalloonDriver(machine), BalloonQueue.INFLATE)


async def test_a_vm_taken_out_of_the_configuration_is_told_and_can_come_back(
    tmp_path: Path,
) -> None:
    other = "\n[vm.db.balloon]\n"
    async with served(tmp_path, CONFIGURATION + other) as (daemon, machine):
        (tmp_path / "vhostd.toml").write_text(other)
        os.kill(daemon.worker, signal.SIGKILL)

        async def told() -> int:
            return len(lines(daemon, "vm_paused"))

        await until(told, lambda count: count == 1, WAIT_S, "it is told")
        (tmp_path / "vhostd.toml").write_text(CONFIGURATION + other)
        await killed(daemon)
        await trio.to_thread.run_sync(serves, BalloonDriver(machine), BalloonQueue.INFLATE)


async def test_a_connection_without_a_record_is_hung_up_on(tmp_path: Path) -> None:
    """Its predecessor died before it recorded anything: a VMM must not wait for ever."""
    async with served(tmp_path, CONFIGURATION) as (daemon, machine):
        state = state_file(daemon)
        size = os.fstat(state).st_size
        os.pwrite(state, bytes(size - SLOTS_START), SLOTS_START)
        os.close(state)
        await killed(daemon)
        with pytest.raises(ConnectionLost):
            await trio.to_thread.run_sync(machine.front.get_features)
        with Machine.boot(tmp_path / f"{VM}-balloon.sock") as another:
            await trio.to_thread.run_sync(serves, BalloonDriver(another), BalloonQueue.INFLATE)


async def test_events_are_numbered_on(tmp_path: Path) -> None:
    """Who reads on after a number misses nothing and sees nothing twice."""

    async def numbers() -> list[int]:
        told = await daemon.ctl("--json", "events")
        return [json.loads(line)["id"] for line in told.splitlines()]

    async with served(tmp_path, CONFIGURATION) as (daemon, _machine):
        seen: list[int] = []
        for size in ("8M", "16M", "24M"):
            await daemon.ctl("balloon", "set", VM, size)
            now = await numbers()
            assert now == sorted(set(now))
            assert now[0] > max(seen, default=0)
            seen += now
            await killed(daemon)


async def test_memory_that_was_truncated_pauses_its_vm_alone(tmp_path: Path) -> None:
    other = "\n[vm.db.balloon]\n"
    async with served(tmp_path, CONFIGURATION + other) as (daemon, machine):
        with Machine.boot(tmp_path / "db-balloon.sock") as neighbour:
            os.ftruncate(machine.memory.fd, 0)
            await killed(daemon, "db")
            status = await daemon.status(VM)
            assert status["state"] == "paused"
            assert status["paused"]
            assert len(lines(daemon, "vm_paused")) == 1
            assert "Traceback" not in await daemon.ctl("status", VM)
            await trio.to_thread.run_sync(serves, BalloonDriver(neighbour), BalloonQueue.INFLATE)
        await until(
            lambda: daemon.status("db"), lambda now: now["state"] == "waiting", WAIT_S, "it ended"
        )
