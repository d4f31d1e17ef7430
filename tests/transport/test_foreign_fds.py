"""Descriptors of files whose file system never answers: a peer's own FUSE, which is real here."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from vhostd.errors import FrontendError
from vhostd.fds import OwnedFd
from vhostd.transport.backend_channel import BackendChannel
from vhostd.transport.eventfd import check_call, check_eventfd
from vhostd.transport.foreign_fds import PENDING_MAX, Closer, ForeignFd
from vhostd.transport.stream import Read, UnixStream

from tests.fakes.fuse import FLUSH, GETATTR, HungFile, hung_file
from tests.fakes.program import wait_until
from tests.transport.sockets import link, open_fds

IN_TIME_S = 5.0


@pytest.fixture
def hung() -> Iterator[HungFile]:
    """A file whose file system answers nothing."""
    with hung_file() as file:
        yield file


def in_time(work: Callable[[], None]) -> None:
    """Do something that must not wait for a file system, in a thread: it could not be killed."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(IN_TIME_S)
    assert not thread.is_alive(), "it waits for the file system"


def sent(file: HungFile, stream: UnixStream, peer: socket.socket) -> Read:
    """A peer sends the file."""
    socket.send_fds(peer, [b"x"], [file.fd])
    read = stream.try_read(1)
    assert read is not None
    return read


def is_open(fd: int) -> bool:
    try:
        link(fd)
    except OSError:
        return False
    return True


def test_closing_waits_for_no_file_system(hung: HungFile) -> None:
    ours, theirs = socket.socketpair()
    stream = UnixStream(ours)
    with theirs:
        (file,) = sent(hung, stream, theirs).fds
        in_time(file.close)
        hung.wait_asked(FLUSH)
        assert file.closed

        def drop() -> None:
            sent(hung, stream, theirs)

        in_time(drop)
    stream.close()


def test_a_peer_whose_files_are_stuck_is_listened_to_no_more(hung: HungFile) -> None:
    closer, other = Closer(), Closer()
    before = open_fds()
    accepted = 0
    with pytest.raises(FrontendError, match="can't be closed"):
        while accepted <= 2 * PENDING_MAX:
            ours, theirs = socket.socketpair()
            stream = UnixStream(ours, closer)  # the next connection of the same peer
            with theirs:
                (file,) = sent(hung, stream, theirs).fds
                in_time(file.close)
                stream.close()
            accepted += 1
    stream.close()
    assert PENDING_MAX <= accepted <= PENDING_MAX + 2
    assert open_fds() - before <= accepted
    fd = os.open("/", os.O_RDONLY)
    other.close(fd)
    assert wait_until(lambda: not is_open(fd), IN_TIME_S)
    hung.end_storage()
    assert wait_until(lambda: not closer.overrun and open_fds() <= before, IN_TIME_S)


def test_what_asks_no_file_system_is_closed_at_once() -> None:
    closer = Closer()
    reader, writer = os.pipe()
    for fd in (reader, writer, os.eventfd(0), os.memfd_create("ram")):
        ForeignFd(fd, closer).close()
        assert not is_open(fd)


def test_whether_it_is_an_eventfd_or_a_socket_asks_no_file_system(hung: HungFile) -> None:
    ours, theirs = socket.socketpair()
    stream = UnixStream(ours)
    refusals: list[str] = []

    def look(check: Callable[[OwnedFd], object]) -> None:
        with pytest.raises(FrontendError) as refusal:
            check(file)
        refusals.append(str(refusal.value))

    def adopt(fd: OwnedFd) -> None:
        BackendChannel.adopt(fd, reply_ack=True, connection_fd=theirs.fileno())

    with theirs:
        (file,) = sent(hung, stream, theirs).fds
        in_time(lambda: look(lambda fd: check_eventfd(fd, "kick")))
        in_time(lambda: look(lambda fd: check_call(fd, "call")))
        in_time(lambda: look(adopt))
        assert [text.partition(" is no")[0] for text in refusals] == ["kick", "call", "descriptor"]
        hung.wait_asked(FLUSH)
        assert GETATTR not in hung.asked
    stream.close()


def test_a_socket_that_lingers_is_not_waited_for() -> None:
    """SO_LINGER, socket(7): close(2) of the VMM's own TCP connection waits for its peer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
        with peer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 60))
            client.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    client.send(bytes(65536))
            file = ForeignFd(client.detach(), Closer())

            def adopt() -> None:
                with pytest.raises(FrontendError, match="no UNIX stream socket"):
                    UnixStream.adopt(file)

            in_time(adopt)
            assert file.closed
