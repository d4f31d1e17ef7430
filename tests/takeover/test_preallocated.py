"""Memory of a window with prealloc stays allocated though its guest reports it free."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import trio

from tests.fakes.balloon import BalloonDriver
from tests.fakes.machine import Machine, Setup
from tests.fakes.memory import MIB, PAGE_SIZE, GuestMemory, Region, open_memfd
from tests.takeover.kept import VM, Kept

WINDOW, WINDOW_SIZE = 0x1_0000_0000, 64 * MIB
CONFIGURATION = f"""
[vm.{VM}.balloon]
stats_interval_s = 0
[[vm.{VM}.mem]]
id = "mem0"
window_address = {WINDOW}
size = "64MiB"
"""


def guest_memory() -> GuestMemory:
    """RAM, and a window behind it."""
    places = [Region(0, 64 * MIB, 0), Region(WINDOW, WINDOW_SIZE, 64 * MIB)]
    return GuestMemory(open_memfd(128 * MIB), places)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("prealloc", [True, False])
async def test_a_report_takes_nothing_that_was_allocated_ahead(
    tmp_path: Path, prealloc: bool
) -> None:
    def work(kept: Kept) -> None:
        with Machine.boot(kept.socket("balloon"), Setup(make_memory=guest_memory)) as machine:
            guest = BalloonDriver(machine)
            for _ in range(2):
                for addr in (32 * MIB, WINDOW):
                    machine.memory.touch(addr, 2 * MIB)
                guest.report([(32 * MIB, 2 * MIB), (WINDOW, 2 * MIB)])
                assert machine.memory.pages_present(32 * MIB, 2 * MIB // PAGE_SIZE) == 0
                kept_pages = 2 * MIB // PAGE_SIZE if prealloc else 0
                assert machine.memory.pages_present(WINDOW, 2 * MIB // PAGE_SIZE) == kept_pages
                kept.die()

    text = CONFIGURATION + f"prealloc = {str(prealloc).lower()}\n"
    async with Kept.start(tmp_path, text) as kept:
        await trio.to_thread.run_sync(partial(work, kept))
