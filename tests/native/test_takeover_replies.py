"""A server is killed at every place of one message; it is answered once, and descriptors are gone.

Places: see takeover_steps. Bytes are packed here, not by the product.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Iterator

import pytest
from vhostd._native import Handler
from vhostd._native._core import ffi

from tests.native.rig import CONFIG_SIZE, Layout
from tests.native.takeover_heirs import receive
from tests.native.takeover_life import Life, Variant
from tests.native.takeover_sweep import Kept, Request, sweep, sweep_calls
from tests.native.test_socket import (
    CONTENT,
    GET_CONFIG,
    NEED_REPLY,
    REPLY,
    SET_CONFIG,
    VERSION,
    get,
    message,
)

COLD_REQUEST = 77  # any that the worker leaves to Python
RECORD = ffi.offsetof("struct vhd_shared", "reply")
ACTUAL = slice(4, 8)  # the bytes a guest may write


@pytest.fixture
def life() -> Iterator[Life]:
    """A device whose config space is CONTENT."""
    with Life.begin(Variant(Layout()), [Handler.INFLATE], 4) as begun:
        begun.origin.publish_config(0, CONTENT)
        yield begun


def asks_and_gets(life: Life, request: bytes, reply: bytes) -> None:
    """Its reply is the next thing to come."""
    life.front.sendall(request)
    assert receive(life.front, len(reply)) == reply


def read(content: bytes, offset: int, size: int) -> tuple[bytes, bytes]:
    """A GET_CONFIG and its reply."""
    data = content[offset : offset + size]
    return get(offset, size), message(GET_CONFIG, offset, data, flags=VERSION | REPLY)


def nothing() -> None:
    """There is nothing to prepare."""


def test_a_config_read_is_answered_once(life: Life) -> None:
    request, reply = read(CONTENT, 0, CONFIG_SIZE)
    reads = 0

    def post() -> None:
        nonlocal reads
        reads, _ = life.origin.config_counters()
        life.front.sendall(request)

    def done() -> bool:
        return life.origin.config_counters()[0] > reads

    def check() -> None:
        assert receive(life.front, len(reply)) == reply
        asks_and_gets(life, *read(CONTENT, 3, 2))

    with Kept.of(life) as kept:
        sweep(life, Request(nothing, post, kept.bytes, done, check))


@pytest.mark.parametrize("acknowledged", [False, True])
def test_a_config_write_is_done_and_acknowledged_once(life: Life, acknowledged: bool) -> None:
    flags = VERSION | NEED_REPLY * acknowledged
    reply = struct.pack("<IIIQ", SET_CONFIG, VERSION | REPLY, 8, 0) * acknowledged
    now = bytearray(CONTENT)
    writes = 0

    def post() -> None:
        nonlocal writes
        now[ACTUAL] = os.urandom(4)
        _, writes = life.origin.config_counters()
        life.front.sendall(message(SET_CONFIG, 0, bytes(now), flags=flags))

    def done() -> bool:
        return life.origin.config_counters()[1] > writes

    def check() -> None:
        assert receive(life.front, len(reply)) == reply
        asks_and_gets(life, *read(bytes(now), 0, CONFIG_SIZE))

    with Kept.of(life) as kept:
        sweep(life, Request(nothing, post, kept.bytes, done, check))


def test_a_message_left_to_python_is_answered_once(life: Life) -> None:
    payload = bytes(range(200))
    request = struct.pack("<III", COLD_REQUEST, VERSION, len(payload)) + payload
    reply = struct.pack("<III", COLD_REQUEST, VERSION | REPLY, len(payload)) + payload[::-1]
    pipes: list[int] = []

    def post() -> None:
        ours, theirs = os.pipe()
        pipes.append(ours)
        socket.send_fds(life.front, [request], [theirs])
        os.close(theirs)

    def check() -> None:
        assert receive(life.front, len(reply)) == reply
        # No copy of the descriptor is left: not with a process, not in the socket.
        assert os.read(pipes[-1], 1) == b""
        os.close(pipes.pop())
        asks_and_gets(life, *read(CONTENT, 0, CONFIG_SIZE))

    with Kept.of(life) as kept:

        def done() -> bool:
            size = array.array("i", [0])
            fcntl.ioctl(life.front, termios.FIONREAD, size)
            return size[0] == len(reply) and not any(kept.shared[RECORD : RECORD + 4])

        sweep_calls(life, Request(nothing, post, kept.bytes, done, check))
