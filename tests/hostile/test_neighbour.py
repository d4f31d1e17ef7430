"""Every hostile input to one VM of a daemon, with a second VM beside it that is looked at.

How long a neighbour waits under a flood is measured by the bench; here no request of it may be held
up for long, and nothing of what it does may go wrong.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.daemon import VhostdProcess
from tests.fakes.balloon import BalloonDriver
from tests.fakes.machine import Machine
from tests.fakes.mem import BLOCK_SIZE, WINDOW_SIZE, MemDriver
from tests.fakes.memory import MIB
from tests.hostile import attacks_mem, attacks_pmem
from tests.hostile.attack import serves, strike
from tests.hostile.mem_machine import REQUESTED_BLOCKS
from tests.hostile.pmem_machine import IMAGE_SIZE, PmemDriver
from tests.hostile.test_attacks import ATTACKS

pytestmark = pytest.mark.timeout(600)

HELD_UP_S = 2.0
"""Far above what it takes on a busy host, far below what a flood or a hang costs."""
PATTERN, PATTERN_ADDR = bytes(range(256)) * 4096, 40 * MIB
USES = 20
"""Requests between two looks at the whole device."""


class Neighbour:
    """The second VM: it asks all the time, and uses its balloon."""

    def __init__(self, machine: Machine) -> None:
        """Begin at once."""
        self._machine = machine
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self.took_s: list[float] = []
        self._guest = BalloonDriver(machine)
        machine.memory.write(PATTERN_ADDR, PATTERN)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._ended.wait(0.002):
                begin_s = time.monotonic()
                self._machine.front.get_features()
                self.took_s.append(time.monotonic() - begin_s)
                if len(self.took_s) % USES == 0:
                    serves(self._guest)
        except BaseException as error:  # noqa: BLE001  # it is raised in end()
            self._error = error

    def end(self) -> None:
        """It noticed nothing."""
        self._ended.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._machine.memory.read(PATTERN_ADDR, len(PATTERN)) == PATTERN
        assert len(self.took_s) > USES
        assert max(self.took_s) < HELD_UP_S


def configuration(folder: Path) -> str:
    """VMs that are attacked, and VM b."""
    image = folder / "a.img"
    with image.open("wb") as file:
        file.truncate(IMAGE_SIZE)
    return f"""
[vm.a.balloon]
in_order = true
stats_interval_s = 0
[[vm.a.mem]]
id = "mem0"
window_address = "4GiB"
size = {WINDOW_SIZE}
requested_size = {REQUESTED_BLOCKS * BLOCK_SIZE}
[[vm.disk.pmem]]
id = "disk0"
file = "{image}"
size = {IMAGE_SIZE}
[vm.b.balloon]
stats_interval_s = 0
"""


@asynccontextmanager
async def neighbours(folder: Path) -> AsyncIterator[Neighbour]:
    """A daemon with both VMs, of which b is at work."""
    async with VhostdProcess.start(folder, configuration(folder)) as daemon:
        with Machine.boot(folder / "b-balloon.sock") as machine:
            neighbour = Neighbour(machine)
            try:
                yield neighbour
            finally:
                neighbour.end()
        assert "Traceback" not in daemon.log()
        assert (await daemon.status("b"))["paused"] is None


async def test_attacks_on_a_balloon_harm_no_neighbour(tmp_path: Path) -> None:
    def attack_all() -> None:
        for attack in ATTACKS:
            with Machine.boot(tmp_path / "a-balloon.sock", attack.setup) as machine:
                strike(attack, BalloonDriver(machine))

    async with neighbours(tmp_path):
        await trio.to_thread.run_sync(attack_all)


async def test_attacks_on_a_memory_device_harm_no_neighbour(tmp_path: Path) -> None:
    def attack_all() -> None:
        for attack in attacks_mem.ATTACKS:
            with MemDriver.boot(tmp_path / "a-mem0.sock", size=WINDOW_SIZE) as guest:
                attacks_mem.prepare(guest)
                attacks_mem.strike(attack, guest)

    async with neighbours(tmp_path):
        await trio.to_thread.run_sync(attack_all)


async def test_attacks_on_a_disk_harm_no_neighbour(tmp_path: Path) -> None:
    def attack_all() -> None:
        for attack in attacks_pmem.ATTACKS:
            with PmemDriver.boot(tmp_path / "disk-disk0.sock") as guest:
                attacks_pmem.strike(attack, guest)

    async with neighbours(tmp_path):
        await trio.to_thread.run_sync(attack_all)
