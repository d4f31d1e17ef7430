"""A second real front end: Linux' own, virtio_uml, with a guest behind it that has a balloon."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from vhostd.units import MiB

from tests.daemon import VhostdProcess
from tests.e2e.conftest import BALLOON_SOCKET, VM
from tests.e2e.waiting import until
from tests.vm import uml
from tests.vm.stack import Stack

pytestmark = pytest.mark.guest

# virtio_uml starts every ring at base 0, which of a packed one is the second way round.
CONFIGURATION = f"""
[vm.{VM}.balloon]
socket = "{BALLOON_SOCKET}"
packed = false
free_page_reporting = false
stats_interval_s = 1
"""
TARGET = 64 * MiB


async def test_a_user_mode_linux_has_its_balloon_over_a_death_of_vhostd(
    stack: Stack,  # its busybox is the guest's
    tmp_path: Path,
) -> None:
    kernel = uml.ensure()
    async with VhostdProcess.start(tmp_path, CONFIGURATION, "--keep") as daemon:

        async def balloon() -> dict[str, Any]:
            found: dict[str, Any] = (await daemon.status(VM))["balloon"]
            return found

        await daemon.ctl("balloon", "set", VM, str(TARGET))
        async with uml.boot(kernel, tmp_path, tmp_path / BALLOON_SOCKET) as guest:
            await until(
                balloon,
                lambda now: now["actual"] == now["inflated"] == TARGET,
                30,
                "inflated",
            )
            await guest.run("dd if=/dev/urandom of=/tmp/kept bs=1M count=16")
            kept = await guest.run("md5sum /tmp/kept")
            worker = daemon.worker
            os.kill(worker, signal.SIGKILL)
            await daemon.replaced(worker, VM)
            # Each set of statistics is a kick, and a call on a socket that was kept.
            before = (await balloon())["stats_updates"]
            await until(
                balloon, lambda now: now["stats_updates"] >= before + 3, 30, "statistics go on"
            )
            assert await guest.run("md5sum /tmp/kept") == kept
            assert (await daemon.status(VM))["messages_refused"] == 0
            assert (await balloon())["inflated"] == TARGET
