"""The main job on real guests: memory out of a guest, on the host, and back, nothing lost."""

from __future__ import annotations

import json

import pytest
from vhostd.units import MiB

from tests.e2e.conftest import KERNELS, VM, Serve, Served
from tests.e2e.waiting import until
from tests.sampling import sampled

PAGE_SIZE = 4096
INFLATED_SIZE = 512 * MiB

pytestmark = pytest.mark.guest


async def reach(served: Served, size: int, timeout_s: float = 60) -> None:
    """`balloon set`, then wait until the guest says it got there."""
    await served.daemon.ctl("balloon", "set", VM, str(size))
    await until(
        served.balloon, lambda balloon: balloon["actual"] == size, timeout_s, f"actual = {size}"
    )


@pytest.mark.parametrize("kernel", KERNELS)
async def test_memory_leaves_the_guest_and_the_host_gets_it(kernel: str, serve: Serve) -> None:
    async with serve(kernel, options="free_page_reporting = false") as served:
        guest = served.guest
        await guest.run("guesttool touch 800", timeout_s=60)
        before, counted = guest.host_memory(), await guest.vmstat()
        assert before >= 800 * MiB

        await reach(served, INFLATED_SIZE)
        now = await guest.vmstat()
        assert (now["balloon_inflate"] - counted["balloon_inflate"]) * PAGE_SIZE == INFLATED_SIZE
        # All free memory was touched, so all of the balloon was resident on the host.
        assert before - guest.host_memory() >= INFLATED_SIZE * 95 // 100
        balloon = await served.balloon()
        assert balloon["target"] == balloon["inflated"] == INFLATED_SIZE
        assert (await served.daemon.status(VM))["state"] == "running"

        await reach(served, 0)
        now = await guest.vmstat()
        assert now["balloon_inflate"] == now["balloon_deflate"]
        assert (await served.balloon())["inflated"] == 0
        await guest.run("guesttool touch 700", timeout_s=60)


@sampled(
    ("kernel", "options"),
    [*((kernel, "") for kernel in KERNELS), ("6.12", "packed = false")],
    every_day=[("7", ""), ("6.12", "packed = false")],
)
async def test_no_wrong_byte_over_20_cycles(kernel: str, options: str, serve: Serve) -> None:
    """A process rewrites and verifies memory all the while the balloon takes and gives."""
    async with serve(kernel, options) as served:
        patterned = await served.guest.start("guesttool cycle 200 42")
        await patterned.read_line(timeout_s=60)
        for _ in range(20):
            await reach(served, 96 * MiB)
            await reach(served, 0)
        answer = await patterned.ask("stop", timeout_s=60)
        assert answer.startswith("ok ")
        await patterned.wait()


@sampled("kernel", KERNELS, every_day=["6.12"])
async def test_what_a_process_frees_comes_back_by_itself(kernel: str, serve: Serve) -> None:
    async with serve(kernel) as served:
        guest = served.guest

        async def host_memory() -> int:
            return guest.host_memory()

        held = await guest.start("guesttool hold 600")
        await held.read_line(timeout_s=60)
        before = guest.host_memory()
        assert before >= 600 * MiB
        await held.write_line("done")
        await held.wait()
        wanted = 600 * MiB * 90 // 100
        await until(host_memory, lambda now: before - now >= wanted, 30, "90 % of 600 MiB back")
        assert (await served.balloon())["reported"] >= wanted


@sampled("kernel", KERNELS, every_day=["7"])
async def test_statistics_are_the_guest_s_own(kernel: str, serve: Serve) -> None:
    async with serve(kernel, options="stats_interval_s = 1") as served:
        meminfo = await served.guest.meminfo()
        printed = await served.daemon.ctl("--json", "balloon", "stats", VM)
        stats = json.loads(printed)
        assert stats["total_memory"] == meminfo["MemTotal"]
        assert abs(stats["free_memory"] - meminfo["MemFree"]) < 32 * MiB
        assert ("oom_kills" in stats) == (kernel != "6.1")


async def test_a_target_set_before_the_driver_loads_is_reached_after(serve: Serve) -> None:
    """QEMU dies of a config change while the device is not started: it has to wait."""
    async with serve(modprobe=()) as served:
        await served.daemon.ctl("balloon", "set", VM, "64M")
        assert (await served.balloon())["actual"] == 0
        await served.guest.run("modprobe virtio_balloon")
        await until(
            served.balloon, lambda balloon: balloon["actual"] == 64 * MiB, 30, "64 MiB reached"
        )


async def test_deflate_on_oom_saves_the_guest_s_processes(serve: Serve) -> None:
    async with serve(options="deflate_on_oom = true\nfree_page_reporting = false") as served:
        await reach(served, 600 * MiB)
        await served.guest.run("guesttool touch 500", timeout_s=90)
        counters = await served.guest.vmstat()
        assert counters["oom_kill"] == 0
        assert (await served.balloon())["actual"] < 600 * MiB


async def test_a_reboot_empties_the_balloon_and_the_target_is_reached_again(serve: Serve) -> None:
    async with serve() as served:
        await reach(served, 128 * MiB)
        await served.guest.system_reset()
        await until(
            served.balloon,
            lambda balloon: balloon["actual"] == balloon["inflated"] == 128 * MiB,
            60,
            "128 MiB again after the reboot",
        )
        counters = await served.guest.vmstat()
        assert counters["balloon_inflate"] * PAGE_SIZE == 128 * MiB


@sampled("packed", ["true", "false"], every_day=["true"])
async def test_stop_and_cont_keep_the_balloon(packed: str, serve: Serve) -> None:
    async with serve(options=f"packed = {packed}") as served:
        await reach(served, 128 * MiB)
        for _ in range(5):
            await served.guest.qmp.execute("stop")
            assert (await served.daemon.status(VM))["state"] == "stopped"
            await served.guest.qmp.execute("cont")
        assert (await served.balloon())["inflated"] == 128 * MiB
        await reach(served, 32 * MiB)
        await reach(served, 160 * MiB)


async def test_unbinding_the_driver_gives_everything_back(serve: Serve) -> None:
    async with serve() as served:
        await reach(served, 64 * MiB)
        await served.guest.run("rmmod virtio_balloon", timeout_s=60)
        balloon = await served.balloon()
        assert balloon["actual"] == balloon["inflated"] == 0
        await served.guest.run("modprobe virtio_balloon")
        await until(served.balloon, lambda now: now["actual"] == 64 * MiB, 30, "64 MiB again")
