"""The store by itself, and how descriptors are put where a successor looks for them."""

from __future__ import annotations

import os
import random
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from vhostd.fds import OwnedFd
from vhostd.keeper import same_file
from vhostd.keeper.store import NAMES_LENGTH_MAX, AlreadyStored, FdStore, StoreFull

from tests.fakes.eventfd import wait_readable
from tests.keeper.keeping import ROOT, closing
from tests.transport.sockets import no_leak

PLACE = """
import fcntl, os, random, sys
from vhostd.keeper.child import place
for seed in range(200):
    if os.fork() == 0:
        chance = random.Random(seed)
        count = chance.randrange(1, 40)
        numbers = chance.sample(range(3, 60 + count), count)
        chance.shuffle(numbers)
        spare = os.memfd_create("spare")
        high = fcntl.fcntl(spare, fcntl.F_DUPFD_CLOEXEC, 500)
        os.closerange(3, 400)
        for index, number in enumerate(numbers):
            fd = os.memfd_create(f"m{index}")
            if fd != number:
                # What lies there already moves on to some other free number.
                if number < 400 and os.path.exists(f"/proc/self/fd/{number}"):
                    os._exit(9)
                os.dup2(fd, number, inheritable=False)
                os.close(fd)
        place(numbers)
        for index in range(count):
            link = os.readlink(f"/proc/self/fd/{3 + index}")
            assert link == f"/memfd:m{index} (deleted)", (seed, index, link)
            assert os.get_inheritable(3 + index)
        inheritable = [n for n in map(int, os.listdir("/proc/self/fd"))
                       if n > 2 and os.path.exists(f"/proc/self/fd/{n}") and os.get_inheritable(n)]
        assert sorted(inheritable) == list(range(3, 3 + count)), (seed, inheritable)
        os._exit(0)
    _, status = os.wait()
    assert os.waitstatus_to_exitcode(status) == 0, (seed, status)
"""


@pytest.fixture
def store() -> Iterator[FdStore]:
    with no_leak():
        store = FdStore(count_max=8)
        yield store
        store.close()


def test_descriptors_land_in_order_wherever_they_were() -> None:
    result = subprocess.run(
        [sys.executable, "-S", "-c", PLACE],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_the_order_is_that_of_storing(store: FdStore) -> None:
    for name in ("b", "a", "b", "c"):
        store.add(name, OwnedFd(os.eventfd(0)))
    assert [name for name, _ in store] == ["b", "a", "b", "c"]
    assert store.remove("b") == 2
    assert store.remove("b") == 0
    assert [name for name, _ in store] == ["a", "c"]


def test_eventfds_are_told_apart_and_duplicates_are_not(store: FdStore) -> None:
    fds = [os.eventfd(0) for _ in range(7)]
    for fd in fds:
        store.add("e", OwnedFd(os.dup(fd)))
    for fd in fds:
        with pytest.raises(AlreadyStored, match="e"):
            store.add("again", OwnedFd(os.dup(fd)))
    assert store.remove("e") == 7
    for fd in fds:
        store.add("e", OwnedFd(fd))  # no trace of the removed ones is left
    assert len(store) == 7


def test_two_openings_of_one_file_are_two(store: FdStore) -> None:
    for _ in range(2):
        store.add("null", OwnedFd(os.open(os.devnull, os.O_RDONLY)))
    assert len(store) == 2


def test_members_are_found_among_many_whatever_the_order() -> None:
    chance = random.Random(1)
    fds = [os.eventfd(0) for _ in range(300)]
    files = same_file.OpenFiles()
    chance.shuffle(fds)
    with closing(*fds):
        assert [files.duplicate_of(fd) for fd in fds] == [None] * 300
        for fd in chance.sample(fds, 100):
            files.discard(fd)
            assert files.duplicate_of(fd) is None
        for fd in fds:
            with closing(again := os.dup(fd)):
                assert files.duplicate_of(again) == fd


def test_a_kernel_that_does_not_compare_costs_only_numbers(
    store: FdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(same_file, "_KCMP_NUMBERS", {os.uname().machine: 1 << 20})  # ENOSYS
    fd = os.eventfd(0)
    for _ in range(3):
        store.add("e", OwnedFd(os.dup(fd)))
    os.close(fd)
    assert len(store) == 3
    assert store.remove("e") == 3


def test_a_hang_up_wakes_and_drops_that_one_only(store: FdStore) -> None:
    (one, peer), (other, other_peer) = socket.socketpair(), socket.socketpair()
    with one, peer, other, other_peer:
        store.add("one", OwnedFd(os.dup(one.fileno())))
        store.add("other", OwnedFd(os.dup(other.fileno())))
        store.add("file", OwnedFd(os.memfd_create("m")))
        peer.shutdown(socket.SHUT_WR)  # half a goodbye is none
        other_peer.send(b"data")
        assert not wait_readable(store.fileno(), 0)
        peer.close()
        assert wait_readable(store.fileno(), 10)
        assert store.drop_hung_up() == ["one"]
        # `one` is open here, and hung up: the store must not watch it any more.
        assert not wait_readable(store.fileno(), 0)
        assert [name for name, _ in store] == ["other", "file"]


def test_limits_close_what_they_refuse(store: FdStore) -> None:
    for _ in range(8):
        store.add("e", OwnedFd(os.eventfd(0)))
    fd = OwnedFd(os.eventfd(0))
    with pytest.raises(StoreFull, match="8 descriptors"):
        store.add("e", fd)
    assert fd.closed
    store.remove("e")
    duplicate = OwnedFd(os.eventfd(0))
    store.add("e", OwnedFd(os.dup(duplicate.fileno())))
    with pytest.raises(AlreadyStored):
        store.add("e", duplicate)
    assert duplicate.closed


def test_names_take_room_only_while_they_are_stored() -> None:
    with OwnedFd(os.eventfd(0)) as fd:
        store = FdStore()
        for _ in range(2 * NAMES_LENGTH_MAX // 256):
            store.add("n" * 255, OwnedFd(os.dup(fd.fileno())))
            store.remove("n" * 255)
        store.close()


def test_the_compared_are_open_files_of_this_process() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pytest.raises(same_file.Incomparable):
        same_file.compare(0, soft)  # no descriptor can have that number
    assert same_file.compare(0, 0) == 0
