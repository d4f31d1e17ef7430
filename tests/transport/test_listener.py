"""Socket files: modes, stale ones, somebody else's, and sockets that were handed over."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest
import trio
import trio.testing
from vhostd.errors import ConfigError
from vhostd.protocol.requests import Request
from vhostd.transport.connection import Connection
from vhostd.transport.listener import Listener, from_passed_fd

from tests.protocol.streams import encoded
from tests.transport.sockets import no_leak


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.connect(str(path))
    return client


def stale(path: Path) -> None:
    """What a killed process leaves behind."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(path))
        sock.listen()


async def test_a_vmm_connects_and_is_heard(tmp_path: Path) -> None:
    with no_leak():
        listener = Listener.bind(tmp_path / "web.sock")
        with connect(tmp_path / "web.sock") as vmm:
            connection = await listener.accept()
            vmm.send(encoded(Request.GET_FEATURES))
            message = await connection.receive()
            assert message is not None
            assert message.request == Request.GET_FEATURES
            connection.close()
        listener.close()


@pytest.mark.parametrize("mode", [0o600, 0o660])
async def test_the_socket_has_its_mode_whatever_umask_says(tmp_path: Path, mode: int) -> None:
    old = os.umask(0o777)
    try:
        listener = Listener.bind(tmp_path / "s", mode)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == mode
    listener.close()


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    stale(tmp_path / "s")

    listener = Listener.bind(tmp_path / "s")

    connect(tmp_path / "s").close()
    listener.close()


async def test_a_socket_somebody_serves_is_left_alone(tmp_path: Path) -> None:
    with no_leak():
        listener = Listener.bind(tmp_path / "s")
        with pytest.raises(ConfigError, match="another process serves"):
            Listener.bind(tmp_path / "s")
        connect(tmp_path / "s").close()
        listener.close()


async def test_a_socket_with_a_full_backlog_is_being_served(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as busy:
        busy.bind(str(tmp_path / "s"))
        busy.listen(0)
        with connect(tmp_path / "s"), pytest.raises(ConfigError, match="another process serves"):
            Listener.bind(tmp_path / "s")


async def test_a_file_in_the_way_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")

    with pytest.raises(ConfigError, match="no socket"):
        Listener.bind(tmp_path / "s")

    assert (tmp_path / "s").read_text() == "precious"


@pytest.mark.parametrize("name", ["missing/s", "x" * 200])
async def test_a_path_that_cannot_be_is_a_config_error(tmp_path: Path, name: str) -> None:
    with no_leak(), pytest.raises(ConfigError):
        Listener.bind(tmp_path / name)


async def test_closing_removes_the_path(tmp_path: Path) -> None:
    listener = Listener.bind(tmp_path / "s")
    listener.close()
    listener.close()

    assert not (tmp_path / "s").exists()


async def test_closing_leaves_a_path_that_is_somebody_elses(tmp_path: Path) -> None:
    listener = Listener.bind(tmp_path / "s")
    (tmp_path / "s").rename(tmp_path / "moved")
    other = Listener.bind(tmp_path / "s")

    listener.close()

    assert (tmp_path / "s").exists()
    other.close()


async def test_closing_wakes_who_accepts(tmp_path: Path) -> None:
    listener = Listener.bind(tmp_path / "s")
    async with trio.open_nursery() as nursery:

        async def accept() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await listener.accept()

        nursery.start_soon(accept)
        await trio.testing.wait_all_tasks_blocked()
        listener.close()
    with pytest.raises(trio.ClosedResourceError):
        await listener.accept()


async def test_a_listening_socket_can_be_handed_over(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.bind(str(tmp_path / "s"))
        sock.listen()
        given = os.dup(sock.fileno())
        os.set_inheritable(given, True)
        passed = from_passed_fd(given)
    assert isinstance(passed, Listener)
    assert not os.get_inheritable(passed.fileno())
    passed.close()
    assert (tmp_path / "s").exists(), "its path belongs to who made it"


async def test_a_connected_socket_can_be_handed_over() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        passed = from_passed_fd(ours.detach())
        assert isinstance(passed, Connection)
        theirs.send(encoded(Request.GET_FEATURES))
        assert await passed.receive() is not None
        passed.close()


def test_other_descriptors_handed_over_are_a_config_error() -> None:
    reader, writer = os.pipe()
    for fd in (reader, 9999):
        with pytest.raises(ConfigError, match=f"fd {fd}: is no socket"):
            from_passed_fd(fd)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
        with pytest.raises(ConfigError, match="no UNIX stream socket"):
            from_passed_fd(datagram.fileno())
        assert datagram.getsockname() == "", "still open"
    os.close(reader)
    os.close(writer)
