"""What a service manager has stored of a VM, and what a successor finds whenever we die."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

import pytest
from vhostd.fds import OwnedFd
from vhostd.handover.bundle import Entry, Manifest, pack, peek
from vhostd.handover.fd_store import DeviceKeeping
from vhostd.handover.kept_fds import KeptFds
from vhostd.handover.stored import NAME_LENGTH_MAX

from tests.handover.manager import CONNECTION, KICK, Manager, opened, value
from tests.keeper.keeping import closing


def test_a_vm_is_one_descriptor_and_those_that_must_be_apart(manager: Manager) -> None:
    store = opened(manager)
    balloon = DeviceKeeping(store, "web", "balloon")
    ours, theirs = socket.socketpair()
    with ours, theirs, closing(*(fds := [os.eventfd(value) for value in range(1, 31)])):
        for number, fd in enumerate(fds):
            balloon.keep(f"kick.{number}", fd)
            manager.take_all()  # its queue holds ten
        balloon.keep("connection", ours.fileno(), apart=True)
        manager.take_all()
        assert len(manager.stored) == 2
        assert max(map(len, manager.stored)) <= NAME_LENGTH_MAX
        kept = manager.kept()
        assert [value(kept, f"web/balloon/kick.{number}") for number in range(30)] == [
            *range(1, 31)
        ]
        found = kept.take(CONNECTION)
        assert found is not None
        theirs.send(b"x")
        assert os.read(found.fileno(), 1) == b"x"
        assert kept.take(CONNECTION) is None
        balloon.forget_all(but="connection")
        manager.take_all()
        assert len(manager.stored) == 2
        assert manager.kept().names("web/balloon/") == [CONNECTION]
    store.leave()


def test_whenever_we_die_a_successor_finds_the_old_or_the_new_and_all_else(
    manager: Manager,
) -> None:
    """Each message that the manager takes in may have been our last."""
    store = opened(manager)
    sockets = [socket.socketpair() for _ in range(2)]
    ends = [end.detach() for pair in sockets for end in pair]
    connections = ends[0], ends[2]
    with closing(*ends, *(fds := [os.eventfd(value) for value in (1, 2, 3)])):
        store.keep("web/-/state", fds[0])
        store.keep(KICK, fds[1])
        store.keep(CONNECTION, connections[0], apart=True)
        manager.take_all()
        store.keep(KICK, fds[2])
        store.keep(CONNECTION, connections[1], apart=True)
        found = []
        while manager.take():
            kept = manager.kept()
            connection = kept.take(CONNECTION)
            assert connection is not None
            inode = os.fstat(connection.fileno()).st_ino
            which = [os.fstat(fd).st_ino for fd in connections].index(inode)
            assert value(kept, "web/-/state") == 1
            found.append((value(kept, KICK), which))
        assert found[0] == (3, 0) and found[-1] == (3, 1)
        assert sorted(found, key=lambda pair: pair[1]) == found
        # Stored bundle, removed one; stored socket, stored bundle, removed both.
        assert len(found) == 6
        assert len(manager.stored) == 2
    store.leave()


def test_what_a_death_left_over_is_removed_by_the_successor(manager: Manager) -> None:
    store = opened(manager)
    with closing(*(fds := [os.eventfd(value) for value in (1, 2)])):
        store.keep(KICK, fds[0])
        manager.take_all()
        store.keep(KICK, fds[1])
        assert manager.take()  # the new bundle; the old one stays
        store.leave()
        while manager.socket.recv(100):
            break
        assert len(manager.stored) == 2
        kept = manager.kept()
        successor = opened(manager)
        successor.adopt(kept)
        manager.take_all()
        assert len(manager.stored) == 1
        assert value(kept, KICK) == 2
        successor.leave()


def test_a_bundle_that_can_t_be_read_keeps_all_that_is_nobody_s(manager: Manager) -> None:
    """A socket beside it may be its own."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        other = Manifest(99, "web", 1, [])
        passed = {"b0": [pack(other, [])], "a1": [OwnedFd(os.dup(ours.fileno()))]}
        kept = KeptFds(passed)
        store = opened(manager)
        store.adopt(kept)
        assert manager.take_all() == []
        assert kept.vms() == set()
        store.leave()


