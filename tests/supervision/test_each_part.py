"""Each part of a VM fails once, by an exception where such a one could really come from."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
from vhostd._native import Image, Worker
from vhostd.backend import vm as vm_module
from vhostd.backend.lasting import Lasting
from vhostd.backend.monitor import Monitor
from vhostd.backend.worker import VmWorker
from vhostd.devices.base import Refused
from vhostd.errors import HostError
from vhostd.log import configure
from vhostd.transport.listener import Listener

from tests.fakes.balloon import BalloonDriver
from tests.fakes.machine import Machine
from tests.fakes.messages import Request
from tests.fakes.monitor import monitor
from tests.hostile.attack import serves
from tests.supervision.two_vms import Neighbour, Scene, blocking, two_vms, until

Break = Callable[[pytest.MonkeyPatch, Path], None]
Act = Callable[[pytest.MonkeyPatch, Scene], Awaitable[None]]


class Broken(Exception):
    """What nobody thought of."""


def raising(error: BaseException) -> Callable[..., Any]:
    """In place of a function or method."""

    def fail(*arguments: object, **more: object) -> Any:  # noqa: ANN401
        raise error

    return fail


def of_first(
    patch: pytest.MonkeyPatch,
    owner: Any,  # noqa: ANN401
    name: str,
    error: Exception,
) -> None:
    """Have a method fail for whatever says that it is of VM a."""
    real = getattr(owner, name)

    def fail(self: Any, *arguments: Any, **more: Any) -> Any:  # noqa: ANN401
        words = [str(value) for value in (*arguments, *vars(self).values())]
        if any(word == "a" or "/a-" in word or "/a." in word or word[:2] == "a:" for word in words):
            raise error
        return real(self, *arguments, **more)

    patch.setattr(owner, name, fail)


@dataclass(frozen=True)
class Part:
    """One part: what breaks it before the daemon starts, or once VM a runs, and what meets it.

    connected: VMs whose descriptors must be kept: the balloon's VMM was there when it failed.
    """

    name: str
    reason: str
    before: Break | None = None
    after: Act | None = None
    connected: bool = False


async def ask(scene: Scene) -> None:
    """Send a request, and wait for nothing."""
    scene.machines["balloon"].front.send(Request.GET_FEATURES, b"")


def on_request(path: str, error: Exception) -> Act:
    """Break something of the balloon's connection, then ask."""

    async def act(patch: pytest.MonkeyPatch, scene: Scene) -> None:
        await scene.boot("balloon")
        found: Any = scene.seat("balloon")
        *owners, name = path.split(".")
        for owner in owners:
            found = getattr(found, owner)
        patch.setattr(found, name, raising(error))
        await ask(scene)

    return act


async def hang_up(patch: pytest.MonkeyPatch, scene: Scene, error: Exception, part: str) -> None:
    machine = await scene.boot("balloon")
    connection: Any = scene.seat("balloon").connection
    patch.setattr(getattr(connection, part), "close", raising(error))
    await blocking(machine.front.close)


async def use_memfd(patch: pytest.MonkeyPatch, scene: Scene) -> None:
    await scene.boot("balloon")
    memfd: Any = scene.vm._keeping._memfd
    patch.setattr(memfd, "write", raising(HostError(errno.ENOSPC, "no memory for the state")))
    await ask(scene)


async def serve_chain(patch: pytest.MonkeyPatch, scene: Scene) -> None:
    machine = await scene.boot("balloon")
    assert scene.vm.balloon is not None
    patch.setattr(scene.vm.balloon, "on_chain", raising(KeyError("tag")))
    BalloonDriver(machine).give_stats(bytes(10))


async def write_config(patch: pytest.MonkeyPatch, scene: Scene) -> None:
    machine = await scene.boot("balloon")
    assert scene.vm.balloon is not None
    patch.setattr(scene.vm.balloon, "on_config_written", raising(AssertionError("a config byte")))
    await blocking(lambda: BalloonDriver(machine).write_actual(1))


async def beat(patch: pytest.MonkeyPatch, scene: Scene) -> None:
    assert scene.vm.balloon is not None
    patch.setattr(scene.vm.balloon, "on_timer", raising(ZeroDivisionError()))
    await scene.boot("balloon")


