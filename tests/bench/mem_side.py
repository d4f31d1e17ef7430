"""A guest with virtio-mem, served by vhostd or built into QEMU, behind one face.

Both tell of a new plugged size the moment they have it, with the time in the message: nobody is
asked while the clock runs. Knows both interfaces. Must not know what is measured.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

import httpx
import trio
from vhostd.qmp import running
from vhostd.units import GiB

from tests.bench.figures import BenchFailed
from tests.daemon import VhostdProcess
from tests.vm.guest import Guest, boot
from tests.vm.stack import Stack

KERNEL: Final = "6.12"
VM: Final = "web"
WINDOW_ADDRESS: Final = 0x1_4000_0000
WINDOW_SIZE: Final = 4 * GiB
QMP_TIMEOUT_S: Final = 10.0
# QEMU holds an event back for up to a second after the one before; its time stays right.
EVENT_DELAY_MAX_S: Final = 1.0
BUILT_IN_ID: Final = "vm0"
BUILT_IN_WINDOW: Final = "0000:00:10.0/window0"  # QEMU puts the device in the name

Told: TypeAlias = tuple[float, int]
"""When, in seconds since the epoch, and how many bytes were plugged then."""
Tell: TypeAlias = Callable[[Told], None]


@dataclass(frozen=True)
class Used:
    """Processor seconds: of the host's side (vhostd, and QEMU but its vCPUs), and of vCPUs."""

    host_s: float
    vcpus_s: float

    def __sub__(self, other: Used) -> Used:
        return Used(self.host_s - other.host_s, self.vcpus_s - other.vcpus_s)

    @property
    def all_s(self) -> float:
        """Of all threads."""
        return self.host_s + self.vcpus_s


@dataclass(frozen=True)
class Side:
    """One running guest; sizes in bytes."""

    guest: Guest
    window: str  # QEMU's name of the memory backend
    request: Callable[[int], Awaitable[None]]
    told: trio.MemoryReceiveChannel[Told]
    vcpus: frozenset[int]
    processes: tuple[int, ...]

    async def plugged(self, size: int, since_s: float) -> float:
        """Wait until `size` bytes are plugged; when that was."""
        async for when_s, plugged in self.told:
            if when_s >= since_s and plugged == size:
                return when_s
        raise BenchFailed("real guest: nothing more is told of its plugged size")

    def resident_size(self) -> int:
        """Bytes of host memory in the window."""
        return self.guest.host_memory(self.window)

    def used(self) -> Used:
        """What has been used so far."""
        tasks = Path(f"/proc/{self.guest.pid}/task")
        vcpus_ns = sum(
            int((tasks / str(thread) / "schedstat").read_text().split()[0]) for thread in self.vcpus
        )
        if vcpus_ns == 0:
            raise BenchFailed("the kernel does not count the processor time of threads")
        return Used(sum(map(process_s, self.processes)) - vcpus_ns / 1e9, vcpus_ns / 1e9)


def process_s(pid: int) -> float:
    """What a process has used, ended threads included, in nanoseconds and not in clock ticks."""
    # As clock_getcpuclockid(3) makes it, which Python has for threads alone.
    return time.clock_gettime((~pid << 3) | 2)


@asynccontextmanager
async def _guest(stack: Stack, devices: Sequence[str]) -> AsyncIterator[Guest]:
    async with boot(
        stack,
        KERNEL,
        "1G",
        devices=devices,
        max_memory="6G",
        modprobe=("virtio_mem",),
        append="memhp_default_state=online_movable",
    ) as guest:
        yield guest


@asynccontextmanager
async def _listening(
    listen: Callable[[Tell], Awaitable[None]],
) -> AsyncIterator[trio.MemoryReceiveChannel[Told]]:
    send, receive = trio.open_memory_channel[Told](math.inf)
    async with running(partial(listen, send.send_nowait)):
        yield receive


async def _vcpus(guest: Guest) -> frozenset[int]:
    return frozenset(cpu["thread-id"] for cpu in await guest.qmp.execute("query-cpus-fast"))


# -- built into QEMU ------------------------------------------------------------------------------


@asynccontextmanager
async def built_in(stack: Stack) -> AsyncIterator[Side]:
    """QEMU's own virtio-mem-pci."""
    devices = [
        *("-object", f"memory-backend-memfd,id=window0,size={WINDOW_SIZE},share=on"),
        "-device",
        f"virtio-mem-pci,id={BUILT_IN_ID},addr=10.0,memdev=window0,memaddr={WINDOW_ADDRESS:#x}"
        ",requested-size=0",
    ]
    async with AsyncExitStack() as held:
        guest = await held.enter_async_context(_guest(stack, devices))

        async def request(size: int) -> None:
            path = f"/machine/peripheral/{BUILT_IN_ID}"
            await guest.qmp.execute("qom-set", path=path, property="requested-size", value=size)

        async def listen(tell: Tell) -> None:
            with guest.qmp.events("MEMORY_DEVICE_SIZE_CHANGE") as events:
                async for event in events:
                    tell((event.timestamp_s, event.data["size"]))

        told = await held.enter_async_context(_listening(listen))
        yield Side(guest, BUILT_IN_WINDOW, request, told, await _vcpus(guest), (guest.pid,))


# -- served by vhostd -----------------------------------------------------------------------------


@asynccontextmanager
async def vhostd(stack: Stack, folder: Path) -> AsyncIterator[Side]:
    """vhostd's, with the QEMU options vhostctl prints."""
    monitor = folder / "vmm.qmp"
    configuration = (
        f'[vm.{VM}]\nqmp = "{monitor}"\n[[vm.{VM}.mem]]\nid = "mem0"\n'
        f"window_address = {WINDOW_ADDRESS:#x}\nsize = {WINDOW_SIZE}\n"
    )
    async with AsyncExitStack() as held:
        daemon = await held.enter_async_context(VhostdProcess.start(folder, configuration))
        options: list[str] = json.loads(await daemon.ctl("--json", "qemu-args", VM))
        # What every guest of ours has anyway, its RAM, is the first of the objects.
        own = options[options.index("-object", options.index("-object") + 1) :]
        devices = [*own, "-qmp", f"unix:{monitor},server=on,wait=off"]
        guest = await held.enter_async_context(_guest(stack, devices))
        transport = httpx.AsyncHTTPTransport(uds=str(daemon.control_path))
        client = await held.enter_async_context(
            httpx.AsyncClient(transport=transport, base_url="http://vhostd")
        )

        async def request(size: int) -> None:
            answer = await client.put(f"/v1/vms/{VM}/mem", json={"size": size})
            answer.raise_for_status()

        async def listen(tell: Tell) -> None:
            query = {"vm": VM}
            async with client.stream("GET", "/v1/events", params=query, timeout=None) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data:"):
                        event = json.loads(line.removeprefix("data:"))
                        if event["event"] in ("mem_plugged", "mem_unplugged_all"):
                            tell((event["time_s"], event["plugged"]))

        told = await held.enter_async_context(_listening(listen))
        await _wait_for_monitor(daemon)
        processes = (guest.pid, daemon.process.pid)
        yield Side(guest, "mem0-window", request, told, await _vcpus(guest), processes)


async def _wait_for_monitor(daemon: VhostdProcess) -> None:
    with trio.move_on_after(QMP_TIMEOUT_S):
        while not (await daemon.status(VM))["qmp"]:  # noqa: ASYNC110
            await trio.sleep(0.1)
        return
    raise BenchFailed("vhostd did not connect to QEMU's monitor")
