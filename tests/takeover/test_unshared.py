"""Guest memory that the VMM does not share is named: by the address that failed, and by QMP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from tests.fakes.balloon import BalloonDriver, BalloonQueue
from tests.fakes.driver import Buffer
from tests.fakes.frontend import Refused
from tests.fakes.machine import Machine, Setup
from tests.fakes.memory import PAGE_SIZE
from tests.fakes.monitor import monitor
from tests.native.rig import wait_until
from tests.takeover.kept import VM, Kept

DIMM = 1 << 40  # guest memory that is in no region

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def qmp(tmp_path: Path) -> Path:
    return tmp_path / "qmp.sock"


@pytest.fixture
async def kept(tmp_path: Path, qmp: Path) -> AsyncIterator[Kept]:
    configuration = f'[vm.{VM}]\nqmp = "{qmp}"\n[vm.{VM}.balloon]\nstats_interval_s = 0\n'
    async with Kept.start(tmp_path, configuration) as found:
        yield found


async def in_thread(work: Callable[[], None]) -> None:
    """The fake guest waits, and vhostd's keeper is watched by this loop."""
    await trio.to_thread.run_sync(work)


def unshared(kept: Kept) -> str:
    found: str | None = kept.status()["unshared"]
    return found or ""


async def test_a_ring_in_memory_that_is_not_shared_is_told_by_its_address(kept: Kept) -> None:
    """QEMU sends no region for such RAM; its driver believes that the device runs."""

    def work() -> None:
        with Machine.realize(kept.socket("balloon"), Setup()) as machine:
            assert unshared(kept) == ""
            with pytest.raises(Refused):
                machine.start(with_memory=False)
            assert f"balloon: guest address {machine.queues[0].parts.desc:#x}" in unshared(kept)
            assert "share=on?" in unshared(kept)
            assert kept.status()["state"] == "connected"
            told = unshared(kept)
            kept.die()
            assert unshared(kept) == told
            machine.start()
            wait_until(lambda: kept.status()["state"] == "running")
            assert unshared(kept) == ""

    await in_thread(work)


async def test_a_request_in_memory_that_is_not_shared_is_told_by_its_address(kept: Kept) -> None:
    def work() -> None:
        with Machine.boot(kept.socket("balloon"), Setup()) as machine:
            ring = machine.queues[BalloonQueue.INFLATE]
            ring.add_chain([Buffer(DIMM + 5 * PAGE_SIZE, PAGE_SIZE)])
            ring.kick()
            assert ring.wait_err()
            for _ in range(2):
                assert f"{DIMM + 5 * PAGE_SIZE:#x}" in unshared(kept)
                assert kept.status()["faults"] == {str(BalloonQueue.INFLATE.value): "address"}
                kept.die()

    await in_thread(work)


async def test_free_memory_that_is_not_shared_is_told_by_its_address(kept: Kept) -> None:
    """The first that is heard of a DIMM without share=on: the guest reports it free."""

    def work() -> None:
        with Machine.boot(kept.socket("balloon"), Setup()) as machine:
            BalloonDriver(machine).report([(DIMM, PAGE_SIZE)])
            for _ in range(2):
                assert f"{DIMM:#x}" in unshared(kept)
                assert kept.status()["faults"] == {}
                kept.die()
        wait_until(lambda: kept.status()["state"] == "waiting")
        assert unshared(kept) == ""

    await in_thread(work)


async def test_a_memory_backend_that_is_not_shared_is_told_when_it_is_plugged(
    kept: Kept, qmp: Path
) -> None:
    def work() -> None:
        with (
            monitor(qmp, {}) as vmm,
            Machine.boot(kept.socket("balloon"), Setup()),
        ):
            wait_until(lambda: kept.status()["discards"]["finding"] == "free")
            assert unshared(kept) == ""
            vmm.backends = [*vmm.backends, {"id": "m1", "share": False}]
            wait_until(lambda: unshared(kept) == "memory backends without share=on: m1", 20)
            assert "memory_unshared" in kept.log
            vmm.backends = vmm.backends[:1]
            wait_until(lambda: unshared(kept) == "", 20)

    await in_thread(work)
