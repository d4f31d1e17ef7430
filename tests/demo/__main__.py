"""Boot a guest, move its memory, show it, and say whether the host really got it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from vhostd.images.image_file import create_image
from vhostd.units import GiB, MiB

from tests.daemon import ControlFailed, DaemonFailed, VhostdProcess
from tests.demo.screen import Sample, Screen, Step
from tests.vm.cache import StackError
from tests.vm.e2fsprogs import E2fsprogs
from tests.vm.guest import (
    Guest,
    GuestBootError,
    GuestCommandError,
    QemuDied,
    balloon_device,
    boot,
    disk_device,
    memory_device,
)
from tests.vm.stack import ensure

MEMORY_SIZE = GiB
GROWN_SIZE = 3 * GiB
TOUCHED_SIZE = 1536 * MiB
WINDOW_ADDRESS = 4 * GiB
BALLOON_SIZE = 256 * MiB
SCATTERED_SIZE = 600 * MiB  # half of it is given back in single pages, for the balloon to take
HELD_SIZE = 400 * MiB
STEP_TIMEOUT_S = 40.0
HOST_MEMORY = ("ram0", "mem0-window", "mem1-window")
CONFIGURATION = """
[vm.demo.balloon]
socket = "demo-balloon.sock"
stats_interval_s = 1
""" + "".join(
    f"""
