"""What goes to a service manager's store, in which order, and what is taken out of it again."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from vhostd.fds import OwnedFd
from vhostd.handover.fd_store import DeviceKeeping, KeptFds, ManagerStore, NoStore, open_store

from tests.keeper.keeping import closing

KICK = "web/balloon/kick.0"


class Manager:
    """Takes datagrams in when asked to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)

    def taken(self) -> list[tuple[str, int]]:
        """The next messages: what to do with which name, and how many descriptors came."""
        found: list[tuple[str, int]] = []
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self.socket, 4096, 4)
            except BlockingIOError:
                return found
            for fd in fds:
                os.close(fd)
            words = dict(line.split("=", 1) for line in data.decode().split("\n"))
            verb = "store" if words.pop("FDSTORE", None) else "remove"
            found.append((f"{verb} {words['FDNAME']}", len(fds)))


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """A manager whose queue is empty."""
    made = Manager(tmp_path / "notify")
    with made.socket:
        yield made


def opened(manager: Manager, **more: str) -> ManagerStore:
    store = open_store({"NOTIFY_SOCKET": str(manager.path), **more})
    assert isinstance(store, ManagerStore)
    return store


def test_a_replaced_descriptor_is_stored_before_the_old_one_is_removed(manager: Manager) -> None:
    store = opened(manager, FDSTORE="100")
    keeping = DeviceKeeping(store, "web", "balloon")
    with closing(*(fds := [os.eventfd(0) for _ in range(3)])):
        for fd in fds:
            keeping.keep("kick.0", fd)
        keeping.forget("kick.0")
        keeping.keep("kick.0", fds[0])
    store.leave()
    assert manager.taken() == [
        (f"store {KICK}", 1),
        (f"store {KICK}~1", 1),
        (f"remove {KICK}", 0),
        (f"store {KICK}~2", 1),
        (f"remove {KICK}~1", 0),
        (f"remove {KICK}~2", 0),
        (f"store {KICK}", 1),
    ]


def test_what_is_stored_is_not_sent_again(manager: Manager) -> None:
    """A manager keeps an open file under its first name, so the removal would be its end."""
    store = opened(manager, FDSTORE="100")
    with closing(fd := os.eventfd(0), again := os.dup(fd)):
        store.keep(KICK, fd)
        store.keep(KICK, again)
    assert manager.taken() == [(f"store {KICK}", 1)]
    store.leave()


def test_of_two_generations_the_newest_counts_and_the_other_goes(manager: Manager) -> None:
    store = opened(manager, FDSTORE="100")
    old, new, other = (OwnedFd(os.eventfd(value)) for value in (1, 2, 3))
    kept = KeptFds({f"{KICK}~4": [new], KICK: [old], "web/mem0/kick.0": [other]})
    kept.tell(store)
    taken = kept.take(KICK)
    assert taken is not None and os.eventfd_read(taken.fileno()) == 2
    assert kept.take(KICK) is None
    store.keep(KICK, taken.fileno())
    assert manager.taken() == []
    kept.let_go("web/", store)
    assert manager.taken() == [(f"remove {KICK}", 0), ("remove web/mem0/kick.0", 0)]
    with closing(fd := os.eventfd(0)):
        store.keep(KICK, fd)
    taken.close()
    assert manager.taken() == [(f"store {KICK}~5", 1), (f"remove {KICK}~4", 0)]
    store.leave()


@pytest.mark.parametrize("room", ["0", "", "many"])
def test_a_manager_that_keeps_none_is_sent_none(manager: Manager, room: str) -> None:
    store = open_store({"NOTIFY_SOCKET": str(manager.path), "FDSTORE": room})
    assert isinstance(store, NoStore)
    assert not store.working


def test_a_manager_that_does_not_say_it_keeps_any_is_sent_none(manager: Manager) -> None:
    """What it does not read would pin a guest's memory, and the lock of an image."""
    assert isinstance(open_store({"NOTIFY_SOCKET": str(manager.path)}), NoStore)


def test_without_a_manager_or_with_one_that_is_gone_there_is_none(tmp_path: Path) -> None:
    assert isinstance(open_store({"FDSTORE": "100"}), NoStore)
    gone = {"FDSTORE": "100", "NOTIFY_SOCKET": str(tmp_path / "gone")}
    assert isinstance(open_store(gone), NoStore)
