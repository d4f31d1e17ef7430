"""Whatever a service stored comes back to its successor, by name, with its content."""

from __future__ import annotations

import os
import resource
import signal
import socket
from pathlib import Path

import pytest

from tests.fakes.eventfd import wait_readable
from tests.keeper.keeping import TIMEOUT_S, closing, hangs_up, keeping

KILLS = 50
RESTARTS = 300


def memfd(content: bytes) -> int:
    fd = os.memfd_create("m", os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd


def test_fifty_kills_lose_nothing(folder: Path) -> None:
    kick, call = os.eventfd(0, os.EFD_CLOEXEC), os.eventfd(0, os.EFD_CLOEXEC)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    memory = memfd(b"guest memory")
    ours.settimeout(10)
    with ours, theirs, closing(kick, call, memory), keeping(folder) as keeper:
        service = keeper.next_service()
        assert service.passed == {}
        service.store("web.balloon.0", theirs.fileno(), call)
        service.store("web.kick.0", kick, poll=False)
        service.store("web.state.0", memory)
        theirs.close()
        for number in range(1, KILLS + 1):
            # What it stores last, with nobody waiting for it, is kept as well.
            with closing(late := memfd(b"late %d" % number)):
                service.send("store_and_die", f"late.{number}", fds=[late])
            service = keeper.next_service()
            late_ones = {f"late.{index}": 1 for index in range(1, number + 1)}
            stored = {"web.balloon.0": 2, "web.kick.0": 1, "web.state.0": 1, **late_ones}
            assert service.passed == stored
            names = service.hello["environment"]["LISTEN_FDNAMES"].split(":")
            assert names[:4] == ["web.balloon.0", "web.balloon.0", "web.kick.0", "web.state.0"]
            assert names[4:] == list(late_ones)
            given_socket, given_call = service.give("web.balloon.0")
            (given_kick,) = service.give("web.kick.0")
            (given_memory,) = service.give("web.state.0")
            (given_late,) = service.give(f"late.{number}")
            with closing(given_socket, given_call, given_kick, given_memory, given_late):
                os.write(given_socket, b"%d" % number)
                assert ours.recv(16) == b"%d" % number
                os.eventfd_write(given_call, number)
                os.eventfd_write(given_kick, number + 1000)
                assert os.eventfd_read(call) == number
                assert os.eventfd_read(kick) == number + 1000
                assert os.pread(given_memory, 16, 0) == b"guest memory"
                assert os.pread(given_late, 16, 0) == b"late %d" % number


def test_all_that_a_dead_service_sent_is_taken_in_before_the_next_one_starts(
    folder: Path,
) -> None:
    names = [f"m.{index}" for index in range(5)]
    with closing(*(fds := [memfd(b"") for _ in names])), keeping(folder) as keeper:
        service = keeper.next_service()
        keeper.signal(signal.SIGSTOP)
        with closing(process := os.pidfd_open(service.pid)):
            service.send("store_and_die", *names, fds=fds)
            assert wait_readable(process, TIMEOUT_S)
        keeper.signal(signal.SIGCONT)
        assert keeper.next_service().passed == dict.fromkeys(names, 1)


def test_a_service_gets_its_descriptors_from_3_on_and_nothing_of_the_keeper_s(
    folder: Path,
) -> None:
    with keeping(folder) as keeper:
        first = keeper.next_service()
        assert "LISTEN_PID" not in first.hello["environment"]
        extra = [number for number in first.hello["open"] if number > 2]
        for index in range(20):
            with closing(fd := memfd(b"")):
                first.store(f"m.{index}", fd)
        first.tell("forget", "m.3")
        second = keeper.successor_of(first)
        environment = second.hello["environment"]
        assert environment["LISTEN_PID"] == str(second.pid)
        assert second.hello["open"] == sorted({0, 1, 2, *range(3, 22), *(n + 19 for n in extra)})
        assert second.hello["group"] == second.pid
        assert second.hello["blocked"] == []


def test_what_is_forgotten_is_closed_and_does_not_come_back(folder: Path) -> None:
    read_end, write_end = os.pipe()
    kept = os.eventfd(0)
    with closing(read_end, write_end, kept), keeping(folder) as keeper:
        service = keeper.next_service()
        service.store("gone", write_end)
        service.store("kept", kept)
        os.close(write_end)
        assert not hangs_up(read_end, 0)
        service.tell("forget", "gone")
        assert hangs_up(read_end)
        service = keeper.successor_of(service)
        assert service.passed == {"kept": 1}


def test_a_connection_whose_peer_is_gone_is_dropped_unless_not_polled(folder: Path) -> None:
    polled, polled_peer = socket.socketpair()
    unpolled, unpolled_peer = socket.socketpair()
    with polled, polled_peer, unpolled, unpolled_peer, keeping(folder) as keeper:
        service = keeper.next_service()
        service.store("polled", polled.fileno())
        service.store("unpolled", unpolled.fileno(), poll=False)
        for end in (polled, unpolled, polled_peer, unpolled_peer):
            end.close()
        keeper.wait_line("dropped 1 stored descriptors that hung up, 1 left")
        assert keeper.successor_of(service).passed == {"unpolled": 1}


def test_one_open_file_is_kept_once_under_its_first_name(folder: Path) -> None:
    one, other = os.eventfd(0), os.eventfd(0)
    with closing(one, other, again := os.dup(one)), keeping(folder) as keeper:
        service = keeper.next_service()
        service.store("a", one, other)
        service.store("a", again)
        service.store("b", again)
        keeper.wait_line("a descriptor keeps its first name: b is a")
        assert keeper.successor_of(service).passed == {"a": 2}


def test_hundreds_in_one_call_keep_their_order(folder: Path) -> None:
    memfds = [memfd(b"%d" % number) for number in range(600)]
    with closing(*memfds), keeping(folder) as keeper:
        service = keeper.next_service()
        for start in range(0, 600, 200):
            service.store("m", *memfds[start : start + 200])
        service = keeper.successor_of(service)
        assert service.passed == {"m": 600}
        assert service.hello["environment"]["LISTEN_FDNAMES"] == ":".join(["m"] * 600)


def test_names_that_would_not_fit_into_the_environment_are_refused(folder: Path) -> None:
    with closing(*(fds := [os.eventfd(0) for _ in range(600)])), keeping(folder) as keeper:
        service = keeper.next_service()
        for index in range(3):
            service.store(f"{index}" * 255, *fds[index * 200 :][:200])
        keeper.wait_line("the store is full: 131056 bytes of names")
        service = keeper.successor_of(service)
        assert sum(service.passed.values()) == 131056 // 256


def test_three_hundred_restarts_leak_nothing(folder: Path) -> None:
    with closing(kept := os.eventfd(0)), keeping(folder) as keeper:
        service = keeper.next_service()
        service.store("kept", kept)
        before = keeper.open_fds()
        for number in range(RESTARTS):
            if number % 2:
                service.kill()
            else:
                keeper.signal(signal.SIGHUP)
            old, service = service, keeper.next_service()
            old.control.close()  # not sooner: on that it would end by itself, and the keeper too
            assert service.passed == {"kept": 1}
            keeper.wait_line(f"PID {service.pid} with 1 desc")
        service.ready()
        assert keeper.open_fds() == before
        assert service.hello["open"] == [0, 1, 2, 3, 4, 5]


def test_the_service_may_open_as_many_files_as_the_keeper(folder: Path) -> None:
    with keeping(folder) as keeper:
        service = keeper.next_service()
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert resource.prlimit(service.pid, resource.RLIMIT_NOFILE) == (hard, hard)


@pytest.mark.parametrize("count", [5])
def test_a_full_store_keeps_what_it_has(folder: Path, count: int) -> None:
    with (
        closing(*(fds := [os.eventfd(0) for _ in range(count + 3)])),
        keeping(folder, store_max=count) as keeper,
    ):
        service = keeper.next_service()
        before = keeper.open_fds()
        service.store("e", *fds)
        keeper.wait_line(f"the store is full: {count} descriptors")
        assert keeper.open_fds() == before + count
        service.tell("forget", "e")
        service.store("f", *fds[:count])
        assert keeper.successor_of(service).passed == {"f": count}
