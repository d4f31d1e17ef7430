"""Each VM by itself: one that is served, or one that is paused with a reason.

Promise: whatever goes wrong in a VM pauses that VM, and no other notices. Knows the control API's
view and backend.vm. Must not know HTTP, nor other VMs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import trio

from vhostd.backend.journal import Journal
from vhostd.backend.vm import Vm
from vhostd.control.interface import DeviceSocket
from vhostd.devices.base import Refused
from vhostd.fds import OwnedFd
from vhostd.log import LogEvent
from vhostd.pause import Pause
from vhostd.served_vm import ServedVm
from vhostd.transport.connection import Connection
from vhostd.transport.hang_ups import HangUps
from vhostd.transport.listener import Listener

Source: TypeAlias = Listener | Connection
"""Where a device's VMM comes from."""


class Home(Protocol):
    """What a VM is made of, and where it leaves what a successor is to have."""

    @property
    def devices(self) -> Sequence[DeviceSocket]:
        """What a VMM's command line must say about this VM's devices."""

    @property
    def single(self) -> bool:
        """This process is for one VM, and ends with it."""

    def open_sources(self) -> Iterator[Source]:
        """Where the VMM of each device comes from, one after the other; the caller's from then on.

        Raises:
            VhostdError: one can't be had.
        """

    def new_vm(self, sources: Sequence[Source], pause: Callable[[BaseException], None]) -> Vm:
        """The VM. May raise anything."""

    def pause(self) -> None:
        """Leave all that there is to a successor, and let no VMM connect."""

    def left(self) -> list[OwnedFd] | None:
        """Connections of VMMs that wait for a successor, ours from here on. None: there was no VMM
        when it was paused, so that the end of none would change anything."""

    def clear(self) -> bool:
        """The VMMs have gone: nobody needs what was left. Whether there is to be a new VM."""


class SupervisedVm:
    """A VM for as long as it is configured (control.interface.VmView).

    Attributes:
        name: of the VM.
        settled: nothing more is wanted of what a predecessor left.
    """

    def __init__(self, name: str, home: Home, journal: Journal) -> None:
        """Neither served nor paused yet."""
        self.name = name
        self.settled = trio.Event()
        self._home = home
        self._journal = journal
        self._vm: Vm | None = None
        self._pause: Pause | None = None
        self._sources: list[Source] = []
        self._scope = trio.CancelScope()
        self._active = True

    @property
    def single(self) -> bool:
        """This process is for it, and ends with it."""
        return self._home.single

    @property
    def paused(self) -> Pause | None:
        """Why it is not served; None: it is. The reason stays until a VMM connects again."""
        if self._vm is not None and self._vm.vmm_present:
            self._pause = None
        return self._pause

    def begin(self) -> None:
        """Open what is needed to serve it; run() does so. What can't be opened pauses it."""
        self._scope = trio.CancelScope()
        self._active = True
        try:
            for source in self._home.open_sources():
                self._sources.append(source)
            self._vm = self._home.new_vm(self._sources, self.pause)
        except Exception as error:  # noqa: BLE001  # see run()
            self.pause(error)

    def pause(self, why: BaseException | Pause) -> None:
        """Serve it no more: the one way there, whatever the cause is.

        Returns at once. Soon nothing of the VM's memory is mapped any more; the descriptors of its
        VMM stay where a successor finds them.
        """
        if not self._active:
            return  # what follows from the first error is no news
        self._active = False
        pause = why if isinstance(why, Pause) else Pause.because(why)
        vm, self._vm, self._pause = self._vm, None, pause
        self._home.pause()
        self._scope.cancel()
        self.settled.set()
        if vm is None:
            self._close_sources()
        told: dict[str, Any] = {"reason": pause.reason, "remedy": pause.remedy}
        self._journal.log.error(
            LogEvent.VM_PAUSED,
            **told,
            consequence="its guest runs on without its devices; other VMs are served",
            **({} if pause.details is None else {"debug": pause.details}),
        )
        self._journal.publish(LogEvent.VM_PAUSED, told)

    async def run(self) -> None:
        """Serve it until cancelled, or until all connections we were handed have ended.

        A VM that is paused is served anew once its VMMs have gone.
        """
        try:
            while True:
                await self._serve()
                if self._active or self._home.single:
                    return
                self._close_sources()
                await self._wait_vmm_gone()
                if not self._home.clear():
                    return
                self.begin()
        finally:
            self._close_sources()

    async def _serve(self) -> None:
        vm = self._vm
        if vm is None:
            return
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pass_on_settled, vm)
                    await vm.run()
                    nursery.cancel_scope.cancel()
        # Any at all: an assertion, a host without memory, a file that a VMM truncated. What one VM
        # does must never end the others, and nothing above could do more than end them.
        except* Exception as group:  # noqa: BLE001
            self.pause(group)

    async def _pass_on_settled(self, vm: Vm) -> None:
        await vm.settled.wait()
        self.settled.set()

    async def _wait_vmm_gone(self) -> None:
        """Wait until the VMMs of a paused VM have hung up; for ever where there were none."""
        connections = self._home.left()
        if connections is None:
            await trio.sleep_forever()
        try:
            hang_ups = HangUps(connections)
        except OSError as error:
            self._journal.log.error(
                LogEvent.HOST_ERROR,
                error=f"its VMM can't be watched: {error.strerror}",
                consequence="the VM stays paused until vhostd is restarted",
            )
            await trio.sleep_forever()
        try:
            await hang_ups.wait()
        finally:
            hang_ups.close()

    def _close_sources(self) -> None:
        sources, self._sources = self._sources, []
        for source in sources:
            source.close()

    def look_at_workers(self) -> None:
        """Tell of native threads that do not come back."""
        if self._vm is not None:
            self._vm.workers.look(trio.current_time())

    # -- what the control API sees -------------------------------------------------------------

    @property
    def devices(self) -> Sequence[DeviceSocket]:
        """What a VMM's command line must say about this VM's devices."""
        return self._home.devices

    @property
    def changes(self) -> ServedVm:
        """What can be done to it. Raises Refused: it is paused."""
        if self._vm is None:
            raise Refused(self._why_refused())
        return ServedVm(self._vm, self._supervised)

    @contextmanager
    def _supervised(self) -> Iterator[None]:
        """What an operator asks for pauses the VM where it goes wrong."""
        try:
            yield
        except Refused:
            raise
        except Exception as error:
            self.pause(error)
            raise Refused(self._why_refused()) from error

    def _why_refused(self) -> str:
        reason = "it is being started" if self._pause is None else self._pause.reason
        return f"VM {self.name!r} is paused: {reason}"

    def status(self) -> dict[str, Any]:
        """The object of `vhostctl --json status VM`. Raises nothing."""
        if self.paused is None and self._vm is not None:
            try:
                return self._vm.status()
            except Exception as error:  # noqa: BLE001  # see run(): others are asked with it
                self.pause(error)
        return self._paused_status()

    def _paused_status(self) -> dict[str, Any]:
        pause = self._pause
        return {
            "vm": self.name,
            "state": "paused",
            "paused": None if pause is None else pause.reason,
            "paused_remedy": None if pause is None else pause.remedy,
            "mem": [],
            "pmem": [],
            "connections": 0,
            "faults": {},
            "messages_refused": 0,
            "usable": None,
            "usable_goal": None,
        }
