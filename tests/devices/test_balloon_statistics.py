"""Statistics: every byte a guest may put into the buffer, and the buffer's way to and fro."""

from __future__ import annotations

from collections.abc import Sequence
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vhostd.devices.balloon_statistics import (
    NAMES,
    UNKNOWN_TAGS_MAX,
    StatisticsQueue,
    parse_statistics,
)
from vhostd.devices.base import Chain, Complete, DeviceEvent, Effect, Event, Log, Role


def entries(*pairs: tuple[int, int]) -> bytes:
    return b"".join(pack("<HQ", tag, value) for tag, value in pairs)


def lent(token: int, data: bytes = b"") -> Chain:
    return Chain(2, Role.STATISTICS, token, data, len(data))


def completed(effects: Sequence[Effect]) -> list[int]:
    return [effect.token for effect in effects if isinstance(effect, Complete)]


def test_free_memory_is_read_from_the_bytes_a_real_guest_sends() -> None:
    assert parse_statistics(bytes.fromhex("0400 0000f03900000000")) == {"free_memory": 0x39F00000}


def test_all_sixteen_tags_have_the_kernel_headers_meaning() -> None:
    data = entries(*((tag, 100 + tag) for tag in range(16)))
    assert parse_statistics(data) == {name: 100 + tag for tag, name in enumerate(NAMES)}
    assert len(NAMES) == 16


@pytest.mark.parametrize("size", [0, 1, 5, 9])
def test_less_than_one_entry_is_no_statistics(size: int) -> None:
    assert parse_statistics(b"\x04" * size) == {}


@pytest.mark.parametrize("tail", range(1, 10))
def test_a_ragged_tail_is_ignored(tail: int) -> None:
    assert parse_statistics(entries((4, 7), (5, 8)) + b"\xff" * tail) == {
        "free_memory": 7,
        "total_memory": 8,
    }


def test_the_last_of_equal_tags_wins_and_any_64_bit_value_is_kept() -> None:
    assert parse_statistics(entries((4, 1), (4, 2**64 - 1))) == {"free_memory": 2**64 - 1}


def test_unknown_tags_are_kept_under_their_number_but_only_so_many() -> None:
    """64 KiB of invented tags must not make a status of megabytes."""
    data = entries(*((1000 + tag, tag) for tag in range(6553)), (4, 9))
    statistics = parse_statistics(data)
    assert statistics["tag_1000"] == 0
    assert statistics["free_memory"] == 9
    assert len(statistics) == UNKNOWN_TAGS_MAX + 1


def test_the_filler_of_a_windows_drivers_first_buffer_is_no_statistic() -> None:
    assert parse_statistics(b"\xff" * 100) == {}


@given(st.binary(max_size=4096))
def test_no_buffer_breaks_the_parser(data: bytes) -> None:
    statistics = parse_statistics(data)
    assert len(statistics) <= len(NAMES) + UNKNOWN_TAGS_MAX
    assert all(0 <= value < 2**64 for value in statistics.values())


@given(st.dictionaries(st.integers(0, 15), st.integers(0, 2**64 - 1)), st.randoms())
def test_entries_mean_the_same_in_any_order(values: dict[int, int], random: object) -> None:
    pairs = list(values.items())
    random.shuffle(pairs)  # type: ignore[attr-defined]
    assert parse_statistics(entries(*pairs)) == {NAMES[tag]: value for tag, value in pairs}


def test_a_buffer_is_held_until_asked_for_and_given_back_once() -> None:
    queue = StatisticsQueue()
    effects = queue.on_chain(lent(7, entries((4, 1))), now_s=12.0)
    assert effects == [Event(DeviceEvent.BALLOON_STATISTICS, {"free_memory": 1})]
    assert queue.holding
    assert (queue.latest, queue.received_s) == ({"free_memory": 1}, 12.0)

    assert queue.request() == [Complete(2, 7)]
    assert not queue.holding
    assert queue.request() == []


def test_a_second_buffer_sends_the_older_one_back_first() -> None:
    queue = StatisticsQueue()
    queue.on_chain(lent(7), now_s=1.0)
    effects = queue.on_chain(lent(8, entries((4, 1))), now_s=2.0)
    assert completed(effects) == [7]
    assert Log(DeviceEvent.STATISTICS_UNASKED) in effects
    assert completed(queue.request()) == [8]


def test_an_empty_buffer_is_held_and_leaves_the_numbers_alone() -> None:
    queue = StatisticsQueue()
    queue.on_chain(lent(7, entries((4, 1))), now_s=1.0)
    queue.request()
    assert queue.on_chain(lent(8), now_s=2.0) == []
    assert (queue.latest, queue.received_s, queue.updates) == ({"free_memory": 1}, 1.0, 1)
    assert completed(queue.request()) == [8]


def test_a_buffer_held_over_a_stop_is_never_completed() -> None:
    queue = StatisticsQueue()
    queue.on_chain(lent(7), now_s=1.0)
    queue.let_go()
    assert queue.request() == []


def test_the_numbers_of_a_buffer_held_over_a_stop_are_news_once() -> None:
    queue = StatisticsQueue()
    buffer = lent(7, entries((4, 1)))
    queue.on_chain(buffer, now_s=1.0)
    queue.let_go()
    queue.let_go()
    assert queue.on_chain(buffer, now_s=9.0) == []
    assert (queue.received_s, queue.updates) == (1.0, 1)
    assert completed(queue.request()) == [7]


def test_a_new_drivers_buffer_is_news_wherever_it_is() -> None:
    queue = StatisticsQueue()
    buffer = lent(7, entries((4, 1)))
    queue.on_chain(buffer, now_s=1.0)
    queue.let_go()
    queue.reset()
    assert len(queue.on_chain(buffer, now_s=9.0)) == 1
    assert queue.received_s == 9.0
