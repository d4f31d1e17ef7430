"""A daemon of real devices without rings: what the control API is tested against.

Its guest does what a guest does, when a test says so. Runs in a thread with its own trio loop,
because the clients under test are blocking programs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from struct import pack

import trio
from vhostd.config import MetricsConfig
from vhostd.control.events import EventStream
from vhostd.control.interface import DeviceSocket, HintAction, JsonObject, MemoryWindow
from vhostd.control.server import ControlAddresses, serve_control
from vhostd.devices.balloon import Balloon
from vhostd.devices.base import (
    Chain,
    Complete,
    DiscardMemory,
    Effects,
    Event,
    GuestRange,
    MemorySlot,
    Refused,
    Role,
)
from vhostd.devices.mem import Mem
from vhostd.devices.mem_window import MemOptions
from vhostd.devices.memory_plan import MemRoom, plan_memory
from vhostd.devices.registry import BALLOON, MEM, PMEM
from vhostd.devices.verdict import NOBODY_CHECKS
from vhostd.units import GiB, MiB

from tests.control.disk import Disk

COUNTERS = (
    "inflated_pages inflate_pfns deflate_pfns reported_size discarded_size discards discard_errors"
    " discard_errno pfns_outside pfns_repeated pfns_excess reports_refused pages_kept"
    " withheld_size outside_addr"
)
QUEUE_COUNTERS = "kicks chains used calls calls_dropped faults rejected"
ALL_FEATURES = 0x3F


class BalloonVm:
    """One VM whose guest has 1 GiB and a balloon driver with every feature."""

    def __init__(self, name: str, events: EventStream, *, running: bool = True) -> None:
        self.name = name
        self.balloon = Balloon()
        self.mem = Mem(MemOptions("mem0", 9 * GiB, 4 * GiB))
        for device in (self.balloon, self.mem):
            device.on_verdict(NOBODY_CHECKS)
        self.window: MemoryWindow | None = None  # of its disk
        self.goal: int | None = None
        self.answers_statistics = True
        self.state = "running" if running else "waiting"
        self._events = events
        self._statistics_sent = 0
        self._requests = 0
        self.disk = Disk("disk0", self._perform, running=running)
        self.balloon.on_features(ALL_FEATURES)
        if running:
            self.balloon.set_guest_memory(GiB)
            self.balloon.on_started()
            self.mem.on_memory([MemorySlot(0, GiB), MemorySlot(9 * GiB, 4 * GiB)])
            self.mem.on_discarded(GuestRange(9 * GiB, 4 * GiB), None)
            self.mem.on_started()
            self.send_statistics()

    @property
    def devices(self) -> Sequence[DeviceSocket]:
        return [
            DeviceSocket(
                BALLOON.name,
                f"{self.name}-balloon",
                Path(f"/run/vhostd/{self.name}-balloon.sock"),
                BALLOON.virtio_id,
                BALLOON.queue_count,
                BALLOON.config_size,
                BALLOON.queue_size,
            ),
            DeviceSocket(
                MEM.name,
                "mem0",
                Path(f"/run/vhostd/{self.name}-mem0.sock"),
                MEM.virtio_id,
                MEM.queue_count,
                MEM.config_size,
                MEM.queue_size,
                MemoryWindow(9 * GiB, 4 * GiB, 0),
            ),
            DeviceSocket(
                PMEM.name,
                "disk0",
                Path(f"/run/vhostd/{self.name}-disk0.sock"),
                PMEM.virtio_id,
                PMEM.queue_count,
                PMEM.config_size,
                PMEM.queue_size,
                self.window,
            ),
        ]

    @property
    def changes(self) -> BalloonVm:
        return self

    def status(self) -> JsonObject:
        counters = dict.fromkeys(COUNTERS.split(), 0) | {"inflated_pages": 2, "discards": 7}
        queue = dict.fromkeys(QUEUE_COUNTERS.split(), 0) | {"kicks": 11}
        return {
            "vm": self.name,
            "state": self.state,
            "balloon": self.balloon.status(counters, 0)
            | {"queues": {"inflate": queue}, "untold": None},
            "mem": [self.mem.status({}, 0) | {"state": self.state, "queues": {}, "untold": None}],
            "pmem": [self.disk.status(self.state)],
            "connections": 1,
            "faults": {3: "loop"} if self.state == "quarantined" else {},
            "messages_refused": 0,
            "chains_refused": 0,
            "connections_refused": 0,
            "config_changes": 0,
            "config_reads": 0,
            "config_writes": 0,
            "usable": GiB + self.mem.plugged_size - self.balloon.actual,
            "usable_goal": self.goal,
            "qmp": False,
            "discards": {"allowed": True, "finding": "unchecked", "why": None},
            "stuck": None,
            "unshared": None,
            "not_kept": None,
            "not_lasting": None,
            "kept": True,
            "paused": None,
            "paused_remedy": None,
        }

    async def flush_pmem(self, device: str | None) -> str:
        self._check_disk(device)
        self.disk.flush()
        return "disk0"

    async def drop_pmem_cache(self, device: str | None) -> JsonObject:
        self._check_disk(device)
        return self.disk.drop_cache()

    async def clear_pmem(self, device: str | None) -> str:
        self._check_disk(device)
        self.disk.clear()
        return "disk0"

    def _check_disk(self, device: str | None) -> None:
        if device not in (None, "disk0"):
            raise Refused(f"VM {self.name!r} has no disk {device!r}; it has disk0")

    async def set_balloon_target(self, size: int) -> None:
        self._perform(self.balloon.set_target(size))

    async def request_statistics(self) -> None:
        self._perform(self.balloon.request_statistics())

    async def balloon_hint(self, action: HintAction) -> None:
        start = action is HintAction.START
        self._perform(self.balloon.hint_start() if start else self.balloon.hint_stop())

    async def resize_mem(self, device: str | None, size: int) -> str:
        if device not in (None, "mem0"):
            raise Refused(f"no memory device {device!r}")
        self.request_mem(size)
        return "mem0"

    def request_mem(self, size: int) -> None:
        """What resize_mem() does once it knows the device."""
        self._perform(self.mem.set_requested_size(size))

    async def set_memory(self, size: int) -> JsonObject:
        self.goal = size
        plan = plan_memory(GiB, [MemRoom("mem0", 4 * GiB, 2 * MiB)], size, has_balloon=True)
        await self.resize_mem("mem0", plan.requested["mem0"])
        await self.set_balloon_target(plan.balloon)
        return {"size": size, "mem": plan.requested, "balloon": plan.balloon}

    def plug(self, first: int, nb_blocks: int, kind: int = 0) -> None:
        """The guest plugs blocks of 2 MiB, or with kind 1 unplugs them."""
        self._requests += 1
        data = pack("<H6xQH6x", kind, 9 * GiB + first * 2 * MiB, nb_blocks)
        chain = Chain(
            0, Role.GUEST_REQUEST, self._requests, data, len(data), 1, 10, 0, self._requests
        )
        self._perform(self.mem.on_chain(chain, now_s=time.time()))

    def reach(self, size: int) -> None:
        """The guest writes `actual`."""
        self._perform(self.balloon.on_config_written(pack("<IIII", 0, size // 4096, 0, 0)))

    def mute(self) -> None:
        """The guest sends no statistics any more."""
        self.answers_statistics = False

    def send_statistics(self) -> None:
        """The guest fills its buffer: free memory is how often it did so."""
        self._statistics_sent += 1
        data = pack("<HQHQ", 4, self._statistics_sent, 5, GiB)
        chain = Chain(2, Role.STATISTICS, self._statistics_sent, data, len(data))
        self._perform(self.balloon.on_chain(chain, now_s=time.time()))

    def _perform(self, effects: Effects) -> None:
        for effect in effects:
            if isinstance(effect, Event):
                self._events.publish(self.name, effect.name, effect.fields)
            elif isinstance(effect, DiscardMemory):
                self._perform(self.mem.on_discarded(effect.range, None))
            elif isinstance(effect, Complete) and effect.queue_index and self.answers_statistics:
                self.send_statistics()


class SmallDaemon:
    """VM "web" runs, VM "idle" was never connected."""

    def __init__(self, first_event: int = 1) -> None:
        self.events = EventStream(clock=lambda: 1000.0)
        self.events.begin_after(first_event - 1)
        self.web = BalloonVm("web", self.events)
        self.idle = BalloonVm("idle", self.events, running=False)

    def vms(self) -> Mapping[str, BalloonVm]:
        return {"web": self.web, "idle": self.idle}


class RunningDaemon:
    """A SmallDaemon that serves its control sockets in a thread of its own."""

    def __init__(
        self, runtime_dir: Path, metrics: MetricsConfig | None = None, *, first_event: int = 1
    ) -> None:
        self.daemon = SmallDaemon(first_event)
        self.addresses: ControlAddresses
        self._token: trio.lowlevel.TrioToken
        self._stop: trio.Event
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._run, runtime_dir, metrics))

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(20)

    def stop(self) -> None:
        """Cancel the server and wait for it."""
        if self._thread.is_alive():
            self._token.run_sync_soon(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive()

    def do(self, action: Callable[[], None]) -> None:
        """Run `action` in the daemon's thread, soon."""
        self._token.run_sync_soon(action)

    async def _run(self, runtime_dir: Path, metrics: MetricsConfig | None) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        async with trio.open_nursery() as nursery:
            serve = partial(serve_control, self.daemon, runtime_dir, metrics)
            self.addresses = await nursery.start(serve)
            self._ready.set()
            await self._stop.wait()
            nursery.cancel_scope.cancel()


@contextmanager
def running_daemon(
    runtime_dir: Path,
    metrics: MetricsConfig | None = None,
    *,
    first_event: int = 1,
    prepare: Callable[[SmallDaemon], None] = lambda _daemon: None,
) -> Iterator[RunningDaemon]:
    """A daemon that serves until the block ends; prepare: called before it serves."""
    running = RunningDaemon(runtime_dir, metrics, first_event=first_event)
    prepare(running.daemon)
    running.start()
    try:
        yield running
    finally:
        running.stop()
