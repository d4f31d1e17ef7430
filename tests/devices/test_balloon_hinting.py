"""Free page hinting: command ids are never mixed up, and the guest always gets its memory back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from struct import pack

import pytest
from vhostd.devices.balloon import Balloon
from vhostd.devices.balloon_features import BalloonFeature
from vhostd.devices.base import Chain, Complete, Effect, NotifyConfig, PublishConfig, Refused, Role
from vhostd.errors import GuestError
from vhostd.units import MiB

STOP, DONE = 0, 1
POSITIONS = count(0xFFF0)  # the number in it wraps
FIRST = 0x8000_0001


@pytest.fixture
def balloon() -> Balloon:
    balloon = Balloon()
    balloon.on_features(BalloonFeature.FREE_PAGE_HINT)
    balloon.on_started()
    return balloon


def command(balloon: Balloon, value: int) -> Sequence[Effect]:
    chain = Chain(3, Role.FREE_PAGE_HINT, 40, pack("<I", value), 4, position=next(POSITIONS))
    return balloon.on_chain(chain, now_s=0.0)


def block(balloon: Balloon, size: int = 4 * MiB) -> Sequence[Effect]:
    at = next(POSITIONS)
    chain = Chain(3, Role.FREE_PAGE_HINT, 41, writable_count=1, writable_size=size, position=at)
    return balloon.on_chain(chain, now_s=0.0)


def shown(balloon: Balloon) -> int:
    return int.from_bytes(balloon.config()[8:12], "little")


def hint_status(balloon: Balloon) -> tuple[str, int, int, int]:
    status = balloon.hinting.status()
    return status["phase"], status["size"], status["blocks"], status["ignored_blocks"]


def tells_driver(effects: Sequence[Effect], value: int) -> bool:
    return (
        PublishConfig(8, pack("<I", value)) in effects
        and NotifyConfig() in effects
        and effects.index(PublishConfig(8, pack("<I", value))) < effects.index(NotifyConfig())
    )


def test_a_round_shows_its_id_counts_blocks_and_ends_with_done(balloon: Balloon) -> None:
    assert shown(balloon) == STOP
    assert tells_driver(balloon.hint_start(), FIRST)
    assert shown(balloon) == FIRST

    assert Complete(3, 40) in command(balloon, FIRST)
    assert block(balloon) == [Complete(3, 41)]
    assert block(balloon, 2 * MiB) == [Complete(3, 41)]
    assert hint_status(balloon) == ("running", 6 * MiB, 2, 0)
    assert shown(balloon) == FIRST

    effects = command(balloon, STOP)
    assert effects[0] == Complete(3, 40)
    assert tells_driver(effects, DONE)
    assert hint_status(balloon) == ("idle", 6 * MiB, 2, 0)


def test_the_ids_bytes_are_little_endian(balloon: Balloon) -> None:
    balloon.hint_start()
    assert balloon.config()[8:12] == bytes.fromhex("01000080")


def test_blocks_before_the_id_or_after_stop_or_done_go_back_uncounted(balloon: Balloon) -> None:
    assert block(balloon) == [Complete(3, 41)]
    balloon.hint_start()
    assert block(balloon) == [Complete(3, 41)]
    command(balloon, FIRST)
    command(balloon, STOP)
    assert block(balloon) == [Complete(3, 41)]
    assert hint_status(balloon) == ("idle", 0, 0, 3)


def test_blocks_under_a_foreign_id_are_ignored(balloon: Balloon) -> None:
    balloon.hint_start()
    command(balloon, FIRST)
    command(balloon, 0x1234_5678)
    block(balloon)
    assert hint_status(balloon) == ("running", 0, 0, 1)


def test_an_older_rounds_stop_does_not_end_the_new_round(balloon: Balloon) -> None:
    balloon.hint_start()
    command(balloon, FIRST)
    balloon.hint_stop()
    balloon.hint_start()
    command(balloon, STOP)  # answers the first round
    assert balloon.hinting.phase.value == "requested"
    command(balloon, FIRST + 1)
    block(balloon)
    assert hint_status(balloon) == ("running", 4 * MiB, 1, 0)


def test_stopping_gives_the_guest_its_memory_back_at_once(balloon: Balloon) -> None:
    balloon.hint_start()
    command(balloon, FIRST)
    assert tells_driver(balloon.hint_stop(), DONE)
    assert block(balloon) == [Complete(3, 41)]
    assert hint_status(balloon) == ("idle", 0, 0, 1)


def test_an_id_without_a_stop_is_never_used_again_not_even_after_wrapping(
    balloon: Balloon,
) -> None:
    balloon.hint_start()
    balloon.hint_stop()
    balloon.hinting.command = 0xFFFF_FFFF
    balloon.hint_start()
    assert shown(balloon) == 0x8000_0000
    command(balloon, 0x8000_0000)
    balloon.hint_stop()
    balloon.hinting.command = 0xFFFF_FFFF
    balloon.hint_start()
    assert shown(balloon) == FIRST + 1
    balloon.hint_stop()
    command(balloon, STOP)
    balloon.hinting.command = 0xFFFF_FFFF
    balloon.hint_start()
    assert shown(balloon) == 0x8000_0000


@pytest.mark.parametrize("size", [1, 3, 5, 4096, 70000])
def test_a_command_of_another_size_is_the_guests_error(balloon: Balloon, size: int) -> None:
    chain = Chain(3, Role.FREE_PAGE_HINT, 9, bytes(min(size, 4096)), readable_size=size)
    with pytest.raises(GuestError, match=f"{size} bytes"):
        balloon.on_chain(chain, now_s=0.0)


def test_a_new_driver_finds_stop_and_the_next_round_a_new_id(balloon: Balloon) -> None:
    balloon.hint_start()
    command(balloon, FIRST)
    effects = balloon.on_driver_reset()
    assert PublishConfig(8, bytes(4)) in effects
    assert shown(balloon) == STOP
    balloon.hint_start()
    assert shown(balloon) == FIRST + 1


def test_wishes_that_make_no_sense_are_refused_with_a_reason(balloon: Balloon) -> None:
    with pytest.raises(Refused, match="no free page hinting round"):
        balloon.hint_stop()
    balloon.hint_start()
    with pytest.raises(Refused, match="under way"):
        balloon.hint_start()
    balloon.hint_stop()
    balloon.on_stopped()
    with pytest.raises(Refused, match="running guest driver"):
        balloon.hint_start()
    balloon.on_features(0)
    balloon.on_started()
    with pytest.raises(Refused, match="has no free page hinting"):
        balloon.hint_start()


def test_what_comes_again_because_the_ring_stopped_counts_once(balloon: Balloon) -> None:
    """By a stop, or because a predecessor died before it gave the chains back."""
    balloon.hint_start()
    at = next(POSITIONS)
    told = Chain(3, Role.FREE_PAGE_HINT, 1, pack("<I", FIRST), 4, position=at)
    listed = Chain(3, Role.FREE_PAGE_HINT, 2, b"", 0, 1, 4 * MiB, position=at + 1)
    for chain in (told, listed):
        balloon.on_chain(chain, now_s=0.0)
    heir = Balloon()
    heir.load(balloon.save())
    for again in (told, listed):
        assert heir.on_chain(again, now_s=0.0) == [Complete(3, again.token)]
    assert hint_status(heir) == ("running", 4 * MiB, 1, 0)
    heir.on_chain(replace(listed, position=at + 2), now_s=0.0)
    assert hint_status(heir) == ("running", 8 * MiB, 2, 0)
