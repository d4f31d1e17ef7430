"""H93, H97: the config space read and written where and how nobody should."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tests.fakes import messages
from tests.fakes.balloon import BalloonConfig, BalloonDriver
from tests.fakes.frontend import Refused
from tests.fakes.machine import Setup
from tests.fakes.messages import ProtocolFeature, Request
from tests.hostile.attack import Attack, Verdict, refused

CONFIG_SPACE_MAX = 256


def actual_of_a_liar(guest: BalloonDriver) -> None:
    """H93: any number is stored and read back; none is believed."""
    cached = guest.config()
    for value in (0xFFFF_FFFF, 1 << 31, 0, cached.num_pages + 1):
        assert guest.write_actual(value, cached) == 0
        now = guest.config()
        assert (now.actual, now.num_pages) == (value, cached.num_pages)
    guest.write_actual(0, cached)


def actual_oscillates(guest: BalloonDriver) -> None:
    """H93: a thousand writes, each answered."""
    cached = guest.config()
    for turn in range(1000):
        assert guest.write_actual(turn % 2 * 4096, cached) == 0
    guest.write_actual(0, cached)


def config_out_of_range(guest: BalloonDriver) -> None:
    """H97: offsets and lengths beyond the space; writes refused, reads answered with size 0."""
    before = guest.machine.front.get_config()
    for offset, size in ((0, 257), (16, 1), (15, 2), (256, 1), (0xFFFF_FFFF, 1), (0, 17)):
        refused(guest, Request.SET_CONFIG, messages.config(offset, b"\xff" * size))
        read = messages.config(offset, bytes(min(size, CONFIG_SPACE_MAX)))
        reply = guest.machine.front.ask(Request.GET_CONFIG, read)
        assert messages.unpack_config(reply.payload)[1] == 0, f"read of {size} at {offset}"
    assert guest.machine.front.get_config() == before


def config_length_lies(guest: BalloonDriver) -> None:
    """H97: the stated size is not the size that came."""
    for stated in (0, 8, 17, 256, 0xFFFF_FFFF):
        payload = messages.config(0, b"\xff" * 16, size=stated)
        refused(guest, Request.SET_CONFIG, payload)
    refused(guest, Request.SET_CONFIG, messages.config(0, b""))
    try:
        guest.machine.front.get_config(0, 0)
    except Refused:
        return
    raise AssertionError("a read of nothing was answered")


def config_flags(guest: BalloonDriver) -> None:
    """H97: unknown flags are refused; 1 (migration) may be taken, but the space keeps its sense."""
    before = guest.config()
    content = BalloonConfig(before.num_pages, 7, before.command_id, before.poison).pack()
    for flags in (2, 0xFFFF_FFFF):
        refused(guest, Request.SET_CONFIG, messages.config(0, content, flags))
    guest.machine.front.set_config(0, before.pack(), 1)
    assert guest.config() == before


def config_read_only(guest: BalloonDriver) -> None:
    """H97: num_pages and the command id are the device's own."""
    before = guest.config()
    changed = BalloonConfig(before.num_pages ^ 0xFFFF, 3, before.command_id ^ 0xFFFF, 0)
    assert guest.machine.front.set_config(0, changed.pack()) == 0
    after = guest.config()
    assert (after.num_pages, after.command_id) == (before.num_pages, before.command_id)
    assert after.actual == 3
    guest.write_actual(0)


def config_byte_by_byte(guest: BalloonDriver) -> None:
    """H97: writes and reads of parts, in random places."""
    front = guest.machine.front
    source = random.Random(97)
    guest.write_actual(0)
    whole = bytearray(front.get_config())
    for _ in range(32):
        at = source.randrange(4, 8)
        whole[at] = source.randrange(256)
        assert front.set_config(at, bytes(whole[at : at + 1])) == 0
        assert front.get_config(at, 1) == whole[at : at + 1]
    assert front.get_config() == bytes(whole)
    guest.write_actual(0)


def _attacks() -> Iterator[Attack]:
    yield Attack(93, "actual-lies", Verdict.IGNORE, actual_of_a_liar)
    yield Attack(93, "actual-oscillates", Verdict.IGNORE, actual_oscillates)
    yield Attack(97, "config-out-of-range", Verdict.REFUSE, config_out_of_range)
    yield Attack(97, "config-length-lies", Verdict.REFUSE, config_length_lies)
    yield Attack(97, "config-flags", Verdict.REFUSE, config_flags)
    yield Attack(97, "config-read-only", Verdict.IGNORE, config_read_only)
    yield Attack(97, "config-parts", Verdict.IGNORE, config_byte_by_byte)
    no_acks = Setup().protocol_features & ~ProtocolFeature.REPLY_ACK
    silent = Setup(protocol_features=no_acks)
    yield Attack(93, "actual-unacknowledged", Verdict.IGNORE, actual_of_a_liar, silent)


ATTACKS = list(_attacks())
