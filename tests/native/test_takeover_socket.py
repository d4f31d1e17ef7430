"""Requests that are prepared and finished: what is taken and sent, by whom, and how often."""

from __future__ import annotations

import errno
import itertools
import os
import random
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from vhostd._native import Device, Event

from tests.fakes.eventfd import wait_readable
from tests.native.rig import CONFIG_SIZE, CONFIG_WRITABLE, PATIENCE_S, Host
from tests.native.takeover_heirs import receive
from tests.native.test_socket import CONTENT, GET_CONFIG, REPLY, SET_CONFIG, VERSION, get, message

REPLY_MAX = 8192
NUMBERS = itertools.count(1)
QUIET_S = 0.02  # the time to look at what must not happen
ROUNDS = 500  # more than the replies' file holds


@dataclass
class Ends:
    """A connection; the device's end is served by one object after the other."""

    host: Host
    front: socket.socket
    back: socket.socket
    device: Device

    def succeed(self) -> None:
        """Another takes over."""
        shared_fd, reply_fd = os.dup(self.device.shared_fd), os.dup(self.device.reply_fd)
        self.host.remove(self.device)
        size = len(CONFIG_WRITABLE)
        self.device = self.host.add(Device.adopt(shared_fd, reply_fd, 1, size, CONFIG_WRITABLE))
        os.close(shared_fd)
        os.close(reply_fd)
        with self.host.parked():
            self.device.set_socket(self.back.fileno())

    def left(self) -> bytes:
        """What the device's end has not taken."""
        try:
            return self.back.recv(1 << 20, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""

    def nothing_comes(self) -> bool:
        """The VMM's end has read it all."""
        return not wait_readable(self.front.fileno(), 0)

    def fill(self) -> bytes:
        """Answer until the socket is full; one reply is owed then. All of them."""
        sent = b""
        for count in range(1 << 16):
            reply = struct.pack("<I", count) * 75
            self.device.prepare_reply(next(NUMBERS), 0, reply)
            sent += reply
            if not self.device.finish_reply():
                return sent
        raise AssertionError("the socket never was full")


@pytest.fixture
def ends(host: Host) -> Iterator[Ends]:
    """Python owns the device's end."""
    front, back = socket.socketpair()
    front.settimeout(PATIENCE_S)
    device = host.device(1)
    device.publish_config(0, CONTENT)
    device.configure_socket(True, True)
    with host.parked():
        device.set_socket(back.fileno())
    yield (begun := Ends(host, front, back, device))
    host.remove(begun.device)
    front.close()
    back.close()


@pytest.mark.parametrize("size", [0, 1, 300, REPLY_MAX])
def test_a_request_is_taken_and_answered_when_it_is_finished(ends: Ends, size: int) -> None:
    reply = os.urandom(size)
    ends.front.sendall(b"request" + b"next")
    ends.device.prepare_reply(next(NUMBERS), len(b"request"), reply)
    assert ends.nothing_comes()
    assert ends.device.finish_reply()
    assert ends.left() == b"next"
    assert receive(ends.front, size) == reply
    assert ends.device.finish_reply()
    assert ends.nothing_comes()


@pytest.mark.parametrize("size", [0, 300])
def test_a_successor_finishes_what_was_prepared(ends: Ends, size: int) -> None:
    for number in range(ROUNDS):
        reply = struct.pack("<I", number) * (size // 4)
        ends.front.sendall(b"request" + b"next")
        ends.device.prepare_reply(next(NUMBERS), len(b"request"), reply)
        if number % 50 == 0:
            ends.succeed()
        assert ends.device.finish_reply()
        assert ends.left() == b"next"
        assert receive(ends.front, size) == reply
        assert ends.back.recv(4) == b"next"
    assert ends.nothing_comes()


def test_a_successor_does_not_answer_what_is_finished(ends: Ends) -> None:
    ends.front.sendall(b"request")
    ends.device.prepare_reply(next(NUMBERS), len(b"request"), b"reply")
    assert ends.device.finish_reply()
    ends.front.sendall(b"request")
    ends.succeed()
    assert ends.device.finish_reply()
    assert ends.left() == b"request"
    assert receive(ends.front, len(b"reply")) == b"reply"
    assert ends.nothing_comes()


def test_the_same_bytes_again_are_another_request(ends: Ends) -> None:
    """Of one that needs no reply a VMM may send many before we look at the first."""
    ends.front.sendall(b"request" * 3)
    for left in (2, 1, 0):
        ends.device.prepare_reply(next(NUMBERS), len(b"request"))
        ends.succeed()
        assert ends.device.finish_reply()
        ends.succeed()
        assert ends.device.finish_reply()
        assert ends.left() == b"request" * left


def test_a_full_socket_is_waited_for(ends: Ends) -> None:
    sent = ends.fill()
    assert not ends.device.finish_reply()
    ends.succeed()
    assert not ends.device.finish_reply()
    received = receive(ends.front, len(sent) // 2)
    assert ends.device.finish_reply()
    received += receive(ends.front, len(sent) - len(received))
    assert received == sent
    assert ends.nothing_comes()


def test_the_worker_finishes_what_python_could_not(ends: Ends) -> None:
    sent = ends.fill()
    ends.device.arm_socket()
    received = receive(ends.front, len(sent))
    assert received == sent
    request, reply = get(), message(GET_CONFIG, 0, CONTENT, flags=VERSION | REPLY)
    ends.front.sendall(request)
    assert receive(ends.front, len(reply)) == reply


def test_replies_that_were_not_read_yet_keep_their_bytes(ends: Ends) -> None:
    """The socket refers to the pages they were sent from, which are used again."""
    ends.device.arm_socket()
    requests, replies = b"", b""
    for number in range(2000):
        actual = struct.pack("<I", number)
        requests += message(SET_CONFIG, 4, actual) + get()
        content = CONTENT[:4] + actual + CONTENT[8:]
        replies += message(GET_CONFIG, 0, content, flags=VERSION | REPLY)
    sender = threading.Thread(target=ends.front.sendall, args=(requests,))
    sender.start()
    received = b""
    chance = random.Random(1)
    while len(received) < len(replies):
        # As late as it can be: when no more reply has room.
        received += receive(
            ends.front, min(chance.randint(1, 60_000), len(replies) - len(received))
        )
    sender.join()
    assert received == replies


def test_descriptors_of_a_request_are_closed(ends: Ends) -> None:
    ours, theirs = os.pipe()
    socket.send_fds(ends.front, [b"request"], [theirs])
    os.close(theirs)
    ends.front.sendall(b"next")
    ends.device.prepare_reply(next(NUMBERS), len(b"request"), b"reply")
    ends.succeed()
    assert ends.device.finish_reply()
    assert os.read(ours, 1) == b""
    assert ends.left() == b"next"
    os.close(ours)


def test_a_vmm_that_is_gone_is_told_of(ends: Ends) -> None:
    ends.front.sendall(b"request")
    ends.device.prepare_reply(next(NUMBERS), len(b"request"), b"reply")
    ends.front.close()
    with pytest.raises(BrokenPipeError):
        ends.device.finish_reply()
    assert ends.device.finish_reply(), "there is nobody to be answered"


def test_a_vmm_that_hears_nothing_more_keeps_nobody_busy(ends: Ends) -> None:
    ends.device.arm_socket()
    ends.front.shutdown(socket.SHUT_RD)
    ends.front.sendall(get())
    ends.host.wait_event(ends.device, Event.SOCKET)
    assert ends.left() == b""
    ends.device.arm_socket()
    threading.Event().wait(QUIET_S)
    assert not ends.host.has_event(ends.device, Event.SOCKET)


def test_one_at_a_time_and_not_more_than_is_there(ends: Ends) -> None:
    ends.front.sendall(b"request")
    with pytest.raises(OSError) as refusal:
        ends.device.prepare_reply(next(NUMBERS), 7, bytes(REPLY_MAX + 1))
    assert refusal.value.errno == errno.EINVAL
    ends.device.prepare_reply(next(NUMBERS), 8, b"reply")
    with pytest.raises(OSError) as refusal:
        ends.device.prepare_reply(next(NUMBERS), 7, b"reply")
    assert refusal.value.errno == errno.EBUSY
    with pytest.raises(OSError) as refusal:
        ends.device.finish_reply()
    assert refusal.value.errno == errno.EPROTO
    assert ends.nothing_comes()


def test_there_must_be_a_socket(host: Host) -> None:
    device = host.device(1)
    assert device.finish_reply()
    with pytest.raises(OSError) as refusal:
        device.prepare_reply(next(NUMBERS), 0, b"reply")
    assert refusal.value.errno == errno.ENOTCONN


def test_another_open_file_of_the_replies_is_refused(ends: Ends) -> None:
    """Its position says nothing about what was sent."""
    ends.device.prepare_reply(next(NUMBERS), 0, b"first")
    assert ends.device.finish_reply()
    ends.device.prepare_reply(next(NUMBERS), 0, b"second")
    anew = os.open(f"/proc/self/fd/{ends.device.reply_fd}", os.O_RDWR)
    with pytest.raises(OSError) as refusal:
        Device.adopt(ends.device.shared_fd, anew, 1, CONFIG_SIZE, CONFIG_WRITABLE)
    assert refusal.value.errno == errno.EPROTO
    os.close(anew)
