"""The VMM's QMP monitor, as far as guest memory needs it: resets, pinned memory, stop.

Knows a few commands and events of QEMU. Must not know devices: it calls its owner.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

import trio

from vhostd.backend.journal import Journal
from vhostd.log import LogEvent
from vhostd.qmp import EventSubscription, QmpClient, QmpClosed, QmpError, open_qmp

RETRY_S: Final = 0.5
"""Between attempts while a VMM is being served: nothing announces that its monitor listens."""

LOOK_AGAIN_S: Final = 5.0
"""QEMU has an event for devices that go, and none for those that come."""

PINNING_TYPES: Final = ("child<vfio-", "child<vhost-vdpa", "child<x-vfio-user")
"""QOM types whose devices pin guest memory for DMA."""

_PERIPHERALS: Final = ("/machine/peripheral", "/machine/peripheral-anon")


class MonitorOwner(Protocol):
    """Who hears what the monitor says."""

    @property
    def vmm_present(self) -> bool:
        """A VMM is connected to one of the devices."""

    def on_system_reset(self) -> None:
        """The machine was reset, by its guest or by its operator."""

    def on_machine(self, pinning: Sequence[str], encryption: str | None) -> None:
        """What the machine is like, told when the monitor connects and every few seconds.

        Args:
            pinning: devices that pin guest memory.
            encryption: the QEMU object that encrypts it, or None.
        """

    def on_memory_backends(self, unshared: Sequence[str]) -> None:
        """Memory backends of QEMU without share=on, told as on_machine() is."""

    def on_unreachable(self, why: str) -> None:
        """Nobody can be asked, now or any more."""


class Monitor:
    """One VM's monitor; run() keeps it connected while a VMM is there.

    Attributes:
        connected: to the VMM's QMP socket.
    """

    def __init__(self, path: Path, owner: MonitorOwner, journal: Journal) -> None:
        self.connected = False
        self._path = path
        self._owner = owner
        self._journal = journal
        self._wanted = trio.Event()
        self._stop: str | None = None
        self._has_work = trio.Event()
        self._connections = 0
        self._look_now = trio.Event()
        self._session = trio.CancelScope()

    def vmm_connected(self, *, first: bool) -> None:
        """A VMM is connected to one more device, and what it is like is asked anew.

        Args:
            first: of its devices: it may be another VMM than the one the monitor is connected to,
                and what that one should do is forgotten.
        """
        self._connections += 1
        if first:
            self._stop = None
            self._session.cancel()
        self._wanted.set()
        self._look_now.set()

    def stop_vm(self, why: str) -> None:
        """Have the VM paused, now or as soon as the monitor is connected."""
        self._stop = why
        self._has_work.set()

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            await self._wanted.wait()
            if not self._owner.vmm_present:
                self._wanted = trio.Event()
                continue
            with trio.CancelScope() as self._session:
                try:
                    async with open_qmp(self._path) as client:
                        await self._serve(client)
                except (QmpClosed, QmpError) as error:
                    self._journal.guest_caused(
                        "qmp", LogEvent.QMP_DISCONNECTED, path=str(self._path), error=str(error)
                    )
                    self._owner.on_unreachable(str(error))
                finally:
                    self.connected = False
                await trio.sleep(RETRY_S)

    async def _serve(self, client: QmpClient) -> None:
        self.connected = True
        self._journal.log.info(LogEvent.QMP_CONNECTED, path=str(self._path), qemu=client.version)
        with client.events("RESET") as events:
            encryption = await _encryption(client)
            await self._look(client, encryption)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hear, events)
                nursery.start_soon(self._look_again, client, encryption)
                nursery.start_soon(self._work, client)
                await client.wait_closed()
                nursery.cancel_scope.cancel()
        raise QmpClosed(client.end_reason or "closed")

    async def _hear(self, events: EventSubscription) -> None:
        async for _ in events:
            self._owner.on_system_reset()

    async def _work(self, client: QmpClient) -> None:
        while True:
            await self._has_work.wait()
            self._has_work = trio.Event()
            why, self._stop = self._stop, None
            if why is None:
                continue
            try:
                await client.execute("stop")
            except QmpClosed:
                return
            self._journal.log.warning(LogEvent.VM_STOPPED, why=why)
            self._journal.publish(LogEvent.VM_STOPPED, {"why": why})

    # -- what kind of machine it is ------------------------------------------------------------

    async def _look(self, client: QmpClient, encryption: str | None) -> None:
        """Tell the owner what the machine is like, asked after the latest device was connected."""
        while True:
            asked_at, self._look_now = self._connections, trio.Event()
            pinning = await _pinning(client)
            unshared = await _unshared(client)
            if asked_at == self._connections:
                self._owner.on_machine(pinning, encryption)
                self._owner.on_memory_backends(unshared)
                return

    async def _look_again(self, client: QmpClient, encryption: str | None) -> None:
        while True:
            with trio.move_on_after(LOOK_AGAIN_S):
                await self._look_now.wait()
            try:
                await self._look(client, encryption)
            except QmpClosed:
                return


async def _pinning(client: QmpClient) -> list[str]:
    found: list[str] = []
    for container in _PERIPHERALS:
        found += [
            f"{child['name']} ({child['type'].removeprefix('child<').removesuffix('>')})"
            for child in await client.execute("qom-list", path=container)
            if child["type"].startswith(PINNING_TYPES)
        ]
    return found


async def _unshared(client: QmpClient) -> list[str]:
    try:
        backends = await client.execute("query-memdev")
    except QmpError:
        return []  # no QEMU: it has no such backends
    return [str(backend.get("id", "?")) for backend in backends if backend["share"] is False]


async def _encryption(client: QmpClient) -> str | None:
    try:
        guard = await client.execute(
            "qom-get", path="/machine", property="confidential-guest-support"
        )
    except QmpError:
        return None  # a machine that can't be encrypted has no such property
    return str(guard) or None
