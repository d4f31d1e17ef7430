"""vhostd is killed while a guest resets itself; afterwards the guest can be told of changes."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import trio
from vhostd.units import MiB

from tests.daemon import VhostdProcess
from tests.e2e.conftest import ONLINE_MOVABLE, VM, memory_device, qemu_options
from tests.e2e.test_takeover import wish
from tests.e2e.waiting import until
from tests.vm.guest import Guest, boot
from tests.vm.stack import Stack

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

RESETS = 3


async def reset_under(guest: Guest, daemon: VhostdProcess, generator: random.Random) -> None:
    """Have the guest reset itself, changes under way, and kill the daemon at once."""
    before = daemon.worker
    with guest.qmp.events("RESET") as resets:
        await guest.start("echo b > /proc/sysrq-trigger")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wish, daemon, "balloon", "set", VM, "0")
            nursery.start_soon(wish, daemon, "mem", "resize", VM, "0")
            await trio.sleep(generator.uniform(0, 0.3))
            os.kill(before, signal.SIGKILL)
        with trio.fail_after(30):
            await resets.receive()
    await daemon.replaced(before, VM)


async def told(daemon: VhostdProcess, mem: int, balloon: int) -> None:
    """Wish for sizes, and wait until the guest has them without having booted."""
    await daemon.ctl("mem", "resize", VM, str(mem), "--wait", "--timeout", "60", timeout_s=80)
    await daemon.ctl("balloon", "set", VM, str(balloon), "--wait", "--timeout", "60", timeout_s=80)


async def test_a_guest_can_be_told_after_each_reset_and_death(stack: Stack, tmp_path: Path) -> None:
    generator = random.Random(3)
    configuration = f"[vm.{VM}.balloon]\n{memory_device(size='1GiB')}"
    async with VhostdProcess.start(tmp_path, configuration, "--keep") as daemon:
        options, max_memory = await qemu_options(daemon, "512M")
        async with boot(
            stack,
            memory="512M",
            max_memory=max_memory,
            devices=options,
            modprobe=("virtio_balloon", "virtio_mem"),
            append=ONLINE_MOVABLE,
        ) as guest:
            for number in range(RESETS):
                await told(daemon, 256 * MiB, 64 * MiB)
                await reset_under(guest, daemon, generator)
                await guest.wait_ready()

                async def running() -> str:
                    state: str = (await daemon.status(VM))["state"]
                    return state

                await until(running, lambda state: state == "running", 30, f"boot {number}")
            await told(daemon, 128 * MiB, 32 * MiB)
            status = await daemon.status(VM)
    assert status["balloon"]["untold"] is None
    assert status["mem"][0]["untold"] is None
    log = daemon.log_path.read_text()
    assert "config_change_channel_lost" not in log
    assert "Traceback" not in log
