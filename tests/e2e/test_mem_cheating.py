"""A guest that uses memory nobody plugged: found exactly, told, and dealt with."""

from __future__ import annotations

import json
from typing import Any

import pytest
from vhostd.units import MiB

from tests.e2e.conftest import (
    KERNELS,
    VM,
    WINDOW_ADDRESS,
    ServedMemory,
    ServeMemory,
    memory_device,
)
from tests.e2e.waiting import until
from tests.sampling import sampled

pytestmark = pytest.mark.guest

BLOCK_SIZE = 2 * MiB
FIRST_BLOCK = 100
POKED_SIZE = 6 * MiB


async def cheat(served: ServedMemory) -> dict[str, Any]:
    """Write to three unplugged blocks as root of the guest; what the daemon says then.

    The driver reserves the window while it is bound; its start told the daemon about the memory.
    """
    await served.guest.run(
        "cd /sys/bus/virtio/drivers/virtio_mem; for one in virtio*; do echo $one > unbind; done"
    )
    address = WINDOW_ADDRESS + FIRST_BLOCK * BLOCK_SIZE
    said = await served.guest.run(f"guesttool poke {address:#x} {POKED_SIZE // MiB}")
    assert said.split() == ["poked", str(POKED_SIZE // 4096), "pages"]
    mem: dict[str, Any] = await until(
        served.mem, lambda mem: mem["violations"] == 3, 5, "three violations"
    )
    return mem


async def violation_event(served: ServedMemory) -> dict[str, Any]:
    """The one event about it."""
    lines = (await served.daemon.ctl("--json", "events")).splitlines()
    (event,) = (event for event in map(json.loads, lines) if event["event"] == "mem_violation")
    found: dict[str, Any] = event
    return found


@sampled("kernel", KERNELS, every_day=["6.12"])
async def test_memory_in_unplugged_blocks_is_reported(
    kernel: str, serve_memory: ServeMemory
) -> None:
    async with serve_memory(kernel) as served:
        mem = await cheat(served)
        assert mem["violating_blocks"] == [[FIRST_BLOCK, 3]]
        assert mem["violating_size"] == POKED_SIZE == served.window_memory()
        event = await violation_event(served)
        assert (event["device"], event["blocks"]) == ("mem0", [[FIRST_BLOCK, 3]])
        assert (event["size"], event["action"]) == (POKED_SIZE, "report")
        assert "3 ever, 6 MiB in unplugged blocks now" in await served.daemon.ctl("status", VM)


async def test_with_discard_the_memory_is_gone(serve_memory: ServeMemory) -> None:
    devices = memory_device(options='on_violation = "discard"')
    async with serve_memory(devices=devices) as served:
        await cheat(served)
        mem = await until(served.mem, lambda mem: mem["violating_size"] == 0, 10, "gone")
        assert served.window_memory() == 0
        assert mem["violations"] == 3
        # What it does again counts again.
        await served.guest.run(f"guesttool poke {WINDOW_ADDRESS:#x} 2")
        await until(served.mem, lambda mem: mem["violations"] == 4, 5, "the fourth")


async def test_with_stop_the_vm_is_paused(serve_memory: ServeMemory) -> None:
    devices = memory_device(options='on_violation = "stop"')
    async with serve_memory(devices=devices) as served:
        await cheat(served)

        async def status() -> str:
            found: str = (await served.guest.qmp.execute("query-status"))["status"]
            return found

        await until(status, lambda now: now == "paused", 5, "the VM is paused")
        assert "uses 6 MiB of unplugged memory" in served.daemon.log()
        await served.guest.qmp.execute("cont")
