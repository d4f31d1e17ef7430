"""Datagrams that are none of the keeper's business do no harm and leave no descriptor behind."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from vhostd.errors import HostError
from vhostd.keeper.notify_socket import NotifySocket

from tests.keeper.keeping import Keeper, Service, closing, hangs_up, keeping
from tests.transport.sockets import no_leak

FLOOD = 500

BAD = {
    "empty": b"",
    "newlines": b"\n\n",
    "no assignment": b"FDSTORE=1\nFDNAME=x\nhello",
    "no key": b"FDSTORE=1\nFDNAME=x\n=1",
    "NUL": b"FDSTORE=1\nFDNAME=x\0y",
    "no UTF-8": b"FDSTORE=1\nFDNAME=x\nSTATUS=\xff",
    "too long": b"FDSTORE=1\nFDNAME=x\nSTATUS=" + b"s" * 4096,
    "name with a colon": b"FDSTORE=1\nFDNAME=a:b",
    "name with a control character": b"FDSTORE=1\nFDNAME=a\x07",
    "name that is no ASCII": "FDSTORE=1\nFDNAME=ä".encode(),
    "empty name": b"FDSTORE=1\nFDNAME=",
    "name too long": b"FDSTORE=1\nFDNAME=" + b"n" * 256,
    "not to be stored": b"STATUS=up",
    "no such value": b"FDSTORE=yes\nFDNAME=x",
    "removed and stored": b"FDSTOREREMOVE=1\nFDSTORE=1\nFDNAME=x",
    "removed without a name": b"FDSTOREREMOVE=1",
    "barrier and more": b"BARRIER=1\nFDSTORE=1\nFDNAME=x",
}


def assert_serves(keeper: Keeper, service: Service) -> None:
    """It still stores and restarts, and has stored nothing else."""
    with closing(fd := os.eventfd(0)):
        service.store("good", fd)
    service = keeper.successor_of(service)
    assert service.passed == {"good": 1}


@pytest.mark.parametrize("message", BAD.values(), ids=BAD.keys())
def test_a_bad_message_is_dropped_with_its_descriptors(folder: Path, message: bytes) -> None:
    read_end, write_end = os.pipe()
    with closing(read_end, write_end), keeping(folder) as keeper:
        service = keeper.next_service()
        service.tell("raw", message.hex(), fds=[write_end])
        os.close(write_end)
        assert hangs_up(read_end)
        assert_serves(keeper, service)


def test_nobody_but_the_service_is_heard(folder: Path) -> None:
    read_end, write_end = os.pipe()
    with (
        closing(read_end, write_end),
        keeping(folder) as keeper,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger,
    ):
        service = keeper.next_service()
        stranger.connect(service.hello["environment"]["NOTIFY_SOCKET"])
        for message in (b"FDSTORE=1\nFDNAME=x", b"BARRIER=1", b"WATCHDOG=trigger", b"READY=1"):
            socket.send_fds(stranger, [message], [write_end])
        os.close(write_end)
        assert hangs_up(read_end)
        assert_serves(keeper, service)
        log = keeper.wait_line("restarted")
        assert "refused a message from another process" in log
        assert "ready" not in log
        assert "stuck" not in log


def test_nobody_else_may_even_reach_the_socket(folder: Path) -> None:
    with keeping(folder) as keeper:
        path = Path(keeper.next_service().hello["environment"]["NOTIFY_SOCKET"])
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert path.parent.parent == folder


def test_a_place_that_cannot_be_had_is_said_and_left_clean(folder: Path) -> None:
    long = folder / ("n" * 100)
    long.mkdir()
    with no_leak():
        for parent, why in ((long, "too long"), (folder / "none", "No such file")):
            with pytest.raises(HostError, match=f"cannot be made: .*{why}"):
                NotifySocket(parent)
    assert list(long.iterdir()) == []


def test_a_flood_is_said_once_and_leaks_nothing(folder: Path) -> None:
    with (
        closing(fd := os.eventfd(0)),
        keeping(folder) as keeper,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger,
    ):
        service = keeper.next_service()
        service.ready()
        before = keeper.open_fds()
        stranger.connect(service.hello["environment"]["NOTIFY_SOCKET"])
        for _ in range(FLOOD):
            socket.send_fds(stranger, [b"FDSTORE=1"], [fd] * 253)
        service.tell("raw", b"nonsense".hex())
        service.tell("raw", b"nonsense".hex())
        assert keeper.open_fds() == before
        assert_serves(keeper, service)
        log = keeper.wait_line("restarted")
        assert log.count("another process") == 1
        assert log.count("assigns nothing") == 1
