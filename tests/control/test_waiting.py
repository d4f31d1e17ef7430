"""Requests that wait: they take no place from others, and end with their clients."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from vhostd.control import seats
from vhostd.control.seats import Seat, Seats

from tests.control.daemon import RunningDaemon, running_daemon
from tests.control.test_server import client, connect, wait_until

CONNECTIONS_MAX = 4
WAITING_MAX = 8
WAITING_PER_VM_MAX = 6
WAITS = json.dumps({"size": "64M", "wait_s": 3600}).encode()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningDaemon]:
    """A daemon with few places."""
    monkeypatch.setattr(seats, "CONNECTIONS_MAX", CONNECTIONS_MAX)
    monkeypatch.setattr(seats, "WAITING_MAX", WAITING_MAX)
    monkeypatch.setattr(seats, "WAITING_PER_VM_MAX", WAITING_PER_VM_MAX)
    with running_daemon(tmp_path) as running:
        yield running


def ask(running: RunningDaemon, method: str, path: str, body: bytes = b"") -> socket.socket:
    """Send a request and leave the answer to come."""
    connection = connect(running.addresses.control)
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def wait_for_waiting(running: RunningDaemon, count: int) -> None:
    wait_until(lambda: running.daemon.events.subscribers == count)


def refusal(running: RunningDaemon, path: str) -> tuple[int, str]:
    """Status and code of a request that would wait."""
    with client(running.addresses.control) as http:
        answer = http.put(path, content=WAITS)
    return answer.status_code, answer.json()["code"]


def test_a_request_that_waits_ends_with_its_client(small: RunningDaemon) -> None:
    for path in ("/v1/vms/web/mem", "/v1/vms/web/memory"):
        for _ in range(3):
            waiting = [ask(small, "PUT", path, WAITS) for _ in range(WAITING_PER_VM_MAX)]
            wait_for_waiting(small, WAITING_PER_VM_MAX)
            for connection in waiting:
                connection.close()
            wait_for_waiting(small, 0)


def test_however_many_wait_others_are_served(small: RunningDaemon) -> None:
    with ExitStack() as stack, client(small.addresses.control) as http:
        for _ in range(WAITING_PER_VM_MAX):
            stack.enter_context(ask(small, "PUT", "/v1/vms/web/mem", WAITS))
        wait_for_waiting(small, WAITING_PER_VM_MAX)
        assert refusal(small, "/v1/vms/web/mem") == (503, "too_many")
        left = WAITING_MAX - WAITING_PER_VM_MAX
        followers = [stack.enter_context(ask(small, "GET", "/v1/events")) for _ in range(left)]
        wait_for_waiting(small, WAITING_MAX)
        assert refusal(small, "/v1/vms/web/mem") == (503, "too_many")
        # Twice as many as there are connections wait, and everything else is answered.
        for _ in range(2 * CONNECTIONS_MAX):
            assert read(small, "/v1/vms/web") == 200
        done = http.put("/v1/vms/web/balloon", json={"target": "0", "wait_s": 3600})
        assert done.status_code == 200, "what is there already waits for nothing"
        followers[0].close()
        wait_for_waiting(small, WAITING_MAX - 1)
        assert refusal(small, "/v1/vms/web/mem") == (503, "too_many"), "of this VM as many wait"
        stack.enter_context(ask(small, "GET", "/v1/events"))
        wait_for_waiting(small, WAITING_MAX)


def read(running: RunningDaemon, path: str) -> int:
    """The status of a read on a connection of its own."""
    with client(running.addresses.control) as http:
        return http.get(path).status_code


def test_a_daemon_that_ends_tells_those_that_wait(small: RunningDaemon) -> None:
    with ask(small, "PUT", "/v1/vms/web/mem", WAITS) as waiting:
        wait_for_waiting(small, 1)
        small.stop()
        answer = waiting.recv(65536)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b'"code":"stopping"' in answer


async def test_a_seat_is_left_once_however_often_it_waits() -> None:
    places = Seats()
    for _ in range(2 * seats.CONNECTIONS_MAX):
        await places.reserve()
        seat = Seat(places)
        assert seat.wait("web") and seat.wait("web")
        seat.leave()
    for _ in range(seats.WAITING_PER_VM_MAX):
        assert Seat(places).wait("web")
    assert not Seat(places).wait("web")
    assert Seat(places).wait("db")


def test_a_guest_that_gets_there_answers_all_that_wait(small: RunningDaemon) -> None:
    with ExitStack() as stack:
        waiting = [
            stack.enter_context(ask(small, "PUT", "/v1/vms/web/mem", WAITS)) for _ in range(3)
        ]
        wait_for_waiting(small, 3)
        small.do(lambda: small.daemon.web.plug(0, 32))
        for connection in waiting:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
