"""The VMM's monitor: what is asked of it, what is made of its answers, and that it may go away."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from vhostd.backend.journal import Journal
from vhostd.backend.monitor import Monitor
from vhostd.log import RateLimiter

GREETING = {"QMP": {"version": {"qemu": {"major": 11, "minor": 1, "micro": 3}}, "capabilities": []}}


class Vmm:
    """A monitor with these devices, and what it was told to do."""

    def __init__(self, devices: dict[str, str], *, encryption: str | None = None) -> None:
        self.devices = devices
        self.encryption = encryption
        self.backends = [{"id": "ram0", "share": True}]
        self.executed: list[str] = []
        self.stopped = trio.Event()
        self.ready = trio.Event()
        self._stream: trio.SocketStream | None = None

    async def serve(self, stream: trio.SocketStream) -> None:
        """Answer one client until it leaves."""
        self._stream = stream
        await self._send(GREETING)
        received = b""
        while data := await stream.receive_some():
            received += data
            *lines, received = received.split(b"\n")
            for line in lines:
                await self._answer(json.loads(line))

    async def _answer(self, request: dict[str, Any]) -> None:
        command = request["execute"]
        self.executed.append(command)
        answer: dict[str, Any] = {"return": {}}
        if command == "qom-list":
            path = request["arguments"]["path"]
            found = self.devices if path.endswith("peripheral") else {}
            answer = {"return": [{"name": n, "type": f"child<{t}>"} for n, t in found.items()]}
        elif command == "qom-get":
            answer = {"return": self.encryption or ""}
        elif command == "query-memdev":
            answer = {"return": self.backends}
        elif command == "stop":
            self.stopped.set()
        await self._send(answer | {"id": request["id"]})
        if command == "qom-get":
            self.ready.set()

    async def event(self, name: str) -> None:
        """Tell the client that something happened."""
        await self._send(
            {"event": name, "data": {}, "timestamp": {"seconds": 1, "microseconds": 0}}
        )

    async def hang_up(self) -> None:
        """End the connection."""
        assert self._stream is not None
        await self._stream.send_eof()

    async def _send(self, message: dict[str, Any]) -> None:
        assert self._stream is not None
        await self._stream.send_all(json.dumps(message).encode() + b"\n")


class Owner:
    """Remembers what it heard."""

    vmm_present = True

    def __init__(self) -> None:
        self.send, self.heard = trio.open_memory_channel[object](20)

    def on_system_reset(self) -> None:
        self.send.send_nowait("reset")

    def on_machine(self, pinning: Sequence[str], encryption: str | None) -> None:
        self.send.send_nowait((list(pinning), encryption))

    def on_memory_backends(self, unshared: Sequence[str]) -> None:
        if unshared:
            self.send.send_nowait(("unshared", list(unshared)))

    def on_unreachable(self, why: str) -> None:
        self.send.send_nowait(("unreachable", why))

    async def next(self) -> object:
        """The next thing heard."""
        with trio.fail_after(10):
            return await self.heard.receive()


@asynccontextmanager
async def watched(path: Path, vmm: Vmm) -> AsyncIterator[tuple[Owner, Monitor]]:
    owner = Owner()
    journal = Journal("web", RateLimiter(trio.current_time), lambda vm, event, fields: None)
    monitor = Monitor(path, owner, journal)
    socket = trio.socket.socket(trio.socket.AF_UNIX)
    await socket.bind(str(path))
    socket.listen()
    async with trio.open_nursery() as nursery:
        listener = trio.SocketListener(socket)
        nursery.start_soon(partial(trio.serve_listeners, vmm.serve, [listener]))
        nursery.start_soon(monitor.run)
        monitor.vmm_connected(first=True)
        yield owner, monitor
        nursery.cancel_scope.cancel()


async def test_resets_are_passed_on_and_other_devices_pin_nothing(tmp_path: Path) -> None:
    vmm = Vmm({"balloon0": "vhost-user-test-device-pci", "net0": "virtio-net-pci"})
    async with watched(tmp_path / "qmp", vmm) as (owner, monitor):
        assert await owner.next() == ([], None)
        await vmm.ready.wait()
        await vmm.event("STOP")
        await vmm.event("RESET")
        assert await owner.next() == "reset"
        assert monitor.connected


async def test_memory_that_is_not_shared_is_named(tmp_path: Path) -> None:
    vmm = Vmm({})
    vmm.backends += [{"id": "m1", "share": False}, {"share": False}]
    async with watched(tmp_path / "qmp", vmm) as (owner, _):
        assert await owner.next() == ([], None)
        assert await owner.next() == ("unshared", ["m1", "?"])


@pytest.mark.parametrize("kind", ["vfio-pci", "vfio-pci-nohotplug", "vhost-vdpa-device-pci"])
async def test_devices_that_pin_memory_are_named(tmp_path: Path, kind: str) -> None:
    vmm = Vmm({"gpu0": kind, "net0": "virtio-net-pci"})
    async with watched(tmp_path / "qmp", vmm) as (owner, _):
        assert await owner.next() == ([f"gpu0 ({kind})"], None)


async def test_encrypted_memory_is_told_with_its_technology(tmp_path: Path) -> None:
    vmm = Vmm({}, encryption="/objects/sev0")
    async with watched(tmp_path / "qmp", vmm) as (owner, _):
        assert await owner.next() == ([], "/objects/sev0")


async def test_a_wish_to_stop_the_vm_waits_for_the_monitor(tmp_path: Path) -> None:
    vmm = Vmm({})
    async with watched(tmp_path / "qmp", vmm) as (_, monitor):
        monitor.stop_vm("the guest uses memory nobody plugged")
        with trio.fail_after(10):
            await vmm.stopped.wait()


async def test_a_monitor_that_goes_away_is_found_again(tmp_path: Path) -> None:
    vmm = Vmm({})
    async with watched(tmp_path / "qmp", vmm) as (owner, _):
        assert await owner.next() == ([], None)
        await vmm.ready.wait()
        await vmm.hang_up()
        vmm.devices = {"gpu0": "vfio-pci"}
        assert await owner.next() == ("unreachable", "the VMM closed the QMP connection")
        assert await owner.next() == (["gpu0 (vfio-pci)"], None)


async def test_a_vmm_is_not_stopped_for_what_the_one_before_it_did(tmp_path: Path) -> None:
    vmm = Vmm({})
    async with watched(tmp_path / "qmp", vmm) as (owner, monitor):
        monitor.stop_vm("the guest uses memory nobody plugged")
        monitor.vmm_connected(first=True)
        assert await owner.next() == ([], None)
        await vmm.ready.wait()
        await vmm.event("RESET")  # handled after whatever came before
        assert await owner.next() == "reset"
        assert "stop" not in vmm.executed
