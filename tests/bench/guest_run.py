"""A real guest inflates and deflates its balloon: QEMU's built-in device against vhostd's.

Each run boots a fresh guest, lets it touch and free its memory, then moves the balloon there and
back. Time runs from the wish until the guest has counted the last page; the processor time is
that of QEMU's threads but its vCPUs, and of vhostd. Must not know how either device works.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import trio
from vhostd.units import GiB, MiB

from tests.bench.figures import BenchFailed, Findings, Row, Spread
from tests.fakes.memory import PAGE_SIZE
from tests.fakes.program import Program
from tests.vm.guest import Guest, acceleration_of, balloon_device, boot
from tests.vm.stack import Stack, ensure

KERNEL = "6.12"
MEMORY_SIZE = 2 * GiB
TOUCHED_SIZE = 1700 * MiB
# Free memory the guest never touched may go into the balloon too: there is nothing to free then.
UNTOUCHED_MAX = 300 * MiB
TIMEOUT_S = 300.0
CPU_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
SetTarget = Callable[[int], Awaitable[None]]


@dataclass(frozen=True)
class Device:
    """A balloon in a running guest: set its size in bytes; what its host side has used so far."""

    guest: Guest
    set_target: SetTarget
    cpu_s: Callable[[], float]


@dataclass(frozen=True)
class Cost:
    """What one way of the balloon took."""

    wall_s: float
    cpu_s: float


def _thread_cpu_s(pid: int, thread: int) -> float:
    fields = Path(f"/proc/{pid}/task/{thread}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * CPU_TICK_S


async def _host_threads_cpu(guest: Guest) -> Callable[[], float]:
    """How much QEMU's threads other than vCPUs have used."""
    answer = await guest.qmp.execute("query-cpus-fast")
    vcpus = {cpu["thread-id"] for cpu in answer}

    def used_s() -> float:
        threads = {int(path.name) for path in Path(f"/proc/{guest.pid}/task").iterdir()}
        return sum(_thread_cpu_s(guest.pid, thread) for thread in threads - vcpus)

    return used_s


@asynccontextmanager
async def _built_in(stack: Stack, _folder: Path) -> AsyncIterator[Device]:
    devices = ["-device", "virtio-balloon-pci,id=balloon0,deflate-on-oom=on"]
    async with boot(stack, KERNEL, f"{MEMORY_SIZE // MiB}M", devices=devices) as guest:

        async def set_target(size: int) -> None:
            await guest.qmp.execute("balloon", value=MEMORY_SIZE - size)

        yield Device(guest, set_target, await _host_threads_cpu(guest))


@asynccontextmanager
async def _vhostd(stack: Stack, folder: Path) -> AsyncIterator[Device]:
    control = folder / "control.sock"
    # Like the built-in device's defaults: nothing but the balloon itself.
    options = [f"--runtime-dir={folder}", "--no-free-page-reporting"]
    options += ["--no-free-page-hinting", "--stats-interval-s=0"]
    program = await trio.to_thread.run_sync(Program.start, "vhostd-balloon", folder, options)
    try:
        async with AsyncExitStack() as held:
            devices = balloon_device(program.socket_path)
            guest = await held.enter_async_context(
                boot(stack, KERNEL, f"{MEMORY_SIZE // MiB}M", devices=devices)
            )
            transport = httpx.AsyncHTTPTransport(uds=str(control))
            client = await held.enter_async_context(
                httpx.AsyncClient(transport=transport, base_url="http://vhostd")
            )

            async def set_target(size: int) -> None:
                answer = await client.put("/v1/vms/balloon/balloon", json={"target": size})
                answer.raise_for_status()

            qemu_cpu_s = await _host_threads_cpu(guest)
            yield Device(guest, set_target, lambda: qemu_cpu_s() + program.cpu_s())
    finally:
        program.kill()


def balloon_wait(counter: str, wanted: int) -> str:
    """A guest command that ends once a counter of /proc/vmstat has reached `wanted`."""
    return f"until [ $(sed -n 's/^{counter} //p' /proc/vmstat) -ge {wanted} ]; do sleep 0.05; done"


async def _move(device: Device, size: int, counter: str, pages: int) -> Cost:
    """Set the balloon's size and wait until the guest's counter has risen by `pages`."""
    wanted = (await device.guest.vmstat())[counter] + pages
    cpu_s, started = device.cpu_s(), trio.current_time()
    await device.set_target(size)
    await device.guest.run(balloon_wait(counter, wanted), timeout_s=TIMEOUT_S)
    return Cost(trio.current_time() - started, device.cpu_s() - cpu_s)


async def _run(device: Device, size: int) -> tuple[Cost, Cost]:
    """Inflate and deflate once.

    Raises:
        BenchFailed: the host did not get the memory.
    """
    pages = size // PAGE_SIZE
    await device.guest.run(f"guesttool touch {TOUCHED_SIZE // MiB}", timeout_s=TIMEOUT_S)
    before = device.guest.host_memory()
    inflate = await _move(device, size, "balloon_inflate", pages)
    freed = before - device.guest.host_memory()
    if freed < size - UNTOUCHED_MAX:
        raise BenchFailed(f"real guest: the host got {freed} of {size} bytes")
    return inflate, await _move(device, 0, "balloon_deflate", pages)


async def remark_acceleration(findings: Findings) -> None:
    """Say what runs the guests' processors: with TCG no kick or call goes by eventfd alone."""
    stack = await trio.to_thread.run_sync(ensure, (KERNEL,))
    findings.remarks.append(f"real guests run with {(await acceleration_of(stack)).name}")


async def measure(repeats: int, size: int, folder: Path, findings: Findings) -> None:
    """`repeats` fresh guests with each device, in turn, and add rows to findings."""
    stack = await trio.to_thread.run_sync(ensure, (KERNEL,))
    ways = {"built-in": _built_in, "vhostd": _vhostd}
    costs: dict[str, list[tuple[Cost, Cost]]] = {name: [] for name in ways}
    for repeat in range(repeats):
        order = list(ways.items())
        for name, way in order if repeat % 2 == 0 else reversed(order):
            own = folder / f"{name}{repeat}"
            own.mkdir()
            async with way(stack, own) as device:
                costs[name].append(await _run(device, size))
    for place, direction in enumerate(("inflate", "deflate")):
        ours = [pair[place] for pair in costs["vhostd"]]
        theirs = [pair[place] for pair in costs["built-in"]]
        _report(f"guest {direction} {size // MiB} MiB", ours, theirs, findings)


def _report(what: str, ours: list[Cost], theirs: list[Cost], findings: Findings) -> None:
    values = {
        "wall s": ([cost.wall_s for cost in ours], [cost.wall_s for cost in theirs]),
        "host CPU s": ([cost.cpu_s for cost in ours], [cost.cpu_s for cost in theirs]),
    }
    for unit, (here, there) in values.items():
        findings.samples[f"{what}, {unit}, vhostd"] = here
        findings.samples[f"{what}, {unit}, built-in"] = there
        if min(there) > 0:
            mine, other = Spread.of(here).median, Spread.of(there).median
            ratio = Spread.of_ratios(here, there)
            row = Row(f"{what}: {unit}", f"{mine:.2f} s", f"{other:.2f} s built-in", ratio)
            findings.rows.append(row)
