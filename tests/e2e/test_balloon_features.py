"""Each optional feature of the balloon on a real guest, also where it moves queue numbers."""

from __future__ import annotations

from typing import Any

import pytest
from vhostd.units import MiB

from tests.e2e.conftest import KERNELS, VM, Serve, Served
from tests.e2e.waiting import until
from tests.sampling import sampled

pytestmark = pytest.mark.guest


async def frees_and_is_reported(served: Served, size: int) -> None:
    """A guest process of `size` bytes ends, and the host has 90 % of it within 30 s."""
    guest = served.guest

    async def host_memory() -> int:
        return guest.host_memory()

    held = await guest.start(f"guesttool hold {size // MiB}")
    await held.read_line(timeout_s=60)
    before = guest.host_memory()
    await held.write_line("done")
    await held.wait()
    await until(host_memory, lambda now: before - now >= size * 9 // 10, 30, "90 % came back")


async def features(served: Served) -> list[str]:
    status = await served.daemon.status(VM)
    names: list[str] = status["balloon"]["features"]
    return names


@sampled("kernel", KERNELS, every_day=["7"])
async def test_a_hinting_round_lists_free_memory_and_gives_it_back(
    kernel: str, serve: Serve
) -> None:
    async with serve(kernel, options="free_page_reporting = false") as served:
        free = (await served.guest.meminfo())["MemFree"]
        await served.daemon.ctl("balloon", "hint", VM)

        async def hint() -> dict[str, Any]:
            status = await served.daemon.status(VM)
            found: dict[str, Any] = status["balloon"]["hint"]
            return found

        done = await until(
            hint, lambda now: now["rounds"] == 1 and now["phase"] == "idle", 30, "round done"
        )
        # Linux hints whole 4 MiB blocks, so some of the free memory is not among them.
        assert free // 2 < done["size"] <= free

        async def mem_free() -> int:
            return (await served.guest.meminfo())["MemFree"]

        await until(mem_free, lambda now: now > free - 64 * MiB, 15, "the guest has it again")


async def test_reporting_works_where_hinting_leaves_a_gap_in_the_queues(serve: Serve) -> None:
    """Linux numbers queues without gaps: reporting is queue 3 here, not 4."""
    async with serve(options="free_page_hinting = false") as served:
        await frees_and_is_reported(served, 300 * MiB)


@sampled("kernel", KERNELS, every_day=["6.1"])
async def test_a_guest_that_clears_freed_pages_reports_too(kernel: str, serve: Serve) -> None:
    """init_on_free makes Linux poison with 0; without PAGE_POISON it would not report at all."""
    async with serve(kernel, append="init_on_free=1") as served:
        assert "page_poison" in await features(served)
        await frees_and_is_reported(served, 300 * MiB)


async def test_a_guest_without_deflate_on_oom_sees_its_total_shrink(serve: Serve) -> None:
    async with serve(options="deflate_on_oom = false") as served:
        total = (await served.guest.meminfo())["MemTotal"]
        await served.daemon.ctl("balloon", "set", VM, "128M", "--wait", "--timeout", "60")
        assert total - (await served.guest.meminfo())["MemTotal"] == 128 * MiB


async def test_a_busy_kernel_moves_balloon_pages(serve: Serve) -> None:
    """Compaction puts the new page in before it takes the old one out; nothing may be lost."""
    async with serve() as served:
        patterned = await served.guest.start("guesttool cycle 100 7")
        await patterned.read_line(timeout_s=60)
        await served.daemon.ctl("balloon", "set", VM, "300M", "--wait", "--timeout", "60")
        for _ in range(5):
            await served.guest.run("echo 1 > /proc/sys/vm/compact_memory", timeout_s=60)
        assert (await served.balloon())["inflated"] == 300 * MiB
        await served.daemon.ctl("balloon", "set", VM, "0", "--wait", "--timeout", "60")
        assert (await patterned.ask("stop", timeout_s=60)).startswith("ok ")
        await patterned.wait()
