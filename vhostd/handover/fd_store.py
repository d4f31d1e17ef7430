"""What a successor gets: descriptors by name in the service manager's store, and back from it.

One mechanism for systemd and for our own keeper: sd_notify(3), "FDSTORE=1". Must not know what a
descriptor is for.
"""

from __future__ import annotations

import os
import socket
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from vhostd import systemd
from vhostd.fds import OwnedFd
from vhostd.log import LogEvent, get_logger

AVAILABLE: Final = "FDSTORE"
"""How many descriptors are kept: said by systemd 254 and later, by our keeper, or by a unit."""

SEND_TIMEOUT_S: Final = 1.0
"""A manager that takes in nothing for so long is not waited for any more."""

VM_WIDE: Final = "-"
"""In place of a device's id, which never begins with it."""


class FdStore(Protocol):
    """Where descriptors are kept.

    Attributes:
        working: they are, as far as anybody can know.
    """

    @property
    def working(self) -> bool: ...

    def keep(self, name: str, fd: int) -> None:
        """Have a descriptor kept, in place of what had this name; it stays the caller's."""

    def forget(self, name: str) -> None:
        """Have it kept no longer."""

    def adopt(self, name: str, generations: Mapping[int, int]) -> None:
        """It is in the store already, from a predecessor; generations: number and descriptor."""

    def forget_older(self, name: str) -> None:
        """Have but the newest of this name kept."""

    def leave(self) -> None:
        """Change nothing any more: what comes now is only our own end."""


class NoStore:
    """Nobody keeps anything: when the process dies, so do its connections."""

    working = False

    def keep(self, name: str, fd: int) -> None:
        """Not."""

    def forget(self, name: str) -> None:
        """Nothing was kept."""

    def adopt(self, name: str, generations: Mapping[int, int]) -> None:
        """There is none."""

    def forget_older(self, name: str) -> None:
        """Nothing was kept."""

    def leave(self) -> None:
        """Nothing was kept."""


@dataclass(slots=True)
class _Entry:
    """What is stored of a name: generations, the newest last, and which file that is."""

    generations: list[int] = field(default_factory=list)
    identity: tuple[int, int, str] | None = None


def _name_of(name: str, generation: int) -> str:
    return f"{name}~{generation}" if generation else name


def _parse(stored: str) -> tuple[str, int]:
    name, _, generation = stored.rpartition("~")
    return (name, int(generation)) if name and generation.isdigit() else (stored, 0)


def _identity(fd: int) -> tuple[int, int, str]:
    """Tells files apart that take turns under one name; eventfds share an inode."""
    status = os.fstat(fd)
    number = ""
    if stat.S_IFMT(status.st_mode) == 0:
        text = Path(f"/proc/self/fdinfo/{fd}").read_text()
        number = next((line for line in text.splitlines() if line.startswith("eventfd-id")), "")
    return status.st_dev, status.st_ino, number


