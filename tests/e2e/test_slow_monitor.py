"""A guest whose monitor is slow to answer keeps its memory, at its start and at each take-over."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from vhostd.units import MiB

from tests.daemon import VhostdProcess
from tests.e2e.conftest import BALLOON_SOCKET, VM
from tests.e2e.waiting import until
from tests.vm.guest import balloon_device, boot
from tests.vm.stack import Stack

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]


class SlowMonitor:
    """Passes on to QEMU's monitor who connects, once it speaks."""

    def __init__(self, path: Path, qemu: Path) -> None:
        self.speaks = trio.Event()
        self._path = path
        self._qemu = qemu

    def fall_silent(self) -> None:
        """Who connects from now on waits."""
        self.speaks = trio.Event()

    async def _serve(self, client: trio.SocketStream) -> None:
        await self.speaks.wait()
        qemu = await trio.open_unix_socket(str(self._qemu))
        async with qemu, trio.open_nursery() as nursery:
            nursery.start_soon(self._pass_on, qemu, client)
            await self._pass_on(client, qemu)
            nursery.cancel_scope.cancel()

    @staticmethod
    async def _pass_on(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in source:
                await sink.send_all(data)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[SlowMonitor]:
        """Accept clients inside the block."""
        socket = trio.socket.socket(trio.socket.AF_UNIX)
        await socket.bind(str(self._path))
        socket.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, self._serve, [trio.SocketListener(socket)])
            yield self
            nursery.cancel_scope.cancel()


async def status(daemon: VhostdProcess) -> dict[str, Any]:
    return await daemon.status(VM)


async def inflate(daemon: VhostdProcess, size: int) -> dict[str, int]:
    """Let the guest give up so much; what is known of the balloon then."""
    await daemon.ctl("balloon", "set", VM, str(size), "--wait", "--timeout", "60", timeout_s=80)
    balloon: dict[str, int] = (await status(daemon))["balloon"]
    return balloon


async def finding(daemon: VhostdProcess, wanted: str) -> None:
    await until(
        lambda: status(daemon), lambda found: found["discards"]["finding"] == wanted, 30, wanted
    )


async def test_nothing_is_given_back_before_the_monitor_has_spoken(
    stack: Stack, tmp_path: Path
) -> None:
    qemu, slow = tmp_path / "qemu.qmp", tmp_path / "slow.qmp"
    configuration = (
        f'[vm.{VM}]\nqmp = "{slow}"\n[vm.{VM}.balloon]\nsocket = "{BALLOON_SOCKET}"\n'
        "free_page_reporting = false\n"
    )
    async with (
        SlowMonitor(slow, qemu).listening() as monitor,
        VhostdProcess.start(tmp_path, configuration, "--keep") as daemon,
        boot(
            stack,
            memory="512M",
            devices=[
                *balloon_device(tmp_path / BALLOON_SOCKET),
                *("-qmp", f"unix:{qemu},server=on,wait=off"),
            ],
        ) as guest,
    ):

        async def die() -> None:
            before = daemon.worker
            os.kill(before, signal.SIGKILL)
            await daemon.replaced(before, VM)

        pattern = await guest.start("guesttool fill 128 7")
        await pattern.read_line(timeout_s=60)
        await guest.run("guesttool touch 200", timeout_s=60)

        # At the start, and in a successor.
        full = guest.host_memory()
        for size in (32 * MiB, 64 * MiB):
            balloon = await inflate(daemon, size)
            assert (balloon["discarded"], balloon["withheld"] >= size) == (0, True)
            assert guest.host_memory() >= full
            await finding(daemon, "unknown")
            await die()

        monitor.speaks.set()
        await finding(daemon, "free")
        balloon = await inflate(daemon, 128 * MiB)
        given_back = balloon["discarded"]
        assert given_back >= 60 * MiB
        assert guest.host_memory() <= full - 60 * MiB

        # That nothing was pinned says nothing of what was plugged since.
        monitor.fall_silent()
        await die()
        await finding(daemon, "unknown")
        balloon = await inflate(daemon, 160 * MiB)
        assert balloon["discarded"] == given_back
        monitor.speaks.set()
        await finding(daemon, "free")

        await inflate(daemon, 0)
        assert (await pattern.ask("verify", timeout_s=60)).startswith("ok ")
