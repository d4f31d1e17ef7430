"""New balloon targets at the worst moments: QEMU lives, its monitor answers, the guest gets there.

The moments are those at which test_qemu_quirks.py sees QEMU die or freeze of a careless back end.
A stop that meets a config change half sent may cost the channel for them, and QEMU gives no other:
then the guest learns its target when its driver starts the next time, and not before.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import httpx
import pytest
import trio
from vhostd.qmp import QmpClosed, open_qmp, running
from vhostd.units import MiB

from tests.e2e.conftest import VM, Serve, Served
from tests.e2e.waiting import until
from tests.vm.guest import Guest

pytestmark = pytest.mark.guest

ANSWER_TIMEOUT_S = 1.0
QUIET = "free_page_reporting = false\nfree_page_hinting = false\nstats_interval_s = 0"
# Small differences: the guest is done with one in no time and takes the next.
HAMMERED = (16 * MiB, 17 * MiB, 18 * MiB)
FINAL = 48 * MiB


async def watch_monitor(guest: Guest) -> None:
    """Ask QEMU's monitor ten times a second.

    Raises:
        AssertionError: an answer took longer than ANSWER_TIMEOUT_S, or QEMU died.
    """
    async with open_qmp(guest.qmp_path) as monitor:
        while True:
            with trio.move_on_after(ANSWER_TIMEOUT_S) as patience:
                try:
                    await monitor.execute("query-status")
                except QmpClosed as error:
                    raise AssertionError(f"QEMU is gone: {error}") from error
            assert not patience.cancelled_caught, f"no answer within {ANSWER_TIMEOUT_S} s"
            await trio.sleep(0.1)


class Hammer:
    """Sets one target after another, a hundred a second at most: the guest needs CPU time too."""

    def __init__(self, served: Served) -> None:
        self.count = 0
        self._served = served
        self._enough = False
        self._ended = trio.Event()

    async def run(self) -> None:
        """Go on until stop(): a request is not cut off, which httpx would complain of."""
        transport = httpx.AsyncHTTPTransport(uds=str(self._served.daemon.control_path))
        async with httpx.AsyncClient(transport=transport, base_url="http://vhostd") as client:
            for size in itertools.cycle(HAMMERED):
                if self._enough:
                    break
                answer = await client.put(f"/v1/vms/{VM}/balloon", json={"target": size})
                answer.raise_for_status()
                self.count += 1
                await trio.sleep(0.01)
        self._ended.set()

    async def stop(self) -> None:
        """Wait for the end of the last request."""
        self._enough = True
        await self._ended.wait()


@asynccontextmanager
async def hammered(served: Served) -> AsyncIterator[None]:
    """The block runs while targets are set all the time and QEMU's monitor is watched."""
    hammer = Hammer(served)
    async with running(partial(watch_monitor, served.guest)), running(hammer.run):
        yield
        await hammer.stop()
    assert hammer.count > 0


async def reach_final(served: Served, *, restart: bool = False) -> None:
    """One last target is reached, by the guest's own count as well.

    restart: through the driver's next start, where the stops before may have cost the channel.
    """
    await served.daemon.ctl("balloon", "set", VM, str(FINAL))
    if restart:
        await served.guest.run("rmmod virtio_balloon; modprobe virtio_balloon")
    await until(
        served.balloon,
        lambda now: now["actual"] == now["inflated"] == FINAL,
        20,
        "the last target",
    )
    assert (await served.daemon.status(VM))["state"] == "running"
    assert await served.guest.qmp.execute("query-status")


async def test_targets_set_while_no_driver_is_loaded_wait_for_it(serve: Serve) -> None:
    async with serve(options=QUIET, modprobe=()) as served:
        async with hammered(served):
            # A module's life: nothing of it concerns the device until the driver comes.
            await served.guest.run("modprobe virtio_ring; sleep 1")
            await served.guest.run("modprobe virtio_balloon; sleep 1")
        await reach_final(served)


async def test_targets_set_while_the_vm_is_stopped_wait_for_it(serve: Serve) -> None:
    async with serve(options=QUIET) as served:
        await served.guest.qmp.execute("stop")
        for size in HAMMERED:
            await served.daemon.ctl("balloon", "set", VM, str(size))
            status = json.loads(await served.daemon.ctl("--json", "status", VM))
            assert status["state"] == "stopped"
            assert (status["balloon"]["target"], status["balloon"]["actual"]) == (size, 0)
        await served.guest.qmp.execute("cont")
        await until(
            served.balloon, lambda now: now["actual"] == HAMMERED[-1], 30, "the target set last"
        )
        await reach_final(served)


@pytest.mark.parametrize(
    "keep",
    [pytest.param(False, marks=pytest.mark.long, id="bare"), pytest.param(True, id="kept")],
)
async def test_targets_set_through_a_hundred_stops_do_not_kill_qemu(
    serve: Serve, keep: bool
) -> None:
    """kept: others have descriptors of all sockets, and a hang-up must be one all the same."""
    async with serve(options=QUIET, keep=keep) as served:
        async with hammered(served):
            for _ in range(100):
                await served.guest.qmp.execute("stop")
                await served.guest.qmp.execute("cont")
                # A moment of running, so that targets are announced when the next stop comes.
                await served.guest.run("true")
        await reach_final(served, restart=True)


async def test_targets_set_through_five_resets_do_not_kill_qemu(serve: Serve) -> None:
    async with serve(options=QUIET) as served:
        async with hammered(served):
            for _ in range(5):
                await served.guest.system_reset()
        await reach_final(served, restart=True)


async def test_targets_set_while_the_driver_comes_and_goes_do_not_kill_qemu(serve: Serve) -> None:
    async with serve(options=QUIET) as served:
        async with hammered(served):
            for _ in range(15):
                await served.guest.run("rmmod virtio_balloon; modprobe virtio_balloon")
        await reach_final(served, restart=True)