class ManagerStore:
    """The service manager's store. A manager that fails us is told of once, and left alone."""

    def __init__(self, channel: socket.socket) -> None:
        """channel: of systemd.connect(), ours from here on."""
        self._channel: socket.socket | None = channel
        self._entries: dict[str, _Entry] = {}

    @property
    def working(self) -> bool:
        """It took all that was sent."""
        return self._channel is not None

    def keep(self, name: str, fd: int) -> None:
        identity = _identity(fd)
        entry = self._entries.setdefault(name, _Entry())
        if entry.identity == identity and entry.generations:
            return  # the manager would go on with the name it has, and not take another
        # First the new one, so that a successor never finds none.
        generation = max(entry.generations, default=-1) + 1
        old, entry.generations, entry.identity = entry.generations, [generation], identity
        # Hung up or not, it is for us to say when it is needed no more.
        self._tell(systemd.store_fds, _name_of(name, generation), [fd], poll=False)
        self._remove(name, old)

    def adopt(self, name: str, generations: Mapping[int, int]) -> None:
        entry = self._entries[name] = _Entry(sorted(generations))
        entry.identity = _identity(generations[entry.generations[-1]])

    def forget(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        if entry is not None:
            self._remove(name, entry.generations)

    def forget_older(self, name: str) -> None:
        entry = self._entries.get(name)
        if entry is not None:
            old, entry.generations = entry.generations[:-1], entry.generations[-1:]
            self._remove(name, old)

    def _remove(self, name: str, generations: Iterable[int]) -> None:
        for generation in generations:
            self._tell(systemd.forget_fds, _name_of(name, generation))

    def leave(self) -> None:
        """Change nothing any more: what comes now is only our own end."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _tell(self, how: Callable[..., None], *arguments: object, **more: object) -> None:
        if self._channel is None:
            return
        try:
            how(self._channel, *arguments, **more)
        except OSError as error:
            self.leave()
            get_logger().error(
                LogEvent.NO_FD_STORE,
                error=str(error),
                consequence="a successor can't take these VMs over",
            )


def open_store(environment: Mapping[str, str] = os.environ) -> NoStore | ManagerStore:
    """The service manager's store, if it says that it has one.

    It is not tried: what lies in the queue of a manager that does not read pins a guest's memory
    and an image's lock long after the VM has gone.
    """
    room = environment.get(AVAILABLE, "")
    if not room.isdigit() or int(room) == 0:
        return NoStore()
    try:
        channel = systemd.connect(environment, SEND_TIMEOUT_S)
    except OSError as error:
        get_logger().error(LogEvent.NO_FD_STORE, error=f"service manager: {error.strerror}")
        channel = None
    return NoStore() if channel is None else ManagerStore(channel)


class KeptFds:
    """What a predecessor had kept, by VM, device and role; each can be taken once.

    Where it died between storing a descriptor and removing the one before, the newest counts.
    """

    def __init__(self, passed: Mapping[str, list[OwnedFd]]) -> None:
        """passed: descriptors by the names they have in the store, ours from here on."""
        self._by_name: defaultdict[str, dict[int, OwnedFd]] = defaultdict(dict)
        for stored, fds in passed.items():
            name, generation = _parse(stored)
            for fd in fds[1:]:
                fd.close()  # never two of a name
            self._by_name[name][generation] = fds[0]
        self._taken: set[str] = set()

    def tell(self, store: FdStore) -> None:
        """Have a store know of all that is in it."""
        for name, fds in self._by_name.items():
            store.adopt(name, {generation: fd.fileno() for generation, fd in fds.items()})

    def take(self, name: str) -> OwnedFd | None:
        """The descriptor of this name, or None."""
        fds = self._by_name.get(name)
        if not fds or name in self._taken:
            return None
        self._taken.add(name)
        return fds.pop(max(fds))

    def vms(self) -> set[str]:
        """The VMs of which there is anything."""
        return {name.partition("/")[0] for name in self._by_name if name.count("/") == 2}

    def names(self, prefix: str) -> list[str]:
        """Those that begin with it, taken or not."""
        return [name for name in self._by_name if name.startswith(prefix)]

    def let_go(self, prefix: str, store: FdStore) -> None:
        """Close what nobody took, and have it kept no longer."""
        for name in self.names(prefix):
            for fd in self._by_name.pop(name).values():
                fd.close()
            if name in self._taken:
                store.forget_older(name)
            else:
                store.forget(name)


class DeviceKeeping:
    """Descriptors of one device, or of a VM as a whole, under its own names."""

    def __init__(self, store: FdStore, vm_name: str, device: str = VM_WIDE) -> None:
        self._store = store
        self._prefix = f"{vm_name}/{device}/"
        self._roles: set[str] = set()

    def name(self, role: str) -> str:
        """What a role's descriptor is called in the store."""
        return self._prefix + role

    def keep(self, role: str, fd: int) -> None:
        """Have a descriptor kept, in place of what had this role."""
        self._roles.add(role)
        self._store.keep(self.name(role), fd)

    def adopt(self, *roles: str) -> None:
        """These are in the store already, from a predecessor."""
        self._roles.update(roles)

    def forget(self, role: str) -> None:
        """Have it kept no longer."""
        self._roles.discard(role)
        self._store.forget(self.name(role))

    def forget_all(self, *, but: str = "") -> None:
        """Have nothing of it kept any more, except the role `but`."""
        for role in sorted(self._roles - {but}):
            self.forget(role)
