"""Sizes: what QEMU calls 512M is 512M here, and nothing is rounded behind the operator's back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vhostd.units import GiB, KiB, MiB, TiB, align_down, align_up, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("536870912", 512 * MiB),
        ("512M", 512 * MiB),
        ("512m", 512 * MiB),
        ("512MiB", 512 * MiB),
        ("512MB", 512 * MiB),
        ("1.5GiB", 1536 * MiB),
        ("0.5K", 512),
        (" 4 KiB ", 4 * KiB),
        ("1T", TiB),
        ("18446744073709551615", 2**64 - 1),
    ],
)
def test_a_size_is_read_as_qemu_reads_it(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "M", "-1", "1.5", "0.3K", "1e3", "0x10", "512X", "1 2", "1.G", "18446744073709551616"],
)
def test_what_is_no_whole_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|bytes|bits"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536 * MiB, "1.5 GiB"), (GiB, "1 GiB")],
)
def test_a_size_is_written_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(min_value=0, max_value=2**64 - 1))
def test_bytes_written_as_text_read_back_the_same(size: int) -> None:
    assert parse_size(str(size)) == size


@given(st.integers(min_value=0, max_value=2**62), st.integers(min_value=0, max_value=40))
def test_alignment_brackets_the_value(value: int, exponent: int) -> None:
    alignment = 1 << exponent
    down, up = align_down(value, alignment), align_up(value, alignment)
    assert down <= value <= up
    assert down % alignment == up % alignment == 0
    assert up - down in (0, alignment)
