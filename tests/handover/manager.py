"""A service manager that does what it is told when the test says so."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from vhostd.fds import OwnedFd
from vhostd.handover.kept_fds import KeptFds
from vhostd.handover.manager_store import ManagerStore, open_store

KICK = "web/balloon/kick.0"
CONNECTION = "web/balloon/connection"


class Manager:
    """Takes datagrams in when asked to, and stores what comes with them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)
        self.stored: dict[str, OwnedFd] = {}
        self.words: list[str] = []
        self.stores: list[ManagerStore] = []

    def take(self) -> bool:
        """One message; False: there is none."""
        try:
            data, fds, _, _ = socket.recv_fds(self.socket, 4096, 4)
        except BlockingIOError:
            return False
        words = dict(line.split("=", 1) for line in data.decode().split("\n"))
        name = words["FDNAME"]
        if words.get("FDSTORE"):
            assert name not in self.stored, "two of a name"
            (self.stored[name],) = (OwnedFd(fd) for fd in fds)
            self.words.append(f"store {name}")
        else:
            self.stored.pop(name).close()
            self.words.append(f"remove {name}")
        return True

    def take_all(self) -> list[str]:
        """All of them; what was done since the last time."""
        while self.take():
            pass
        words, self.words = self.words, []
        return words

    def lose(self) -> None:
        """Close all of it."""
        for fd in self.stored.values():
            fd.close()
        self.stored.clear()

    def passed(self) -> dict[str, list[OwnedFd]]:
        """What a successor gets."""
        return {name: [OwnedFd(os.dup(fd.fileno()))] for name, fd in self.stored.items()}

    def kept(self) -> KeptFds:
        """The same, sorted out."""
        return KeptFds(self.passed())


def opened(manager: Manager, **more: str) -> ManagerStore:
    store = open_store({"NOTIFY_SOCKET": str(manager.path), "FDSTORE": "100", **more})
    assert isinstance(store, ManagerStore)
    manager.stores.append(store)
    return store


def value(kept: KeptFds, name: str) -> int | None:
    """What the kept eventfd says; it is put back."""
    fd = kept.take(name)
    if fd is None:
        return None
    found = os.eventfd_read(fd.fileno())
    os.eventfd_write(fd.fileno(), found)
    return found