[[vm.demo.mem]]
id = "mem{node}"
socket = "demo-mem{node}.sock"
window_address = {WINDOW_ADDRESS + node * GiB}
size = "1GiB"
node = {node}
"""
    for node in range(2)
)
DISK_SIZE = 256 * MiB
DISK = """
[[vm.demo.pmem]]
id = "disk0"
socket = "demo-disk0.sock"
file = "{image}"
size = "256MiB"
"""
TEXT = "written before the power went out"
FAILURES = (
    StackError, GuestBootError, GuestCommandError, QemuDied, DaemonFailed, ControlFailed, OSError,
)  # fmt: skip


class Demo:
    """The steps, over one daemon and one guest."""

    def __init__(
        self, screen: Screen, daemon: VhostdProcess, guest: Guest, image: Path, tools: E2fsprogs
    ) -> None:
        self.screen = screen
        self.daemon = daemon
        self.guest = guest
        self.image = image
        self.tools = tools

    async def sample(self) -> Sample:
        """Look at the guest (its own /proc/meminfo), the daemon and the host at about one time."""
        meminfo = await self.guest.meminfo()
        status = await self.daemon.status("demo")
        balloon = status["balloon"]
        sample = Sample(
            guest_total=meminfo["MemTotal"],
            guest_free=meminfo["MemFree"],
            balloon_target=balloon["target"],
            balloon_actual=balloon["actual"],
            plugged=sum(mem["plugged"] for mem in status["mem"]),
            reported=balloon["reported"],
            host=sum(map(self.guest.host_memory, HOST_MEMORY)),
        )
        self.screen.show(sample)
        return sample

    async def until(self, holds: Callable[[Sample], bool]) -> Sample:
        """Sample until it holds or the step's time is over; returns the last sample."""
        with trio.move_on_after(STEP_TIMEOUT_S):
            # Two looks a moment apart make a picture; nothing announces the guest's numbers.
            while not holds(await self.sample()):  # noqa: ASYNC110
                await trio.sleep(0.25)
        return await self.sample()

    async def run(self) -> None:
        """All steps, in order."""
        scattered = await self.guest.start(f"guesttool scatter {SCATTERED_SIZE // MiB}")
        self.screen.say("the guest touches 600 MiB and frees every second page of it")
        await scattered.read_line(timeout_s=60)
        await self.inflate()
        await self.deflate()
        await scattered.write_line("done")
        await scattered.wait()
        await self.report()
        await self.grow()
        await self.die()
        await self.shrink()
        await self.lose_power()

    async def inflate(self) -> None:
        """Take 256 MiB of the guest's scattered free pages."""
        step = self.begin("vhostctl balloon set demo 256M")
        before = await self.sample()
        counted = (await self.guest.vmstat())["balloon_inflate"]
        await self.daemon.ctl("balloon", "set", "demo", "256M")
        after = await self.until(lambda now: now.balloon_actual >= BALLOON_SIZE)
        taken = ((await self.guest.vmstat())["balloon_inflate"] - counted) * 4096
        step.guest_saw = f"{taken // MiB} MiB into the balloon, MemTotal {mib(after.guest_total)}"
        got = before.host - after.host
        step.host_got = f"{mib(got)} back ({mib(before.host)} → {mib(after.host)})"
        self.end(step, taken >= BALLOON_SIZE and got >= BALLOON_SIZE * 95 // 100)

    async def deflate(self) -> None:
        """Give them back."""
        step = self.begin("vhostctl balloon set demo 0")
        counted = (await self.guest.vmstat())["balloon_deflate"]
        await self.daemon.ctl("balloon", "set", "demo", "0")
        after = await self.until(lambda now: now.balloon_actual == 0)
        given = ((await self.guest.vmstat())["balloon_deflate"] - counted) * 4096
        step.guest_saw = f"{given // MiB} MiB out of the balloon, MemFree {mib(after.guest_free)}"
        step.host_got = f"nothing asked: pages come back when touched ({mib(after.host)})"
        self.end(step, given >= BALLOON_SIZE and after.balloon_actual == 0)

    async def report(self) -> None:
        """Nobody asks for anything: the guest frees memory, the host has it a little later."""
        step = self.begin(f"nothing: a guest process of {mib(HELD_SIZE)} ends by itself")
        held = await self.guest.start(f"guesttool hold {HELD_SIZE // MiB}")
        await held.read_line(timeout_s=60)
        before = await self.sample()
        await held.write_line("done")
        await held.wait()
        wanted = HELD_SIZE * 90 // 100
        after = await self.until(lambda now: before.host - now.host >= wanted)
        got = before.host - after.host
        step.guest_saw = f"MemFree {mib(before.guest_free)} → {mib(after.guest_free)}"
        step.host_got = f"{mib(got)} back ({mib(before.host)} → {mib(after.host)}), by reporting"
        self.end(step, got >= wanted)

    async def grow(self) -> None:
        """From 1 to 3 GiB: 1 GiB more in each of two NUMA nodes."""
        step = self.begin("vhostctl memory set demo 3G")
        before = await self.sample()
        nodes = await self.node_sizes()
        await self.daemon.ctl("memory", "set", "demo", "3G")
        added = GROWN_SIZE - MEMORY_SIZE
        # The guest describes added memory, 64 bytes a page, in RAM it has or in the added itself.
        seen = added * 98 // 100
        after = await self.until(
            lambda now: now.plugged == added and now.guest_total - before.guest_total >= seen
        )
        grown = [now - nodes[node] for node, now in sorted((await self.node_sizes()).items())]
        step.guest_saw = (
            f"MemTotal {mib(before.guest_total)} → {mib(after.guest_total)},"
            f" node 0 +{mib(grown[0])}, node 1 +{mib(grown[-1])}"
        )
        step.host_got = f"nothing asked: blocks take memory when touched ({mib(after.host)})"
        self.end(step, len(grown) == 2 and sum(grown) >= seen and after.plugged == added)

    async def die(self) -> None:
        """vhostd is gone from one moment to the next; another goes on."""
        step = self.begin("kill -9 of vhostd, which systemd or --keep starts again")
        before, worker = await self.sample(), self.daemon.worker
        begun_s = trio.current_time()
        os.kill(worker, signal.SIGKILL)
        await self.daemon.replaced(worker, "demo")
        gone_s = trio.current_time() - begun_s
        after = await self.sample()
        step.guest_saw = f"nothing: MemTotal {mib(after.guest_total)} as before"
        step.host_got = f"a successor answers after {gone_s:.1f} s, {mib(after.plugged)} plugged"
        same = after.plugged == before.plugged and after.guest_total == before.guest_total
        self.end(step, same and self.daemon.worker != worker)

    async def shrink(self) -> None:
        """Back to 1 GiB, after the added memory was used."""
        step = self.begin("vhostctl memory set demo 1G")
        held = await self.guest.start(f"guesttool hold {TOUCHED_SIZE // MiB}")
        await held.read_line(timeout_s=60)
        before = await self.sample()
        await held.write_line("done")
        await held.wait()
        await self.daemon.ctl("memory", "set", "demo", "1G")
        after = await self.until(lambda now: now.plugged == 0)
        step.guest_saw = f"MemTotal {mib(before.guest_total)} → {mib(after.guest_total)}"
        left = sum(map(self.guest.host_memory, HOST_MEMORY[1:]))
        got = f"{mib(before.host - after.host)} back"
        step.host_got = f"{got} ({mib(before.host)} → {mib(after.host)}), windows {mib(left)}"
        self.end(step, after.plugged == 0 and left == 0)

    async def lose_power(self) -> None:
        """A file on the guest's disk, a sync, and the end of QEMU without warning."""
        step = self.begin("kill -9 of QEMU, right after the guest's sync on /dev/pmem0")
        await self.guest.run(
            "mkfs.ext4 -q -b 4096 -F /dev/pmem0 && mount -o dax /dev/pmem0 /mnt"
            f" && echo '{TEXT}' > /mnt/file && sync",
            timeout_s=STEP_TIMEOUT_S,
        )
        mounted = await self.guest.run("grep pmem0 /proc/mounts")
        flushes = (await self.daemon.status("demo"))["pmem"][0]["flushes"]
        self.guest.kill()
        await self.guest.wait_exit()
        step.guest_saw = f"ext4 on {mounted.split()[0]}, dax, one file written and synced"
        check = self.tools.run("e2fsck", "-fp", self.image)
        found = self.tools.run("debugfs", "-R", "cat /file", self.image).stdout.strip()
        whole = check.returncode in (0, 1)  # 1: the journal was played
        state = "whole" if whole else f"broken (e2fsck {check.returncode})"
        where = "the file in the image" if found == TEXT else "no such file in the image"
        step.host_got = f"{where}, its file system {state}, after {flushes} flushes"
        self.end(step, found == TEXT and whole and flushes > 0)

    async def node_sizes(self) -> Counter[int]:
        """MemTotal of the guest's NUMA nodes, as its own node files have it; bytes.

        Linux has no files of a node without memory and processors.
        """
        text = await self.guest.run("cat /sys/devices/system/node/node*/meminfo")
        lines = [line.split() for line in text.splitlines() if " MemTotal:" in line]
        return Counter({int(words[1]): int(words[3]) * 1024 for words in lines})

    def begin(self, asked: str) -> Step:
        """Put a step on the screen."""
        step = Step(asked)
        self.screen.steps.append(step)
        self.screen.say(asked)
        return step

    def end(self, step: Step, fine: bool) -> None:
        """Close it with its verdict."""
        step.verdict = "" if fine else "not reached in time"
        self.screen.say(f"{step.asked}: {step.verdict or 'ok'}")


def mib(size: int) -> str:
    """A size in whole MiB."""
    return f"{size // MiB} MiB"


@asynccontextmanager
async def runtime_folder() -> AsyncIterator[Path]:
    """A folder for sockets that goes away with the demo."""
    folder = Path(tempfile.mkdtemp(prefix="vhostd-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


async def demonstrate(screen: Screen) -> None:
    """From nothing running to nothing running."""
    stack = await trio.to_thread.run_sync(ensure, ("6.12",))
    async with runtime_folder() as folder:
        screen.say("starting vhostd")
        image = folder / "disk.img"
        create_image(image, DISK_SIZE)
        configuration = CONFIGURATION + DISK.format(image=image)
        async with VhostdProcess.start(folder, configuration, "--keep") as daemon:
            screen.say("booting a Linux 6.12 guest with 1 GiB in QEMU, its memory is vhostd's")
            async with boot(
                stack,
                kernel="6.12",
                memory="1G",
                max_memory="4G",
                nodes=2,
                devices=[
                    *balloon_device(folder / "demo-balloon.sock"),
                    *memory_device(folder / "demo-mem0.sock", 0, GiB, WINDOW_ADDRESS),
                    *memory_device(folder / "demo-mem1.sock", 1, GiB, WINDOW_ADDRESS + GiB),
                    *disk_device(folder / "demo-disk0.sock"),
                ],
                modprobe=("virtio_balloon", "virtio_mem", "virtio_pmem", "nd_pmem"),
                append="memhp_default_state=online_movable",
            ) as guest:
                await Demo(screen, daemon, guest, image, stack.e2fsprogs).run()
            screen.say("guest ended")


async def interruptible(job: Callable[[], Awaitable[None]]) -> bool:
    """Run the job; False when SIGINT or SIGTERM cut it short (it has cleaned up by then)."""
    finished = False
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        await job()
        finished = True
        nursery.cancel_scope.cancel()
    return finished


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The exceptions in a group and in the groups inside it."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found += leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


def main() -> int:
    """Exit code 0 when every step came out right, 1 when not, 130 when interrupted."""
    screen = Screen(GROWN_SIZE)
    screen.start()
    failures: list[BaseException] = []
    finished = False
    try:
        finished = trio.run(interruptible, lambda: demonstrate(screen))
    except* FAILURES as group:
        failures = leaves(group)
    finally:
        screen.stop()
    if failures:
        for failure in failures:
            print(f"demo: {failure}", file=sys.stderr)
        return 1
    if not finished:
        print("demo: interrupted; guest and daemon are gone", file=sys.stderr)
        return 130
    return 0 if screen.summary() else 1


if __name__ == "__main__":
    sys.exit(main())
