"""The native worker of one VM as trio sees it: parking it, and passing on what it reports.

Knows the worker's eventfd and its devices' event bits. Must not know what an event means.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, Self

import trio

from vhostd._native import Device, Event, Worker

OnEvents = Callable[[Event], None]
OnFailure = Callable[[Exception], None]

DEAF_INTERVAL_S: Final = 0.01
"""How often a worker is looked at whose eventfd can't be watched any more."""


class VmWorker:
    """One native thread and the devices it serves; made by open().

    There is a thread only while there are devices: a VM without a VMM costs none.

    Attributes:
        name: of the VM, and of its device if that has a worker of its own.
    """

    def __init__(self, vm_name: str, on_failure: OnFailure, nursery: trio.Nursery) -> None:
        self.name = vm_name
        self._native: Worker | None = None
        self._on_failure = on_failure
        self._nursery = nursery
        self._listening = trio.CancelScope(shield=True)
        self._parking = trio.Lock()
        self._has_parked = trio.Event()
        self._clients: dict[Device, OnEvents] = {}
        self._changing = trio.Lock()
        self._devices = 0
        self._seen_round, self._seen_s = 0, 0.0

    @classmethod
    @asynccontextmanager
    async def open(cls, vm_name: str, on_failure: OnFailure) -> AsyncIterator[Self]:
        """A worker, ended with the block; every device must be detached by then.

        Its notifications are passed on until the very end, also while the block is cancelled:
        detaching a device parks the worker, and that must be heard.

        Args:
            on_failure: gets what a device's on_events raises; that device hears nothing more.
        """
        async with trio.open_nursery() as nursery:
            worker = cls(vm_name, on_failure, nursery)
            try:
                yield worker
            finally:
                worker._end()

    def _begin(self) -> None:
        self._native = Worker(self.name)
        self._listening = trio.CancelScope(shield=True)
        self._nursery.start_soon(self._listen, self._native, self._listening)

    def _end(self) -> None:
        native, self._native = self._native, None
        self._listening.cancel()
        if native is not None:
            self._nursery.start_soon(self._close, native)

    async def _close(self, native: Worker) -> None:
        # It may be in a sync that takes as long as its disk; a thread of its own waits for that.
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(native.close, limiter=trio.CapacityLimiter(1))

    async def _listen(self, native: Worker, scope: trio.CancelScope) -> None:
        with scope:
            try:
                await self._pass_on_events(native)
            except OSError as error:
                self._on_failure(error)
                await self._look_for_parking(native)

    async def _pass_on_events(self, native: Worker) -> None:
        notify_fd = native.notify_fd
        while True:
            await trio.lowlevel.wait_readable(notify_fd)
            os.eventfd_read(notify_fd)
            if native.parked:
                self._has_parked.set()
            for device, on_events in list(self._clients.items()):
                if device in self._clients and (events := device.take_events()):
                    self._tell(device, on_events, events)

    def _tell(self, device: Device, on_events: OnEvents, events: Event) -> None:
        try:
            on_events(events)
        except Exception as error:  # noqa: BLE001
            # Whatever it is, it must not end _listen(): taking the devices away, which follows,
            # waits for what only that hears.
            del self._clients[device]
            self._on_failure(error)

    async def _look_for_parking(self, native: Worker) -> None:
        """Hear at least of what a VM's end waits for: nothing else tells of it any more."""
        while True:
            if native.parked:
                self._has_parked.set()
            await trio.sleep(DEAF_INTERVAL_S)

    def busy_since_s(self, now_s: float) -> float | None:
        """Since which look it has been in one round of its loop; None: it waits for work.

        now_s: of any clock that goes on.
        """
        number = 0 if self._native is None else self._native.busy_round
        if number != self._seen_round:
            self._seen_round, self._seen_s = number, now_s
        return None if number == 0 else self._seen_s

    @asynccontextmanager
    async def parked(self) -> AsyncIterator[None]:
        """Hold the worker between two chains: inside, rings and tables may be changed.

        Waits for the chain in progress, which is one discard at most. That wait cannot be
        cancelled, because a worker that parks after its caller left would never run again.
        """
        async with self._parking:
            native = self._native
            if native is None:
                yield  # there is no thread that could be in between
                return
            self._has_parked = trio.Event()
            native.park()
            with trio.CancelScope(shield=True):
                if not native.parked:
                    await self._has_parked.wait()
            try:
                yield
            finally:
                native.unpark()

    async def attach(self, device: Device, on_events: OnEvents) -> None:
        """Let the worker serve a device; on_events runs in a task of its own.

        Raises:
            OSError: no thread, memory or descriptor for the first one.
        """
        async with self._changing:
            if self._native is None:
                self._begin()
            native = self._native
            assert native is not None, "begun above"
            try:
                async with self.parked():
                    device.attach(native)
            except BaseException:
                self._end_unused()
                raise
            self._devices += 1
        self._clients[device] = on_events

    async def detach(self, device: Device) -> None:
        """Take a device away from the worker: its rings stop, its socket is no longer watched."""
        self._clients.pop(device, None)
        async with self._changing:
            async with self.parked():
                device.detach()
            self._devices -= 1
            self._end_unused()

    def _end_unused(self) -> None:
        if self._devices == 0:
            self._end()
