"""H18, H19, H63, H64: what a kick, call or err can be."""

from __future__ import annotations

import os
import pty
import select
import socket
from pathlib import Path

import pytest
from vhostd.errors import FrontendError
from vhostd.fds import OwnedFd
from vhostd.transport.eventfd import check_call, check_eventfd, is_eventfd_link


def others() -> list[int]:
    reader, writer = os.pipe()
    os.close(writer)
    controller, terminal = pty.openpty()
    os.close(controller)
    with select.epoll() as poller:
        epoll = os.dup(poller.fileno())
    return [
        os.memfd_create("[eventfd]"),
        os.open("/", os.O_RDONLY),
        os.open("/", os.O_PATH),
        os.open("/dev/null", os.O_RDWR),
        os.open("/proc/self/mem", os.O_RDWR),
        reader,
        terminal,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach(),
        socket.socket(socket.AF_INET, socket.SOCK_STREAM).detach(),
        epoll,
    ]


@pytest.mark.parametrize("blocking", [True, False])
def test_an_eventfd_is_one_and_stays_as_the_vmm_made_it(blocking: bool) -> None:
    """Blocking is shared with the VMM, which may read its end blockingly."""
    with OwnedFd(os.eventfd(0, os.EFD_CLOEXEC if blocking else os.EFD_NONBLOCK)) as fd:
        check_eventfd(fd, "call")
        assert os.get_blocking(fd.fileno()) == blocking


def test_nothing_else_is() -> None:
    for fd in (*others(), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach()):
        with OwnedFd(fd) as file, pytest.raises(FrontendError, match="kick is no eventfd"):
            check_eventfd(file, "kick")


def test_a_call_may_be_a_stream_socket_too() -> None:
    """As Linux' virtio_uml has it."""
    for end in socket.socketpair():
        with OwnedFd(end.detach()) as file:
            check_call(file, "call")


def test_a_call_is_nothing_else() -> None:
    for fd in others():
        with OwnedFd(fd) as file, pytest.raises(FrontendError, match="call is"):
            check_call(file, "call")


def test_a_call_is_no_connection_to_a_socket_with_a_name(tmp_path: Path) -> None:
    """It may be the VMM's own end of its connection to us."""
    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as client,
    ):
        listener.bind(str(tmp_path / "device.sock"))
        listener.listen()
        client.connect(str(tmp_path / "device.sock"))
        server, _ = listener.accept()
        for end in (client, server):
            with OwnedFd(os.dup(end.fileno())) as file, pytest.raises(FrontendError, match="call"):
                check_call(file, "call")
        server.close()


@pytest.mark.parametrize(
    "link", ["anon_inode:[eventpoll]", "/memfd:anon_inode:[eventfd] (deleted)", "", "pipe:[1]"]
)
def test_links_of_other_files_are_told_apart(link: str) -> None:
    assert not is_eventfd_link(link)
    assert is_eventfd_link("anon_inode:[eventfd]")
