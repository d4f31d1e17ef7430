"""H67 to H69: in-flight buffers, dirty logs and saved states that lie."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

from tests.fakes import messages
from tests.fakes.balloon import BalloonDriver
from tests.fakes.eventfd import new_eventfd
from tests.fakes.memory import MIB, open_memfd
from tests.fakes.messages import ProtocolFeature, Request
from tests.hostile.attack import Attack, Verdict, closing, refused, serves

TOP = 1 << 64


def inflight_lies(guest: BalloonDriver, payload: bytes, size: int) -> None:
    """H67: refused whether the feature is offered or not."""
    with closing(open_memfd(size)) as fds:
        refused(guest, Request.SET_INFLIGHT_FD, payload, fds)


def log_lies(guest: BalloonDriver, log_size: int, offset: int, file_size: int) -> None:
    """H68: a log too small for guest RAM, or outside its file."""
    front = guest.machine.front
    with closing(open_memfd(file_size)) as (fd,):
        reply = front.set_log_base(log_size, offset, fd)
    if len(reply.payload) == 8 and ProtocolFeature.LOG_SHMFD in front.protocol_features:
        assert messages.unpack_u64(reply.payload) != 0, "the log was accepted"
    front.get_features()


def log_moves(guest: BalloonDriver) -> None:
    """H68: a new log each time; the old one is unmapped."""
    front = guest.machine.front
    for _ in range(4):
        with closing(open_memfd(MIB)) as (fd,):
            front.set_log_base(MIB, 0, fd)
        serves(guest)


def log_fd(guest: BalloonDriver) -> None:
    """H68: SET_LOG_FD again and again: one is kept."""
    for _ in range(4):
        with closing(new_eventfd()) as (fd,):
            guest.machine.front.ack(Request.SET_LOG_FD, b"", [fd])
    guest.machine.front.ack(Request.SET_LOG_FD)


def device_state_lies(guest: BalloonDriver, direction: int, phase: int, content: bytes) -> None:
    """H69: garbage as saved state, and numbers that mean nothing."""
    front = guest.machine.front
    reader, writer = os.pipe()
    with closing(reader):
        with closing(writer):
            if content:
                os.write(writer, content)
            reply = front.set_device_state_fd(direction, phase, reader)
        reply.close_fds()
        assert len(reply.payload) == 8
        assert front.check_device_state() != 0, "garbage was taken for a state"


def _attacks() -> Iterator[Attack]:
    refuse, ignore = Verdict.REFUSE, Verdict.IGNORE
    for name, payload, size in (
        ("no-queues", messages.inflight(MIB, 0, 0, 128), MIB),
        ("too-many-queues", messages.inflight(MIB, 0, 0xFFFF, 128), MIB),
        ("queue-size-65535", messages.inflight(MIB, 0, 5, 0xFFFF), MIB),
        ("size-beyond-file", messages.inflight(2 * MIB, 0, 5, 128), MIB),
        ("size-2-64", messages.inflight(TOP - 1, 0, 5, 128), MIB),
        ("offset-wraps", messages.inflight(MIB, TOP - 4096, 5, 128), MIB),
        ("too-small", messages.inflight(64, 0, 5, 128), MIB),
    ):
        act = partial(inflight_lies, payload=payload, size=size)
        yield Attack(67, f"inflight-{name}", refuse, act)
    for name, log_size, offset, file_size in (
        ("too-small", 8, 0, MIB),
        ("beyond-file", 2 * MIB, 0, MIB),
        ("offset-wraps", MIB, TOP - 4096, MIB),
        ("size-2-64", TOP - 1, 0, MIB),
        ("empty", 0, 0, MIB),
    ):
        act = partial(log_lies, log_size=log_size, offset=offset, file_size=file_size)
        yield Attack(68, f"log-{name}", refuse, act)
    yield Attack(68, "log-moves", ignore, log_moves)
    yield Attack(68, "log-fd", ignore, log_fd)
    for name, direction, phase, content in (
        ("direction-7", 7, 0, b""),
        ("phase-7", 0, 7, b""),
        ("empty", 1, 0, b""),
        ("garbage", 1, 0, b"\xa5" * 512),
        ("zeros", 1, 0, bytes(512)),
    ):
        act = partial(device_state_lies, direction=direction, phase=phase, content=content)
        yield Attack(69, f"device-state-{name}", ignore, act)


ATTACKS = list(_attacks())
