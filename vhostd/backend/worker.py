"""The native worker of one VM as trio sees it: parking it, and passing on what it reports.

Knows the worker's eventfd and its devices' event bits. Must not know what an event means.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Self

import trio

from vhostd._native import Device, Event, Worker

OnEvents = Callable[[Event], None]


class VmWorker:
    """One native thread and the devices it serves; made by open()."""

    def __init__(self, vm_name: str) -> None:
        self._native = Worker(vm_name)
        self._parking = trio.Lock()
        self._has_parked = trio.Event()
        self._clients: dict[Device, OnEvents] = {}

    @classmethod
    @asynccontextmanager
    async def open(cls, vm_name: str) -> AsyncIterator[Self]:
        """A running worker, ended with the block; every device must be detached by then.

        Its notifications are passed on until the very end, also while the block is cancelled:
        detaching a device parks the worker, and that must be heard.
        """
        worker = cls(vm_name)
        try:
            async with trio.open_nursery() as nursery:
                listening = trio.CancelScope(shield=True)
                nursery.start_soon(worker._listen, listening)
                try:
                    yield worker
                finally:
                    listening.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(worker._native.close)

    async def _listen(self, scope: trio.CancelScope) -> None:
        with scope:
            await self._pass_on_events()

    async def _pass_on_events(self) -> None:
        notify_fd = self._native.notify_fd
        while True:
            await trio.lowlevel.wait_readable(notify_fd)
            os.eventfd_read(notify_fd)
            if self._native.parked:
                self._has_parked.set()
            for device, on_events in list(self._clients.items()):
                if events := device.take_events():
                    on_events(events)

    @asynccontextmanager
    async def parked(self) -> AsyncIterator[None]:
        """Hold the worker between two chains: inside, rings and tables may be changed.

        Waits for the chain in progress, which is one discard at most. That wait cannot be
        cancelled, because a worker that parks after its caller left would never run again.
        """
        async with self._parking:
            self._has_parked = trio.Event()
            self._native.park()
            with trio.CancelScope(shield=True):
                if not self._native.parked:
                    await self._has_parked.wait()
            try:
                yield
            finally:
                self._native.unpark()

    async def attach(self, device: Device, on_events: OnEvents) -> None:
        """Let the worker serve a device; on_events runs in a task of its own."""
        async with self.parked():
            device.attach(self._native)
        self._clients[device] = on_events

    async def detach(self, device: Device) -> None:
        """Take a device away from the worker: its rings stop, its socket is no longer watched."""
        del self._clients[device]
        async with self.parked():
            device.detach()