def test_what_is_stored_is_not_sent_again(manager: Manager) -> None:
    """A manager keeps an open file under its first name, so the removal would be its end."""
    store = opened(manager)
    ours, theirs = socket.socketpair()
    with ours, theirs, closing(fd := os.eventfd(0), again := os.dup(ours.fileno())):
        store.keep(KICK, fd)
        store.keep(CONNECTION, ours.fileno(), apart=True)
        manager.take_all()
        store.keep(KICK, fd)
        store.keep(CONNECTION, again, apart=True)
        assert manager.take_all() == []
        successor = opened(manager)
        successor.adopt(manager.kept())
        successor.keep(KICK, fd)
        successor.keep(CONNECTION, again, apart=True)
        assert manager.take_all() == []
        successor.leave()
    store.leave()


def test_what_the_release_before_stored_is_taken_over(manager: Manager) -> None:
    """It stored each by itself as VM/DEVICE/ROLE, a replaced one with a number behind it."""
    old, new, other, next_one = (OwnedFd(os.eventfd(value)) for value in (1, 2, 3, 4))
    manager.stored = {f"{KICK}~4": new, KICK: old, "web/mem0/kick.0": other}
    kept = manager.kept()
    store = opened(manager)
    store.adopt(kept)
    assert manager.take_all() == [f"remove {KICK}"]
    assert kept.vms() == {"web"}
    assert value(kept, KICK) == 2
    with next_one:
        store.keep(KICK, next_one.fileno())
    assert manager.take_all() == ["store b0", f"remove {KICK}~4"]
    kept.let_go("web", store)
    assert manager.take_all() == ["store b1", "remove b0", "remove web/mem0/kick.0"]
    assert value(manager.kept(), KICK) == 4
    store.leave()


def test_more_than_a_packet_holds(tmp_path: Path) -> None:
    entries = [Entry(f"-/memory.{number}", str(number)) for number in range(600)]
    with closing(fd := os.eventfd(7)):
        bundle = pack(Manifest(1, "web", 1, entries), [fd] * len(entries))
    for _ in range(2):  # reading it takes nothing out
        manifest, fds = peek(bundle.fileno())
        assert len(manifest.entries) == len(fds) == 600
        for found in fds:
            found.close()
    bundle.close()


def test_without_room_for_a_bundle_s_descriptors_it_stays_whole() -> None:
    with closing(fd := os.eventfd(7)):
        bundle = pack(Manifest(1, "web", 1, [Entry("r", "i")] * 200), [fd] * 200)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (bundle.fileno() + 60, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            peek(bundle.fileno())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(peek(bundle.fileno())[1]) == 200
    bundle.close()


def test_what_can_t_be_bundled_is_told_until_it_is(manager: Manager) -> None:
    store = opened(manager)
    told: list[tuple[str, str]] = []
    store.tell_failures(lambda vm, why: told.append((vm, why)))
    fds = [os.eventfd(0) for _ in range(3)]
    with closing(*fds):
        store.keep(KICK, fds[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(fds) + 2, hard))
        try:
            store.keep("web/balloon/call.0", fds[1])
            store.keep("web/balloon/call.0", fds[1])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert told == [("web", "balloon/call.0 can't be kept: Too many open files")]
        assert store.not_kept("web") == told[0][1]
        assert store.not_kept("other") is None
        store.keep("web/balloon/call.0", fds[1])
        assert store.not_kept("web") is None
        manager.take_all()
        assert value(manager.kept(), "web/balloon/call.1") is None
        assert manager.kept().take("web/balloon/call.0") is not None
    store.leave()


def test_what_is_left_of_a_vm_is_not_changed_until_it_is_cleared(manager: Manager) -> None:
    store = opened(manager)
    with closing(*(fds := [os.eventfd(value) for value in (1, 2)])):
        store.keep(KICK, fds[0])
        store.leave_vm("web")
        store.keep(KICK, fds[1])
        store.forget("web", [KICK])
        manager.take_all()
        assert value(manager.kept(), KICK) == 1
        store.clear_vm("web")
        manager.take_all()
        assert not manager.stored
        store.keep(KICK, fds[1])
        manager.take_all()
        assert value(manager.kept(), KICK) == 2
    store.leave()
