"""vhostd is killed, again and again, under a guest at work; the guest must not notice."""

from __future__ import annotations

import os
import random
import signal
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from vhostd.images.image_file import create_image

from tests.daemon import ControlFailed, VhostdProcess
from tests.e2e.conftest import (
    DISK_MODULES,
    DISK_SIZE,
    ONLINE_MOVABLE,
    VM,
    WINDOW_ADDRESS,
    disk_device,
    memory_device,
    qemu_options,
)
from tests.e2e.test_pmem import MAKE_FILE_SYSTEM, check_file_system
from tests.e2e.test_pmem_durability import check_records
from tests.vm.channel import GuestProcess
from tests.vm.guest import Guest, boot
from tests.vm.stack import Stack

pytestmark = [pytest.mark.guest, pytest.mark.timeout(3600)]

GAP_MAX_S = 15.0
"""Far above what is aimed at: this is a test of correctness, the figures are printed."""


async def wish(daemon: VhostdProcess, *words: str) -> None:
    """Run vhostctl, again if it met the daemon's end."""
    for _ in range(20):
        try:
            await daemon.ctl(*words)
            return
        except ControlFailed as error:
            if error.status != 3:
                raise
            await trio.sleep(0.2)
    raise AssertionError(f"vhostctl {words} met no daemon")


@asynccontextmanager
async def kept_guest(stack: Stack, folder: Path) -> AsyncIterator[tuple[VhostdProcess, Guest]]:
    """A guest with all three devices, its daemon under a keeper."""
    image = folder / "disk.img"
    create_image(image, DISK_SIZE)
    # The disk's shared memory and the window share the addresses above RAM.
    devices = memory_device(address=WINDOW_ADDRESS, size="1GiB") + disk_device(image, "shmem")
    configuration = f"[vm.{VM}.balloon]\n{devices}"
    async with VhostdProcess.start(folder, configuration, "--keep") as daemon:
        options, max_memory = await qemu_options(daemon)
        async with boot(
            stack,
            kernel="6.12",
            memory="1G",
            max_memory=max_memory,
            devices=options,
            modprobe=(*DISK_MODULES, "virtio_balloon", "virtio_mem"),
            append=ONLINE_MOVABLE,
        ) as guest:
            yield daemon, guest


async def next_record_gap_s(records: GuestProcess, event: Callable[[], Awaitable[None]]) -> float:
    """Seconds from an event until the guest has written a record that it had not begun before."""
    seen = len(records.output)
    begun_s = trio.current_time()
    await event()
    with trio.fail_after(GAP_MAX_S):
        # Two whole records after what was under way: the first may have been answered before.
        while records.output.count("\n", seen) < 3:  # noqa: ASYNC110  # output has no event
            await trio.sleep(0.002)
    return trio.current_time() - begun_s


async def test_a_guest_at_work_does_not_notice_deaths_and_an_upgrade(
    stack: Stack, tmp_path: Path, takeovers: int
) -> None:
    generator = random.Random(5)
    async with kept_guest(stack, tmp_path) as (daemon, guest):
        await guest.run(f"{MAKE_FILE_SYSTEM}; mount -t ext4 -o dax /dev/pmem0 /mnt", timeout_s=60)
        records = await guest.start("disktool records /mnt/records")
        pattern = await guest.start("guesttool cycle 200 7")
        await pattern.read_line(timeout_s=60)
        gaps_s: list[float] = []
        for number in range(takeovers):
            await wish(daemon, "balloon", "set", VM, f"{generator.randrange(200)}M")
            await wish(daemon, "mem", "resize", VM, f"{2 * generator.randrange(300)}M")
            # At any moment of what this began.
            await trio.sleep(generator.uniform(0, 0.7))
            before = daemon.worker

            async def die(pid: int = before, last: bool = number == takeovers - 1) -> None:
                os.kill(daemon.process.pid if last else pid, signal.SIGHUP if last else 9)

            gaps_s.append(await next_record_gap_s(records, die))
            await daemon.replaced(before, VM)
        await records.kill()
        assert (await pattern.ask("stop", timeout_s=60)).startswith("ok ")
        count = int(records.output.rpartition("\n")[0].splitlines()[-1])
        await check_at_rest(daemon, guest)
        await guest.run("umount /mnt")
        await guest.system_reset()
        await guest.run("mount -t ext4 -o dax /dev/pmem0 /mnt && ls /mnt/records && umount /mnt")
        await guest.check_alive()
    image = tmp_path / "disk.img"
    check_file_system(stack, image)
    out = tmp_path / "records"
    stack.e2fsprogs.run("debugfs", "-R", f"dump /records {out}", image)
    check_records(out.read_bytes(), count)
    ordered = sorted(gaps_s)
    print(
        f"{takeovers} take-overs, {count} records, gap median {statistics.median(ordered):.2f} s,"
        f" p99 {ordered[int(len(ordered) * 0.99)]:.2f} s, most {ordered[-1]:.2f} s"
    )


async def check_at_rest(daemon: VhostdProcess, guest: Guest) -> None:
    """Sizes reached before a death are those after it, and the device goes on from there."""
    await wish(daemon, "balloon", "set", VM, "64M", "--wait")
    await wish(daemon, "mem", "resize", VM, "256M", "--wait")
    total = (await guest.meminfo())["MemTotal"]
    before = await daemon.status(VM)
    worker = daemon.worker
    os.kill(worker, signal.SIGKILL)
    await daemon.replaced(worker, VM)
    after = await daemon.status(VM)
    for key in ("target", "actual", "inflated", "reached"):
        assert after["balloon"][key] == before["balloon"][key], key
    for key in ("requested", "plugged", "usable", "violations"):
        assert after["mem"][0][key] == before["mem"][0][key], key
    assert (await guest.meminfo())["MemTotal"] == total
    await wish(daemon, "balloon", "set", VM, "0", "--wait")
    await wish(daemon, "mem", "resize", VM, "0", "--wait")
    status = await daemon.status(VM)
    assert status["balloon"]["inflated"] == 0 and status["mem"][0]["plugged"] == 0
    assert guest.host_memory("mem0-window") == 0
    assert status["mem"][0]["answers"]["error"] == 0
    assert status["faults"] == {}


def used_by(daemon: VhostdProcess) -> tuple[int, int, int]:
    """Descriptors of the daemon and of the keeper, and the daemon's resident memory in MiB."""
    status = Path(f"/proc/{daemon.worker}/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    pids = (daemon.worker, daemon.process.pid)
    fds, keeper_fds = (len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)
    return fds, keeper_fds, int(resident.split()[1]) // 1024


async def test_descriptors_memory_and_threads_are_flat(
    stack: Stack, tmp_path: Path, takeovers: int
) -> None:
    async with kept_guest(stack, tmp_path) as (daemon, _guest):

        async def die() -> tuple[int, int, int]:
            worker = daemon.worker
            os.kill(worker, signal.SIGKILL)
            await daemon.replaced(worker, VM)
            return used_by(daemon)

        await die()
        first = await die()
        for _ in range(max(3, takeovers // 2)):
            last = await die()
        assert abs(last[0] - first[0]) <= 3 and last[1] == first[1]
        assert last[2] <= first[2] + 16, (first, last)