async def wish(patch: pytest.MonkeyPatch, scene: Scene) -> None:
    assert scene.vm.balloon is not None
    patch.setattr(scene.vm.balloon, "set_target", raising(RuntimeError("no target")))
    with pytest.raises(Refused, match="paused: internal error: RuntimeError: no target"):
        await scene.first.changes.set_balloon_target(0)


async def ask_vmm(patch: pytest.MonkeyPatch, scene: Scene) -> None:
    await scene.boot("balloon")
    connection: Any = scene.seat("balloon").connection
    patch.setattr(connection.requests, "_next", raising(Broken("requests")))
    connection.requests.want_config_change()


async def look_at_status(patch: pytest.MonkeyPatch, scene: Scene) -> None:
    patch.setattr(scene.seat("mem0").device, "status", raising(KeyError("plugged")))
    assert [vm.status()["state"] for vm in scene.daemon.vms().values()] == ["paused", "running"]


async def look_at_window(patch: pytest.MonkeyPatch, scene: Scene) -> None:
    patch.setattr(scene.seat("mem0").device, "look_begins", raising(IndexError("block")))
    await scene.connect("mem0")


async def care_for_image(patch: pytest.MonkeyPatch, scene: Scene) -> None:
    await scene.connect("disk0")
    await until(lambda: scene.seat("disk0").connection, "it is connected")
    connection: Any = scene.seat("disk0").connection
    patch.setattr(connection.storage, "_look_at_file", raising(TypeError("st_size")))


async def close_image(patch: pytest.MonkeyPatch, scene: Scene) -> None:
    patch.setattr(Image, "wait_alone", raising(OSError(errno.EIO, "Input/output error")))
    await scene.connect("disk0")
    await until(lambda: scene.seat("disk0").connection, "it is connected")
    scene.close()


