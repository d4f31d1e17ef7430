"""virtio-mem on real guests: sizes as the guest and the host see them, and nothing lost."""

from __future__ import annotations

import random

import pytest
from vhostd.units import GiB, MiB

from tests.daemon import ControlFailed
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
LINUX_BLOCK_SIZE = 128 * MiB
MEMMAP_SHARE = 64  # 64 bytes of struct page for 4 KiB, from the memory added itself or from RAM


async def linux_blocks(served: ServedMemory, node: int | None = None) -> set[int]:
    """Addresses of online memory blocks in the window, as sysfs has them, of one node or all."""
    where = "/sys/devices/system/memory" if node is None else f"/sys/devices/system/node/node{node}"
    found = await served.guest.run(
        f"for block in {where}/memory[0-9]*; do"
        ' echo "${block##*/memory} $(cat $block/state)"; done'
    )
    numbers = {int(line.split()[0]) for line in found.splitlines() if line.endswith(" online")}
    addresses = {number * LINUX_BLOCK_SIZE for number in numbers}
    return {address for address in addresses if address >= WINDOW_ADDRESS}


async def check_sizes(served: ServedMemory, size: int, before_total: int) -> None:
    """Guest, daemon and host agree about `size` bytes plugged."""
    mem = await served.mem()
    assert (mem["plugged"], mem["requested"], mem["discarding"]) == (size, size, 0)
    assert mem["violations"] == 0
    blocks = await linux_blocks(served)
    assert len(blocks) == -(-size // LINUX_BLOCK_SIZE)
    added = (await served.guest.meminfo())["MemTotal"] - before_total
    assert abs(added - size) <= BLOCK_SIZE + size // MEMMAP_SHARE + len(blocks) * BLOCK_SIZE
    assert served.window_memory() <= size


@pytest.mark.parametrize("kernel", KERNELS)
async def test_a_guest_grows_and_shrinks_and_the_host_gets_it(
    kernel: str, serve_memory: ServeMemory
) -> None:
    async with serve_memory(kernel) as served:
        guest = served.guest
        total = (await guest.meminfo())["MemTotal"]
        for size in (2 * GiB, 256 * MiB, GiB, 0):
            await served.resize(size)
            await check_sizes(served, size, total)
            # What is plugged can be used, and only now takes memory of the host.
            used = size * 3 // 4
            if used:
                await guest.run(f"guesttool touch {(used + 600 * MiB) // MiB}", timeout_s=90)
                assert served.window_memory() >= used
                await check_sizes(served, size, total)
        assert served.window_memory() == 0
        assert "requested size: 0x80000000" in await guest.run("dmesg")


async def test_two_devices_land_in_their_nodes(serve_memory: ServeMemory) -> None:
    second = WINDOW_ADDRESS + GiB
    devices = memory_device(0, size="1GiB", options="node = 0")
    devices += memory_device(1, second, size="1GiB", options="node = 1")
    async with serve_memory(devices=devices, nodes=2) as served:
        with pytest.raises(ControlFailed, match="choose one of mem0, mem1"):
            await served.resize(GiB)
        await served.resize("256M", "--device", "mem0")
        await served.resize("512M", "--device", "mem1")
        assert await linux_blocks(served, 0) == {WINDOW_ADDRESS, WINDOW_ADDRESS + LINUX_BLOCK_SIZE}
        assert await linux_blocks(served, 1) == {
            second + number * LINUX_BLOCK_SIZE for number in range(4)
        }
        log = await served.guest.run("dmesg")
        assert "nid: 0" in log and "nid: 1" in log
        node_total = await served.guest.run("grep MemTotal /sys/devices/system/node/node1/meminfo")
        assert abs(int(node_total.split()[-2]) * 1024 - 512 * MiB) <= 16 * MiB


@sampled(
    ("kernel", "options"),
    [*((kernel, "") for kernel in KERNELS), ("6.12", "packed = false")],
    every_day=[("6.1", ""), ("6.12", "packed = false")],
)
async def test_no_wrong_byte_over_50_resizes(
    kernel: str, options: str, serve_memory: ServeMemory
) -> None:
    """A process rewrites and verifies memory while blocks come and go in steps of 2 MiB."""
    generator = random.Random(24)
    async with serve_memory(kernel, memory_device(options=options)) as served:
        await served.resize(GiB)
        patterned = await served.guest.start("guesttool cycle 700 42")
        await patterned.read_line(timeout_s=90)
        for _ in range(50):
            size = generator.randrange(0, GiB // BLOCK_SIZE + 1) * BLOCK_SIZE
            await served.daemon.ctl("mem", "resize", VM, str(size))
            await until(
                served.mem,
                lambda mem: mem["reached"] or mem["standing"] != "the guest is at work",
                60,
                "an end of the resize",
            )
        answer = await patterned.ask("stop", timeout_s=90)
        assert answer.startswith("ok ")
        await patterned.wait()
        await served.resize(512 * MiB, timeout_s=120)
        mem = await served.mem()
        assert mem["violations"] == 0 and mem["answers"]["error"] == 0
        assert served.window_memory() <= mem["plugged"]


@pytest.mark.parametrize("qmp", [True, False])
async def test_reboots_and_pauses_leave_all_in_agreement(
    qmp: bool, serve_memory: ServeMemory
) -> None:
    size = 512 * MiB
    async with serve_memory(qmp=qmp) as served:
        guest = served.guest
        total = (await guest.meminfo())["MemTotal"]
        await served.resize(size)
        for _ in range(10):
            await guest.qmp.execute("stop")
            await guest.qmp.execute("cont")
            await check_sizes(served, size, total)
        for _ in range(10 if qmp else 3):
            await guest.run("guesttool touch 1200", timeout_s=90)
            await guest.system_reset()
            await until(
                served.mem, lambda mem: mem["reached"] and not mem["discarding"], 30, "again"
            )
            await check_sizes(served, size, total)
            assert served.window_memory() < size // 2  # what the last boot touched is gone
        assert (await served.mem())["answers"]["error"] == 0


async def test_a_reset_seen_through_qmp_unplugs_before_the_guest_is_up(
    serve_memory: ServeMemory,
) -> None:
    async with serve_memory() as served:
        await served.resize(GiB)
        await served.guest.run("guesttool touch 1500", timeout_s=90)
        await until(
            lambda: served.daemon.status(VM), lambda status: status["qmp"], 10, "QMP connected"
        )
        await served.guest.qmp.execute("stop")  # so that no new driver can be the cause
        await served.guest.qmp.execute("system_reset")
        mem = await until(served.mem, lambda mem: mem["plugged"] == 0, 10, "all unplugged")
        assert mem["requested"] == GiB
        await until(served.mem, lambda mem: mem["discarding"] == 0, 10, "all given back")
        assert served.window_memory() == 0


async def test_an_unbound_driver_keeps_its_memory(serve_memory: ServeMemory) -> None:
    """A device reset is no system reset: the guest goes on using what it has."""
    async with serve_memory() as served:
        guest = served.guest
        await served.resize(512 * MiB)
        patterned = await guest.start("guesttool fill 1100 7")
        await patterned.read_line(timeout_s=90)
        await guest.run(
            "cd /sys/bus/virtio/drivers/virtio_mem; for one in virtio*; do echo $one > unbind; done"
        )
        assert (await served.mem())["plugged"] == 512 * MiB
        assert (await patterned.ask("verify", timeout_s=60)).startswith("ok ")
        await patterned.write_line("quit")
        await patterned.wait()
        assert (await served.mem())["violations"] == 0


async def test_prealloc_takes_the_host_s_memory_before_the_guest_s_use(
    serve_memory: ServeMemory,
) -> None:
    devices = memory_device(options="prealloc = true\nhost_node = 0")
    async with serve_memory(devices=devices) as served:
        await served.resize(512 * MiB)
        assert served.window_memory() == 512 * MiB
        await served.resize(128 * MiB)
        assert served.window_memory() == 128 * MiB


async def test_large_blocks_are_moved_whole(serve_memory: ServeMemory) -> None:
    devices = memory_device(options='block_size = "256MiB"')
    async with serve_memory(devices=devices) as served:
        assert "big block size" in await served.guest.run("dmesg | grep virtio_mem")
        await served.resize(768 * MiB)
        await served.guest.run("guesttool touch 1200", timeout_s=90)
        await served.resize(256 * MiB, timeout_s=90)
        assert served.window_memory() <= 256 * MiB


async def test_a_guest_that_can_t_get_there_is_explained(serve_memory: ServeMemory) -> None:
    async with serve_memory(modprobe=(), append="memhp_default_state=offline") as served:
        with pytest.raises(ControlFailed, match="no guest driver runs") as failed:
            await served.resize(1536 * MiB, timeout_s=1)
        assert failed.value.status == 4
        await served.guest.run("modprobe virtio_mem")
        with pytest.raises(ControlFailed, match="has not onlined what was plugged") as failed:
            await served.resize(1536 * MiB, timeout_s=10)
        assert failed.value.status == 4
        await served.guest.run(
            "for block in /sys/devices/system/memory/memory*; do"
            " grep -q offline $block/state && echo online_movable > $block/state; done; true"
        )
        await until(served.mem, lambda mem: mem["plugged"] == 1536 * MiB, 20, "the whole size")


async def test_the_memory_of_a_guest_is_set_with_both_devices(serve_memory: ServeMemory) -> None:
    """Blocks first, the balloon for the rest; neither takes what is the other's."""
    async with serve_memory(balloon=True) as served:
        patterned = await served.guest.start("guesttool cycle 300 5")
        await patterned.read_line(timeout_s=60)
        for size, plugged, balloon in (
            ("1793M", 770 * MiB, MiB),
            ("896M", 0, 128 * MiB),
            ("1G", 0, 0),
            ("1280M", 256 * MiB, 0),
        ):
            words = ("memory", "set", VM, size, "--wait", "--timeout", "150")
            await served.daemon.ctl(*words, timeout_s=170)
            status = await served.daemon.status(VM)
            assert status["mem"][0]["plugged"] == plugged
            assert status["balloon"]["actual"] == status["balloon"]["inflated"] == balloon
        assert (await patterned.ask("stop", timeout_s=60)).startswith("ok ")
        await patterned.wait()
        with pytest.raises(ControlFailed, match="the guest can have 5 GiB at most"):
            await served.daemon.ctl("memory", "set", VM, "6G")
