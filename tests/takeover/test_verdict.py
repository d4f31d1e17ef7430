"""Nothing is discarded before the VMM's monitor has said that nothing pins guest memory.

At the first boot, after a take-over with requests in the rings, and for the next VMM.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from tests.fakes.balloon import BalloonDriver, BalloonQueue
from tests.fakes.driver import Buffer
from tests.fakes.machine import Machine, Setup
from tests.fakes.mem import BlockState, MemAnswer, MemDriver, MemRequest, pack_request
from tests.fakes.memory import MIB, PAGE_SIZE
from tests.fakes.monitor import VFIO, monitor
from tests.native.rig import wait_until
from tests.takeover.kept import VM, Kept

PAGE = 32 * MIB
ANOTHER = 48 * MIB
BLOCK = 5

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def qmp(tmp_path: Path) -> Path:
    return tmp_path / "qmp.sock"


@pytest.fixture
async def kept(tmp_path: Path, qmp: Path) -> AsyncIterator[Kept]:
    configuration = (
        f'[vm.{VM}]\nqmp = "{qmp}"\n[vm.{VM}.balloon]\nstats_interval_s = 0\n'
        f'[[vm.{VM}.mem]]\nid = "mem0"\nwindow_address = 0x100000000\nsize = "512MiB"\n'
        'requested_size = "64MiB"\n'
    )
    async with Kept.start(tmp_path, configuration) as found:
        yield found


async def in_thread(work: Callable[[], None]) -> None:
    """The fake guest waits, and vhostd's keeper is watched by this loop."""
    await trio.to_thread.run_sync(work)


def finding(kept: Kept) -> str:
    found: str = kept.status()["discards"]["finding"]
    return found


def wait_finding(kept: Kept, wanted: str) -> None:
    wait_until(lambda: finding(kept) == wanted)


def put(machine: Machine, addr: int) -> None:
    """An inflate request of one page, kicked and not waited for."""
    list_addr = machine.memory.allocate(4)
    machine.memory.write(list_addr, (addr // PAGE_SIZE).to_bytes(4, "little"))
    machine.queues[BalloonQueue.INFLATE].add_chain([Buffer(list_addr, 4)])
    machine.queues[BalloonQueue.INFLATE].kick()


async def test_pages_given_up_before_the_monitor_speaks_stay(kept: Kept, qmp: Path) -> None:
    def work() -> None:
        with (
            monitor(qmp, {}, speaks=False) as vmm,
            Machine.boot(kept.socket("balloon"), Setup()) as machine,
        ):
            guest = BalloonDriver(machine)
            machine.memory.touch(PAGE, 2 * PAGE_SIZE)
            guest.inflate([PAGE // PAGE_SIZE])
            guest.report([(PAGE + PAGE_SIZE, PAGE_SIZE)])
            assert machine.memory.page_present(PAGE)
            assert machine.memory.page_present(PAGE + PAGE_SIZE)
            status = kept.status()
            assert status["discards"]["allowed"] is False
            assert str(qmp) in status["discards"]["why"]
            assert status["balloon"]["withheld"] == 2 * PAGE_SIZE
            vmm.speaks.set()
            wait_finding(kept, "free")
            machine.memory.touch(ANOTHER, PAGE_SIZE)
            guest.inflate([ANOTHER // PAGE_SIZE])
            assert not machine.memory.page_present(ANOTHER)

    await in_thread(work)


@pytest.mark.parametrize("before", [{}, VFIO], ids=["plugged meanwhile", "pinned before"])
async def test_a_successor_discards_nothing_that_is_or_became_pinned(
    kept: Kept, qmp: Path, before: dict[str, str]
) -> None:
    def work() -> None:
        with (
            monitor(qmp, before) as vmm,
            Machine.boot(kept.socket("balloon"), Setup()) as machine,
        ):
            wait_finding(kept, "pinned" if before else "free")
            machine.memory.touch(PAGE, PAGE_SIZE)
            with kept.dead():
                vmm.devices = VFIO
                put(machine, PAGE)
            machine.queues[BalloonQueue.INFLATE].wait_used()
            wait_finding(kept, "pinned")
            assert machine.memory.page_present(PAGE)

    await in_thread(work)


async def test_a_successor_of_one_that_had_heard_nothing_discards_nothing(
    kept: Kept, qmp: Path
) -> None:
    def work() -> None:
        with (
            monitor(qmp, VFIO, speaks=False) as vmm,
            Machine.boot(kept.socket("balloon"), Setup()) as machine,
        ):
            kept.die()
            machine.memory.touch(PAGE, PAGE_SIZE)
            BalloonDriver(machine).inflate([PAGE // PAGE_SIZE])
            assert finding(kept) == "unknown"
            assert machine.memory.page_present(PAGE)
            vmm.speaks.set()
            wait_finding(kept, "pinned")
            assert machine.memory.page_present(PAGE)

    await in_thread(work)


async def test_a_reason_outlives_the_daemon_where_the_monitor_is_gone(
    kept: Kept, qmp: Path
) -> None:
    def work() -> None:
        with Machine.boot(kept.socket("balloon"), Setup()) as machine:
            with monitor(qmp, VFIO):
                wait_finding(kept, "pinned")
            machine.memory.touch(PAGE, PAGE_SIZE)
            with kept.dead():
                put(machine, PAGE)
            machine.queues[BalloonQueue.INFLATE].wait_used()
            assert machine.memory.page_present(PAGE)
            assert kept.status()["discards"]["why"] == "guest memory is pinned by gpu0 (vfio-pci)"

    await in_thread(work)


async def test_an_unplug_that_waits_in_the_ring_of_a_pinned_guest_is_put_off(
    kept: Kept, qmp: Path
) -> None:
    def work() -> None:
        with monitor(qmp, VFIO), MemDriver.boot(kept.socket("mem0"), Setup()) as guest:
            wait_finding(kept, "pinned")
            assert guest.plug(BLOCK) is MemAnswer.ACK
            guest.fill(BLOCK, 1, 0x33)
            with kept.dead():
                posted = guest.post([pack_request(MemRequest.UNPLUG, guest.address_of(BLOCK), 1)])
            guest.queue.wait_used()
            assert guest.read_answer(posted)[0] is MemAnswer.BUSY
            assert guest.filled(BLOCK, 1, 0x33)
            assert guest.state(BLOCK) is BlockState.PLUGGED

    await in_thread(work)


async def test_the_next_vmm_s_memory_is_not_known_either(kept: Kept, qmp: Path) -> None:
    def work() -> None:
        with monitor(qmp, {}), Machine.boot(kept.socket("balloon"), Setup()):
            wait_finding(kept, "free")
        wait_until(lambda: bool(kept.status()["state"] == "waiting"))
        qmp.unlink()
        with (
            monitor(qmp, VFIO, speaks=False) as vmm,
            Machine.boot(kept.socket("balloon"), Setup()) as machine,
        ):
            guest = BalloonDriver(machine)
            machine.memory.touch(PAGE, PAGE_SIZE)
            guest.inflate([PAGE // PAGE_SIZE])
            assert finding(kept) == "unknown"
            vmm.speaks.set()
            wait_finding(kept, "pinned")
            assert machine.memory.page_present(PAGE)

    await in_thread(work)
