"""How much room a service manager's store has, and what is told where it has too little."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest
from vhostd.fds import OwnedFd
from vhostd.handover.fd_store import NoStore, need
from vhostd.handover.manager_store import ManagerStore, open_store
from vhostd.handover.unit import ask_store_max

from tests.handover.manager import CONNECTION, KICK, Manager, opened, value
from tests.keeper.keeping import closing


def test_a_vm_for_which_there_is_no_room_is_told_before_it_is_served(manager: Manager) -> None:
    store = opened(manager, FDSTORE="20")
    told: list[tuple[str, str]] = []
    store.tell_failures(lambda vm, why: told.append((vm, why)))
    assert store.admit("one", need(3, 1)) is None
    why = store.admit("two", need(3, 1))
    assert why is not None and "FileDescriptorStoreMax= of the unit to 27" in why
    assert store.admit("three", need(1, 0)) is None
    assert not told and store.not_kept("one") is None
    store.leave()


def test_a_vm_that_is_stored_already_is_served_in_a_store_that_shrank_and_told(
    manager: Manager,
) -> None:
    store = opened(manager)
    with closing(fd := os.eventfd(0)):
        store.keep(KICK, fd)
    manager.take_all()
    successor = opened(manager, FDSTORE="5")
    told: list[tuple[str, str]] = []
    successor.tell_failures(lambda vm, why: told.append((vm, why)))
    successor.adopt(manager.kept())
    assert successor.admit("web", need(3, 1)) is None
    assert [vm for vm, _ in told] == ["web"]
    assert "room for 5" in str(successor.not_kept("web"))
    store.leave()
    successor.leave()


@pytest.mark.parametrize("room", ["0", "", "many"])
def test_a_manager_that_keeps_none_is_sent_none(manager: Manager, room: str) -> None:
    store = open_store({"NOTIFY_SOCKET": str(manager.path), "FDSTORE": room})
    assert isinstance(store, NoStore)
    assert not store.working


def test_the_manager_s_own_word_counts_for_more_than_the_unit_s(manager: Manager) -> None:
    """FileDescriptorStoreMax= may be changed by a drop-in that forgets Environment=."""
    store = opened(manager, FDSTORE="20", VHOSTD_FDSTORE="16384")
    assert store.room == 20
    store.leave()


def test_a_manager_that_does_not_say_it_keeps_any_is_sent_none(manager: Manager) -> None:
    """What it does not read would pin a guest's memory, and the lock of an image."""
    assert isinstance(open_store({"NOTIFY_SOCKET": str(manager.path)}), NoStore)


def test_without_a_manager_or_with_one_that_is_gone_there_is_none(tmp_path: Path) -> None:
    assert isinstance(open_store({"FDSTORE": "100"}), NoStore)
    gone = {"FDSTORE": "100", "NOTIFY_SOCKET": str(tmp_path / "gone")}
    assert isinstance(open_store(gone), NoStore)


def test_what_the_release_before_stored_is_bundled_once_it_is_taken_over(manager: Manager) -> None:
    """It stored 47 of each VM: room for them has to come back."""
    ours, theirs = socket.socketpair()
    fds = {f"web/balloon/kick.{number}": OwnedFd(os.eventfd(number)) for number in range(1, 9)}
    manager.stored = {**fds, CONNECTION: OwnedFd(ours.detach())}
    kept = manager.kept()
    store = opened(manager, FDSTORE="14")
    store.adopt(kept)
    assert manager.take_all() == [], "a VM that is left alone may go back to that release"
    assert store.admit("web", need(1, 0)) is None
    assert manager.take()
    between = manager.kept()
    assert value(between, "web/balloon/kick.7") == 7 and between.take(CONNECTION) is not None
    manager.take_all()
    assert list(manager.stored) == [CONNECTION, "b0"]
    after = manager.kept()
    assert all(value(after, name) == number for number, name in enumerate(fds, start=1))
    assert value(kept, "web/balloon/kick.7") == 7, "the VM still gets what was passed"
    assert store.admit("other", need(2, 0)) is None
    store.leave()
    theirs.close()


def test_what_the_release_before_stored_stays_in_a_store_that_is_full(manager: Manager) -> None:
    manager.stored = {KICK: OwnedFd(os.eventfd(1)), f"{KICK}.1": OwnedFd(os.eventfd(2))}
    store = opened(manager, FDSTORE="2")
    store.adopt(manager.kept())
    assert store.admit("web", need(1, 0)) is None
    assert manager.take_all() == []
    assert "room for 2" in str(store.not_kept("web"))
    store.leave()


def test_our_own_limits_cost_a_vm_what_they_met_and_not_the_manager(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The descriptors a user has under way are limited: ETOOMANYREFS, sendmsg(2)."""
    store = opened(manager)
    told: list[str] = []
    store.tell_failures(lambda vm, why: told.append(vm))
    with closing(*(fds := [os.eventfd(value) for value in (1, 2)])):
        store.keep(KICK, fds[0])

        def send(*_: object, **__: object) -> None:
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))

        with monkeypatch.context() as patched:
            patched.setattr("vhostd.systemd.send", send)
            store.keep(KICK, fds[1])
            store.forget("web", [KICK])
        assert told == ["web"] and store.working
        manager.take_all()
        assert value(manager.kept(), KICK) == 1
        store.keep(KICK, fds[1])
        manager.take_all()
        assert value(manager.kept(), KICK) == 2 and len(manager.stored) == 1
    store.leave()


def test_a_manager_that_is_gone_is_told_for_every_vm(manager: Manager) -> None:
    store = opened(manager)
    told: list[str] = []
    store.tell_failures(lambda vm, why: told.append(vm))
    for vm in ("web", "db"):
        assert store.admit(vm, need(1, 0)) is None
    manager.socket.close()
    with closing(fd := os.eventfd(0)):
        store.keep(KICK, fd)
    assert told == ["web", "db"] and not store.working
    assert store.not_kept("web") and store.not_kept("db")


@pytest.mark.parametrize(("asked", "room"), [(20, 20), (None, 16384)])
def test_where_systemd_does_not_say_the_room_it_is_asked(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, asked: int | None, room: int
) -> None:
    """systemd 252: a drop-in changes FileDescriptorStoreMax= and nothing tells the service."""
    monkeypatch.setattr("vhostd.handover.manager_store.ask_store_max", lambda: asked)
    store = open_store({"NOTIFY_SOCKET": str(manager.path), "VHOSTD_FDSTORE": "16384"})
    assert isinstance(store, ManagerStore) and store.room == room
    store.leave()


UNIFIED = "0::/system.slice/vhostd.service\n"
HYBRID = "5:devices:/system.slice\n1:name=systemd:/system.slice/vhostd.service\n0::/x\n"


@pytest.mark.parametrize(
    ("cgroup", "answer", "room"),
    [
        (UNIFIED, "20", 20),
        (HYBRID, "20", 20),
        (UNIFIED, "", None),
        ("0::/user.slice/session-1.scope\n", "20", None),
    ],
)
def test_systemd_is_asked_for_our_own_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str, answer: str, room: int | None
) -> None:
    program = tmp_path / "systemctl"
    program.write_text(f'#!/bin/sh\n[ "$5" = vhostd.service ] && echo "{answer}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    path = tmp_path / "cgroup"
    path.write_text(cgroup)
    assert ask_store_max(path) == room
    program.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_store_max(path) is None
