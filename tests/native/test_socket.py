"""GET_CONFIG and SET_CONFIG answered by the worker, byte for byte; all else left to Python.

Source: vhost-user, "Virtio device config space". The bytes are packed here, not by the product.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from vhostd._native import Device, Event

from tests.fakes.eventfd import wait_readable
from tests.native.rig import CONFIG_SIZE, CONFIG_WRITABLE, PATIENCE_S, Host, wait_until

GET_CONFIG, SET_CONFIG, GET_FEATURES = 24, 25, 1
VERSION, REPLY, NEED_REPLY = 1, 4, 8
CONTENT = bytes(range(16))


def message(
    request: int, offset: int, data: bytes, window_flags: int = 0, flags: int = VERSION
) -> bytes:
    """One config message; its window is as long as data."""
    payload = struct.pack("<III", offset, len(data), window_flags) + data
    return struct.pack("<III", request, flags, len(payload)) + payload


def get(offset: int = 0, size: int = CONFIG_SIZE) -> bytes:
    """A GET_CONFIG."""
    return message(GET_CONFIG, offset, bytes(size))


@dataclass
class Line:
    """A connection whose device end is with the worker."""

    host: Host
    device: Device
    front: socket.socket
    back: socket.socket

    def receive(self, size: int) -> bytes:
        """Receive exactly size bytes."""
        data = b""
        while len(data) < size:
            piece = self.front.recv(size - len(data))
            assert piece, "the connection ended"
            data += piece
        return data

    def ask(self, request: bytes, reply_size: int) -> bytes:
        """Send a request, receive its reply."""
        self.front.sendall(request)
        return self.receive(reply_size)

    def left_to_python(self) -> bytes:
        """Wait for the socket to be handed back; return what is in it."""
        self.host.wait_event(self.device, Event.SOCKET)
        return self.back.recv(1 << 20, socket.MSG_DONTWAIT)


@pytest.fixture
def line(host: Host) -> Iterator[Line]:
    """A hot connection with CONTENT as config space and REPLY_ACK."""
    front, back = socket.socketpair()
    front.settimeout(PATIENCE_S)
    device = host.device()
    device.publish_config(0, CONTENT)
    device.configure_socket(True, True)
    with host.parked():
        device.set_socket(back.fileno())
    device.arm_socket()
    yield Line(host, device, front, back)
    host.remove(device)
    front.close()
    back.close()


@pytest.mark.parametrize(("offset", "size"), [(0, 16), (4, 4), (15, 1), (0, 1)])
def test_a_config_window_is_read(line: Line, offset: int, size: int) -> None:
    expected = message(GET_CONFIG, offset, CONTENT[offset : offset + size], flags=VERSION | REPLY)
    assert line.ask(get(offset, size), len(expected)) == expected
    assert line.device.config_counters() == (1, 0)


def test_a_need_reply_of_a_read_is_not_echoed(line: Line) -> None:
    request = message(GET_CONFIG, 0, bytes(16), flags=VERSION | NEED_REPLY)
    expected = message(GET_CONFIG, 0, CONTENT, flags=VERSION | REPLY)
    assert line.ask(request, len(expected)) == expected
    assert not wait_readable(line.front.fileno(), 0.02)


def test_what_python_publishes_is_read_next(line: Line) -> None:
    line.device.publish_config(0, b"\xee\xff")
    assert line.ask(get(0, 2), 26)[24:] == b"\xee\xff"


def test_a_write_takes_only_what_is_the_guests(line: Line) -> None:
    written = bytes(0x80 + i for i in range(16))
    line.front.sendall(message(SET_CONFIG, 0, written))
    line.host.wait_event(line.device, Event.CONFIG)
    expected = CONTENT[:4] + written[4:8] + CONTENT[8:12] + written[12:]
    assert line.device.read_config() == expected
    assert line.device.config_counters() == (0, 1)
    assert not wait_readable(line.front.fileno(), 0.02)


def test_a_write_in_the_middle_is_masked_by_its_own_bytes(line: Line) -> None:
    line.front.sendall(message(SET_CONFIG, 3, b"\xaa\xbb\xcc"))
    line.host.wait_event(line.device, Event.CONFIG)
    assert line.device.read_config()[2:7] == b"\x02\x03\xbb\xcc\x06"


def test_single_bits_are_masked(host: Host) -> None:
    device = host.device(config_writable=b"\x0f\xf0")
    device.publish_config(0, b"\x55\x55")
    device.configure_socket(True, False)
    front, back = socket.socketpair()
    with front, back:
        with host.parked():
            device.set_socket(back.fileno())
        device.arm_socket()
        front.sendall(message(SET_CONFIG, 0, b"\xaa\xaa"))
        host.wait_event(device, Event.CONFIG)
        assert device.read_config() == b"\x5a\xa5"
        host.remove(device)


def test_a_write_is_acknowledged_when_asked(line: Line) -> None:
    request = message(SET_CONFIG, 4, b"\x09\x00\x00\x00", flags=VERSION | NEED_REPLY)
    expected = struct.pack("<IIIQ", SET_CONFIG, VERSION | REPLY, 8, 0)
    assert line.ask(request, len(expected)) == expected


def test_without_reply_ack_need_reply_means_nothing(line: Line) -> None:
    line.device.configure_socket(True, False)
    line.front.sendall(message(SET_CONFIG, 4, b"\x09\x00\x00\x00", flags=VERSION | NEED_REPLY))
    assert line.ask(get(4, 4), 28)[24:] == b"\x09\x00\x00\x00"


HANDED_OVER = {
    "another message": struct.pack("<III", GET_FEATURES, VERSION, 0),
    "no window": message(GET_CONFIG, 0, b""),
    "window beyond the end": get(8, 9),
    "window behind the end": get(17, 1),
    "offset that wraps": message(GET_CONFIG, 0xFFFF_FFFF, bytes(4)),
    "window above 256 bytes": get(0, 257),
    "size of another window": struct.pack("<IIIIII", GET_CONFIG, VERSION, 28, 0, 8, 0) + bytes(16),
    "version 2": message(GET_CONFIG, 0, bytes(16), flags=2),
    "a reply": message(GET_CONFIG, 0, bytes(16), flags=VERSION | REPLY),
    "a write for migration": message(SET_CONFIG, 0, bytes(16), window_flags=1),
    "half a header": get()[:7],
    "half a window": get()[:20],
    "half the content": message(SET_CONFIG, 0, bytes(16))[:-1],
}


@pytest.mark.parametrize("content", HANDED_OVER.values(), ids=HANDED_OVER.keys())
def test_what_is_not_ours_is_left_whole(line: Line, content: bytes) -> None:
    line.front.sendall(content)
    assert line.left_to_python() == content
    assert line.device.read_config() == CONTENT
    assert not wait_readable(line.front.fileno(), 0)


def test_a_cold_socket_leaves_everything_to_python(line: Line) -> None:
    line.device.configure_socket(False, False)
    line.front.sendall(get())
    assert line.left_to_python() == get()


def test_descriptors_are_left_with_their_message(line: Line) -> None:
    first, second = os.pipe()
    try:
        line.front.settimeout(None)
        socket.send_fds(line.front, [get()], [first])
        line.host.wait_event(line.device, Event.SOCKET)
        data, fds, flags, _address = socket.recv_fds(line.back, 4096, 8)
        assert (data, len(fds)) == (get(), 1)
        assert not flags & socket.MSG_CTRUNC
        assert os.fstat(fds[0]).st_ino == os.fstat(first).st_ino
        os.close(fds[0])
    finally:
        os.close(first)
        os.close(second)


def test_descriptors_of_the_next_message_stay_with_it(line: Line) -> None:
    first, second = os.pipe()
    other = struct.pack("<III", GET_FEATURES, VERSION, 0)
    try:
        with line.host.parked():
            line.front.sendall(get())
            socket.send_fds(line.front, [other], [first])
        line.host.wait_event(line.device, Event.SOCKET)
        left = b""
        fds: list[int] = []
        while not left.endswith(other):
            data, more, _flags, _address = socket.recv_fds(line.back, 4096, 8)
            left += data
            fds += more
        answered = wait_readable(line.front.fileno(), 0)
        assert left == (other if answered else get() + other)
        assert [os.fstat(fd).st_ino for fd in fds] == [os.fstat(first).st_ino]
        for fd in fds:
            os.close(fd)
    finally:
        os.close(first)
        os.close(second)


def test_the_end_of_the_connection_is_left_to_python(line: Line) -> None:
    line.front.shutdown(socket.SHUT_WR)
    assert line.left_to_python() == b""


def test_a_handed_back_socket_can_be_armed_again(line: Line) -> None:
    for _ in range(3):
        line.front.sendall(HANDED_OVER["another message"])
        assert line.left_to_python() == HANDED_OVER["another message"]
        line.device.arm_socket()
        assert line.ask(get(), 40)[24:] == CONTENT


def test_ten_thousand_reads_are_answered_in_order_though_no_reply_was_taken(line: Line) -> None:
    reads = 10_000
    requests = b"".join(get(i % 16, 1) for i in range(reads))
    line.front.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * len(requests))
    line.front.sendall(requests)
    wait_until(lambda: line.device.config_counters()[0] > 100)
    replies = line.receive(25 * reads)
    assert replies == b"".join(
        message(GET_CONFIG, i % 16, CONTENT[i % 16 : i % 16 + 1], flags=VERSION | REPLY)
        for i in range(reads)
    )
    assert line.device.config_counters()[0] == reads


def test_a_front_end_that_leaves_with_replies_owed_is_left_to_python(line: Line) -> None:
    line.front.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 19)
    line.back.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    line.front.sendall(get() * 2000)
    line.front.close()
    line.host.wait_event(line.device, Event.SOCKET)


def test_the_guests_bytes_are_the_masks(line: Line) -> None:
    assert len(CONFIG_WRITABLE) == CONFIG_SIZE == len(line.device.read_config())
