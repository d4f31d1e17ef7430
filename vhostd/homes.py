"""What a VM is made of, and where what it leaves goes (supervision.Home).

Knows what a predecessor left and what VMs share. Must not know how a VM is served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vhostd.backend.journal import Journal
from vhostd.backend.vm import Vm
from vhostd.config import VmConfig
from vhostd.control.interface import DeviceSocket
from vhostd.errors import PauseVm
from vhostd.fds import OwnedFd
from vhostd.memory.registry import MemoryRegistry
from vhostd.pause import Pause
from vhostd.served_vm import device_sockets
from vhostd.supervision import Source
from vhostd.takeover import Legacy


@dataclass(frozen=True, slots=True)
class Shared:
    """What all VMs of this process share; next_event: number of the event stream's next event."""

    registry: MemoryRegistry
    legacy: Legacy
    next_event: Callable[[], int]


class KeptHome:
    """A VM of the configuration file, with what a predecessor left of it."""

    single = False

    def __init__(self, config: VmConfig, shared: Shared, journal: Journal) -> None:
        self._config = config
        self._shared = shared
        self._journal = journal

    @property
    def devices(self) -> Sequence[DeviceSocket]:
        """See supervision.Home."""
        return device_sockets(self._config)

    def open_sources(self) -> Iterator[Source]:
        """See supervision.Home."""
        config, legacy = self._config, self._shared.legacy
        for name, socket in zip(config.device_names, config.sockets, strict=True):
            yield legacy.listener(config, name, socket)
        legacy.settle(config.name)

    def new_vm(self, sources: Sequence[Source], pause: Callable[[BaseException], None]) -> Vm:
        """See supervision.Home."""
        shared, name = self._shared, self._config.name
        return Vm(
            self._config,
            sources,
            shared.registry,
            self._journal,
            shared.legacy.keeping(name),
            shared.legacy.lefts.pop(name, None),
            shared.next_event,
            pause,
            shared.legacy.files_of(self._config),
        )

    def pause(self) -> None:
        """See supervision.Home."""
        self._shared.legacy.leave_vm(self._config.name)

    def left(self) -> list[OwnedFd] | None:
        """See supervision.Home."""
        legacy, name = self._shared.legacy, self._config.name
        hung_up = legacy.keeping(name).hung_up
        return legacy.waiting_vmms(name) or ([] if hung_up else None)

    def clear(self) -> bool:
        """See supervision.Home."""
        self._shared.legacy.clear_vm(self._config.name)
        return True


class NoHome:
    """A VM that is not described, or wrongly: it can't be served, though its VMM may still run."""

    single = False
    devices: Sequence[DeviceSocket] = ()

    def __init__(self, name: str, legacy: Legacy, why: Pause, *, stays: bool) -> None:
        """stays: when its VMM has gone, too."""
        self._name = name
        self._legacy = legacy
        self._why = why
        self._stays = stays

    def open_sources(self) -> Iterator[Source]:
        """See supervision.Home."""
        raise PauseVm(self._why.reason, self._why.remedy)

    def new_vm(self, sources: Sequence[Source], pause: Callable[[BaseException], None]) -> Vm:
        """Never called."""
        raise AssertionError(f"{self._name} has no sources")

    def pause(self) -> None:
        """See supervision.Home."""
        self._legacy.leave_vm(self._name)

    def left(self) -> list[OwnedFd] | None:
        """See supervision.Home."""
        return self._legacy.waiting_vmms(self._name) or (None if self._stays else [])

    def clear(self) -> bool:
        """See supervision.Home."""
        self._legacy.clear_vm(self._name)
        return self._stays


class SingleHome:
    """The one VM of a process; nothing of it is kept."""

    single = True

    def __init__(self, config: VmConfig, source: Source, shared: Shared, journal: Journal) -> None:
        self._config = config
        self._source = source
        self._shared = shared
        self._journal = journal

    @property
    def devices(self) -> Sequence[DeviceSocket]:
        """See supervision.Home."""
        return device_sockets(self._config)

    def open_sources(self) -> Iterator[Source]:
        """See supervision.Home."""
        yield self._source

    def new_vm(self, sources: Sequence[Source], pause: Callable[[BaseException], None]) -> Vm:
        """See supervision.Home."""
        shared = self._shared
        return Vm(
            self._config,
            sources,
            shared.registry,
            self._journal,
            next_event=shared.next_event,
            pause=pause,
        )

    def pause(self) -> None:
        """Nothing is kept."""

    def left(self) -> list[OwnedFd] | None:
        """Nothing is kept."""
        return None

    def clear(self) -> bool:
        """Nothing is kept."""
        return False
