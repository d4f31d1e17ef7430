"""What each way to end vhostd does to a guest's fsync, under a real systemd and our own unit."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from tests.systemd.guests import CONFIGURATION, UNIT, Served, new_machine, served_guest
from tests.systemd.machine import CommandFailed
from tests.vm.stack import Stack

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

KEEPS_STOPPED_SINCE = 254
"""FileDescriptorStorePreserve= came with it."""

GAP_MAX_S = 15.0
"""Far above what is aimed at: these are tests of correctness, the figures are printed."""

CONFIG = "/etc/vhostd/vhostd.toml"
WATCHDOG_S = 10.0
ABORT_S = 2.0


@asynccontextmanager
async def serving(tree: Path, folder: Path, stack: Stack) -> AsyncIterator[Served]:
    """A guest at work; the guest and what it wrote are whole at the end."""
    async with served_guest(new_machine(folder, tree), stack) as served:
        yield served


def say(served: Served, version: int, what: str, gap_s: float | None) -> None:
    """A line of the table in docs/operations.md."""
    effect = "waits until systemctl start" if gap_s is None else f"waits {gap_s:.1f} s"
    print(f"systemd {version}: {what}: fsync {effect}; {len(served.records.times_s)} records")


async def ends_in_a_successor(
    served: Served, what: str, act: Callable[[], Awaitable[object]], gap_max_s: float = GAP_MAX_S
) -> None:
    """The guest's fsync goes on by itself after an act that ends vhostd."""
    before = await served.main_pid()

    async def act_and_wait() -> None:
        await act()
        await served.replaced(before)

    gap_s = await served.records.longest_gap_s(act_and_wait)
    say(served, await served.machine.version(), what, gap_s)
    assert gap_s <= gap_max_s
    assert (await served.status())["state"] == "running"


async def stop(served: Served) -> str:
    """`systemctl stop`; what it said where it was refused, else ""."""
    try:
        await served.machine.run("systemctl", "stop", UNIT)
    except CommandFailed as failed:
        return failed.output
    return ""


async def stopping_leaves_guests_to_a_successor(served: Served) -> None:
    """systemctl stop: refused, or the guest waits for systemctl start."""
    version = await served.machine.version()
    pid = await served.main_pid()
    stored = await served.stored()
    said = await stop(served)
    journal = await served.machine.journal(UNIT, "-p", "warning")
    if version < KEEPS_STOPPED_SINCE:
        assert "canceled" in said
        assert "restarted, not stopped: VMs are connected: web" in journal
        gap_s = await served.records.longest_gap_s(lambda: served.replaced(pid))
        say(served, version, "systemctl stop (refused: a restart)", gap_s)
    else:
        assert said == ""
        assert "is stopped while VMs are connected: web" in journal
        assert await served.records.hangs()
        assert await served.stored() == stored
        say(served, version, "systemctl stop", None)
        await served.machine.run("systemctl", "start", UNIT)
    await served.records.goes_on()
    assert (await served.status())["state"] == "running"


async def a_broken_configuration_costs_no_guest(served: Served) -> None:
    """Restart with a mistake in the file: the configuration from before is served."""
    at = served.machine.path(CONFIG)
    at.write_text("[daemon\n")
    await ends_in_a_successor(
        served,
        "restart with a broken configuration",
        lambda: served.machine.run("systemctl", "restart", UNIT),
    )
    assert "configuration_wrong" in await served.machine.journal(UNIT)
    assert int(await served.machine.property(UNIT, "NRestarts")) <= 5
    at.write_text(CONFIGURATION)
    await ends_in_a_successor(
        served,
        "restart when it is mended",
        lambda: served.machine.run("systemctl", "restart", UNIT),
    )


async def test_deaths_restarts_and_stops_under_this_machine_s_systemd(
    machine_tree: Path, tmp_path: Path, stack: Stack
) -> None:
    async with serving(machine_tree, tmp_path, stack) as served:
        await ends_in_a_successor(served, "kill -9", lambda: served.kill("KILL"))
        await stopping_leaves_guests_to_a_successor(served)
        # What the shipped configuration offers works in the shipped sandbox.
        metrics = await served.machine.run(
            "/opt/vhostd/bin/python3",
            "-c",
            "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9713/metrics').read())",
        )
        assert "vhostd_build_info" in metrics
        lines = (await served.machine.journal(UNIT, "-o", "json")).splitlines()
        of_stop = [
            line for line in map(json.loads, lines) if "VMs are connected" in line["MESSAGE"]
        ]
        assert [line["PRIORITY"] for line in of_stop] == ["4"]


@pytest.mark.long
async def test_every_way_to_end_it(tree: Path, tmp_path: Path, stack: Stack) -> None:
    async with serving(tree, tmp_path, stack) as served:
        machine = served.machine
        await ends_in_a_successor(served, "kill -9", lambda: served.kill("KILL"))
        await ends_in_a_successor(served, "kill -SEGV", lambda: served.kill("SEGV"))
        await ends_in_a_successor(served, "kill -TERM", lambda: served.kill("TERM"))
        await ends_in_a_successor(
            served, "systemctl restart", lambda: machine.run("systemctl", "restart", UNIT)
        )
        await stopping_leaves_guests_to_a_successor(served)
        await ends_in_a_successor(
            served,
            "SIGSTOP until the watchdog fires",
            lambda: served.kill("STOP"),
            WATCHDOG_S + ABORT_S + GAP_MAX_S,
        )
        gap_s = await served.records.longest_gap_s(
            lambda: machine.run("systemctl", "daemon-reexec")
        )
        say(served, await machine.version(), "systemctl daemon-reexec", gap_s)
        assert gap_s <= GAP_MAX_S
        await ends_in_a_successor(served, "kill -9 after it", lambda: served.kill("KILL"))
        await a_broken_configuration_costs_no_guest(served)


@pytest.mark.long
async def test_a_unit_that_is_not_enabled_is_not_stopped_either(
    tree: Path, tmp_path: Path, stack: Stack
) -> None:
    # systemd 254 and later forget a stopped unit, and what it stored, unless one refers to it.
    async with serving(tree, tmp_path, stack) as served:
        await served.machine.run("systemctl", "disable", UNIT)
        pid = await served.main_pid()
        assert "canceled" in await stop(served)
        gap_s = await served.records.longest_gap_s(lambda: served.replaced(pid))
        say(served, await served.machine.version(), "systemctl stop, not enabled", gap_s)


@pytest.mark.long
async def test_the_end_of_the_host_is_not_held_up(tree: Path, tmp_path: Path, stack: Stack) -> None:
    async with serving(tree, tmp_path, stack) as served:
        with trio.fail_after(30):
            with suppress(CommandFailed):  # it may end before it has answered
                await served.machine.run("systemctl", "poweroff")
            await served.machine.wait_end()
