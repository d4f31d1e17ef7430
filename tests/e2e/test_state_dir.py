"""A VM that is started anew has what an operator had given it, without being asked for it again."""

from __future__ import annotations

import pytest
from vhostd.units import MiB

from tests.e2e.conftest import VM, ServeMemory
from tests.e2e.waiting import until

pytestmark = pytest.mark.guest

PLUGGED = 256 * MiB
BALLOON = 64 * MiB


async def test_sizes_outlive_guest_and_daemon(serve_memory: ServeMemory) -> None:
    async with serve_memory(balloon=True) as served:
        without = (await served.guest.meminfo())["MemTotal"]
        await served.resize(PLUGGED)
        await served.daemon.ctl("balloon", "set", VM, str(BALLOON), "--wait")
        with_all = (await served.guest.meminfo())["MemTotal"]
    # As after a reboot of the host: nothing is left but the state directory.
    async with serve_memory(balloon=True) as served:
        mem = await until(
            served.mem, lambda mem: mem["plugged"] == PLUGGED, 60, "plugged as before"
        )
        assert mem["requested"] == PLUGGED
        await until(served.balloon, lambda now: now["actual"] == BALLOON, 60, "inflated as before")
        total = (await served.guest.meminfo())["MemTotal"]
        assert abs(total - with_all) <= MiB and total > without
