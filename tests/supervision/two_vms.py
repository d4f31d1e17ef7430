"""Two VMs of one daemon in this process, and a service manager that keeps their descriptors.

The VMMs are pretended ones and block, so each of their steps is done in a thread. Must not know
what fails in the first VM.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import trio
from vhostd.backend.seat import DeviceSeat
from vhostd.backend.vm import Vm
from vhostd.config import VmConfig
from vhostd.config_devices import BalloonConfig, MemConfig, PmemConfig
from vhostd.daemon import Daemon, serve
from vhostd.fds import OwnedFd
from vhostd.handover.kept_fds import KeptFds
from vhostd.handover.manager_store import ManagerStore
from vhostd.images.image_file import create_image
from vhostd.supervision import SupervisedVm
from vhostd.takeover import Legacy
from vhostd.units import GiB, MiB

from tests.fakes.balloon import BalloonDriver
from tests.fakes.machine import Machine, Setup
from tests.hostile.attack import serves

PATIENCE_S = 20.0
PATTERN = b"what the neighbour wrote" * 100
PATTERN_ADDR = 48 * MiB
REQUESTS = 100
"""Of the neighbour's VMM, before the fault and after it; enough for a median."""

SETUPS = {
    "balloon": Setup(),
    "mem0": Setup(queue_count=1, config_size=56),
    "disk0": Setup(packed=True, queue_count=1),
}

Result = TypeVar("Result")


async def blocking(work: Callable[[], Result]) -> Result:
    """Do it in a thread, while the daemon goes on."""
    return await trio.to_thread.run_sync(work, abandon_on_cancel=True)


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait for what no event announces."""
    with trio.move_on_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.005)
        return
    raise AssertionError(f"it did not come: {what}")


def config_of(folder: Path, name: str) -> VmConfig:
    """A VM with one device of each kind."""
    image = folder / f"{name}.img"
    create_image(image, 64 * MiB)
    return VmConfig(
        name,
        folder / "a.qmp" if name == "a" else None,
        BalloonConfig(folder / f"{name}-balloon", stats_interval_s=1),
        (MemConfig("mem0", folder / f"{name}-mem0", 8 * GiB, GiB),),
        (PmemConfig("disk0", folder / f"{name}-disk0", image, 64 * MiB),),
    )


class Manager:
    """A service manager's end of the notify socket: what is stored, by name, as systemd has it."""

    def __init__(self) -> None:
        self.theirs, self._ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ours.setblocking(False)
        self._kept: dict[str, list[OwnedFd]] = {}

    def kept(self) -> set[str]:
        """Names of what a successor would get by now."""
        self._take_all()
        copies = {name: [OwnedFd(os.dup(fds[0].fileno()))] for name, fds in self._kept.items()}
        kept = KeptFds(copies)
        names = {name for vm in kept.vms() for name in kept.names(vm)}
        for vm in kept.vms():
            kept.drop(vm)
        assert not list(kept.unclaimed())
        return names

    def _take_all(self) -> None:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._ours, 4096, 253)
            except BlockingIOError:
                return
            words = dict(line.split("=", 1) for line in data.decode().splitlines())
            if "FDSTOREREMOVE" in words:
                self._kept.pop(words["FDNAME"], None)
            else:
                self._kept.setdefault(words["FDNAME"], []).extend(OwnedFd(fd) for fd in fds)

    def close(self) -> None:
        """Let go of everything."""
        self._take_all()
        self._kept.clear()
        self._ours.close()
        self.theirs.close()


@dataclass
class Neighbour:
    """The second VM's VMM and guest: it uses its devices, and measures how long they take."""

    machine: Machine
    worst_s: list[float] = field(default_factory=list)
    medians_s: list[float] = field(default_factory=list)

    def begin(self) -> None:
        """Have something in memory that must stay."""
        self.machine.memory.write(PATTERN_ADDR, PATTERN)

    def use(self) -> None:
        """Ask, inflate, and look at what was written."""
        took_s = []
        for _ in range(REQUESTS):
            begin_s = time.monotonic()
            self.machine.front.get_features()
            took_s.append(time.monotonic() - begin_s)
        serves(BalloonDriver(self.machine))
        assert self.machine.memory.read(PATTERN_ADDR, len(PATTERN)) == PATTERN
        self.worst_s.append(max(took_s))
        self.medians_s.append(sorted(took_s)[len(took_s) // 2])


@dataclass
class Scene:
    """The daemon, the first VM, which is to fail, and its machines by device."""

    folder: Path
    daemon: Daemon
    manager: Manager
    machines: dict[str, Machine] = field(default_factory=dict)

    @property
    def first(self) -> SupervisedVm:
        """The VM that is to fail."""
        return self.daemon.vms()["a"]

    @property
    def vm(self) -> Vm:
        """What serves it. Raises AssertionError: nothing does."""
        vm = self.first._vm
        assert vm is not None
        return vm

    def seat(self, device: str) -> DeviceSeat:
        """A device of it."""
        return self.vm._seats[device]

    async def boot(self, device: str) -> Machine:
        """Connect a VMM to a device of it and start the driver."""
        path = self.folder / f"a-{device}"
        machine = await blocking(lambda: Machine.boot(path, SETUPS[device]))
        self.machines[device] = machine
        return machine

    async def connect(self, device: str) -> None:
        """Connect a VMM whose connection nobody serves for long."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.folder / f"a-{device}"))
        self._open.callback(sock.close)

    _open: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        """Hang up everything."""
        for machine in self.machines.values():
            machine.close()
        self.machines.clear()
        self._open.close()


@contextmanager
def managed() -> Iterator[Manager]:
    """A service manager, for the block."""
    manager = Manager()
    try:
        yield manager
    finally:
        manager.close()


@asynccontextmanager
async def two_vms(folder: Path) -> AsyncIterator[Scene]:
    """A daemon with VMs a and b, served inside the block."""
    daemons: list[Daemon] = []
    configs = [config_of(folder, name) for name in ("a", "b")]

    def populate(daemon: Daemon) -> None:
        daemons.append(daemon)
        for config in configs:
            daemon.add(config)

    with managed() as manager:
        legacy = Legacy(ManagerStore(manager.theirs, 1000))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, populate, legacy, None)
            await until(lambda: daemons and daemons[0].vms().get("b"), "the daemon serves")
            scene = Scene(folder, daemons[0], manager)
            try:
                yield scene
            finally:
                with trio.CancelScope(shield=True):
                    await blocking(scene.close)
                nursery.cancel_scope.cancel()