def deaf(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """From the next notification on epoll fails for VM a's worker."""
    real = VmWorker._pass_on_events

    async def fail(worker: VmWorker, native: Worker) -> None:
        if worker.name != "a":
            await real(worker, native)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(real, worker, native)
            while not worker._clients:  # noqa: ASYNC110
                await trio.sleep(0.005)
            nursery.cancel_scope.cancel()
        raise OSError(errno.ENOSPC, "No space left on device", "epoll")

    patch.setattr(VmWorker, "_pass_on_events", fail)


async def hear_nothing(patch: pytest.MonkeyPatch, scene: Scene) -> None:
    del patch
    await scene.connect("balloon")


EAGAIN = BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
EBADF = OSError(errno.EBADF, "Bad file descriptor")
PARTS = [
    Part("constructor", "AssertionError: twice", before=lambda patch, folder: of_first(
        patch, vm_module.Vm, "_begin_machine", AssertionError("twice"))),
    Part("listener", "exists and is no socket",
         before=lambda patch, folder: (folder / "a-mem0").touch()),
    Part("worker thread", "temporarily unavailable", before=lambda patch, folder: of_first(
        patch, VmWorker, "_begin", EAGAIN), after=hear_nothing),
    Part("monitor", "AssertionError", before=lambda patch, folder: of_first(
        patch, Monitor, "run", AssertionError())),
    Part("state directory", "MemoryError", before=lambda patch, folder: of_first(
        patch, Lasting, "run", MemoryError())),
    Part("notifications", "epoll: No space left", before=deaf, after=hear_nothing),
    Part("accept", "Bad file descriptor", before=lambda patch, folder: of_first(
        patch, Listener, "accept", EBADF)),
    Part("message", "AssertionError: a message (vhostd/", connected=True, after=on_request(
        "connection._machine.on_message", AssertionError("a message"))),
    Part("receive", "ValueError", connected=True, after=on_request(
        "connection._connection._framer.receive", ValueError("a byte"))),
    Part("commit", "no room", connected=True, after=on_request(
        "_shared.keeping.commit", HostError(errno.ENOSPC, "no room"))),
    Part("state memfd", "no memory for the state", connected=True, after=use_memfd),
    Part("chain", "KeyError", connected=True, after=serve_chain),
    Part("config", "AssertionError: a config byte", connected=True, after=write_config),
    Part("timer", "ZeroDivisionError", connected=True, after=beat),
    Part("verb", "no target", after=wish),
    Part("back-end requests", "Broken: requests", connected=True, after=ask_vmm),
    Part("close of rings", "Input/output", after=partial(
        hang_up, error=OSError(errno.EIO, "Input/output error"), part="_rings")),
    Part("status", "KeyError", after=look_at_status),
    Part("window", "IndexError", after=look_at_window),
    Part("image care", "TypeError: st_size", after=care_for_image),
    Part("image close", "Input/output error", after=close_image),
]  # fmt: skip


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
async def test_what_fails_in_one_vm_pauses_it_and_no_other_notices(
    part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: StringIO
) -> None:
    if part.before is not None:
        part.before(monkeypatch, tmp_path)
    async with two_vms(tmp_path) as scene:
        with await blocking(lambda: Machine.boot(tmp_path / "b-balloon")) as machine:
            neighbour = Neighbour(machine)
            neighbour.begin()
            await blocking(neighbour.use)
            assert mappings(machine.memory.fd) == 2
            if part.after is not None:
                await part.after(monkeypatch, scene)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(blocking, neighbour.use)
                await until(lambda: scene.first.status()["state"] == "paused", "it is paused")
            await check_paused(scene, part)
            await blocking(neighbour.use)
            # Ratios of one run: the host may be busy. A daemon that hangs fails in any case.
            assert neighbour.medians_s[1] < max(0.02, 4 * neighbour.medians_s[0])
            assert max(neighbour.worst_s) < 1
            assert scene.daemon.vms()["b"].status()["state"] == "running"
    (line,) = [line for line in log.getvalue().splitlines() if "vm_paused" in line]
    told = json.loads(line)
    assert (told["vm"], told["level"]) == ("a", "error")
    assert part.reason in told["reason"]
    assert "Traceback" not in log.getvalue().replace(line, "")


@pytest.fixture
def log() -> Iterator[StringIO]:
    """What is logged, as JSON lines."""
    before = structlog.get_config()
    stream = StringIO()
    configure("json", stream=stream)
    yield stream
    structlog.configure(**before)


async def check_paused(scene: Scene, part: Part) -> None:
    """The reason is everywhere, nothing of its memory is mapped, and what it had is kept."""
    status = scene.first.status()
    assert part.reason in status["paused"]
    assert status["paused_remedy"]
    (event,) = [event for event in scene.daemon.events.history() if event.name == "vm_paused"]
    assert (event.vm, event.fields["reason"]) == ("a", status["paused"])
    with pytest.raises(Refused, match="is paused"):
        await scene.first.changes.set_balloon_target(0)
    if part.connected:
        memory = scene.machines["balloon"].memory.fd
        await until(lambda: mappings(memory) == 1, "only the VMM has its memory mapped")
        kept = scene.manager.kept()
        assert {"a/balloon/connection", "a/balloon/shared", "a/-/state"} <= kept
        assert any(name.startswith("a/-/memory.") for name in kept)
        assert not scene.machines["balloon"].front.wait_closed(0.01)
    await until(lambda: not (scene.folder / "a-balloon").exists(), "no VMM finds it")
    assert not {name for name in scene.manager.kept() if name.endswith("/listen")} - {
        f"b/{device}/listen" for device in ("balloon", "mem0", "disk0")
    }


def mappings(fd: int) -> int:
    """How often this process, which is the VMM too, has a file mapped."""
    inode = str(os.fstat(fd).st_ino)
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(line.split()[4] == inode for line in lines)


async def test_a_paused_vm_is_served_again_once_its_vmm_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monitor(tmp_path / "a.qmp", {}):
        await check_served_again(tmp_path, monkeypatch)


async def check_served_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with two_vms(tmp_path) as scene:
        await on_request("connection._machine.on_message", AssertionError())(monkeypatch, scene)
        await until(lambda: scene.first.status()["state"] == "paused", "it is paused")
        await until(lambda: not (tmp_path / "a-balloon").exists(), "no VMM finds it")
        await blocking(scene.close)
        await until((tmp_path / "a-balloon").exists, "it is served again")
        assert "AssertionError" in scene.first.status()["paused"]  # until somebody comes
        assert not any("a/balloon/connection" in name for name in scene.manager.kept())
        machine = await scene.boot("balloon")
        await until(lambda: scene.first.status()["discards"]["allowed"], "its monitor spoke")
        await blocking(lambda: serves(BalloonDriver(machine)))
        status = scene.first.status()
        assert (status["state"], status["paused"]) == ("running", None)
        assert "a/balloon/connection" in scene.manager.kept()
