"""Sizes and addresses: their types, their text form, their alignment. Knows nothing else."""

from __future__ import annotations

import re
from typing import Final, NewType

GuestAddr = NewType("GuestAddr", int)
"""Guest-physical address, bytes."""
FrontendAddr = NewType("FrontendAddr", int)
"""Address in the VMM's own address space, bytes (equal to GuestAddr under GPA_ADDRESSES)."""
FileOffset = NewType("FileOffset", int)
"""Offset in a guest memory file, bytes."""

KiB: Final = 1 << 10
MiB: Final = 1 << 20
GiB: Final = 1 << 30
TiB: Final = 1 << 40

BALLOON_PAGE_SIZE: Final = 4096
"""Unit of every balloon page number, whatever the guest's page (virtio 1.x, 5.5.6)."""

_SIZE_TEXT = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_FACTOR: Final = {"": 1, "K": KiB, "M": MiB, "G": GiB, "T": TiB}


def parse_size(text: str) -> int:
    """Read a SIZE as QEMU does: bytes, or a number with K, M, G or T (powers of 1024).

    "512M", "512MiB", "1.5GiB" and "536870912" are all legal.

    Raises:
        ValueError: not a size, not a whole number of bytes, or 2**64 and more.
    """
    match = _SIZE_TEXT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; write bytes or a number with K, M, G or T")
    number, unit = match.group(1), match.group(2).upper()
    whole, _, fraction = number.partition(".")
    scaled: int = int(whole + fraction) * _FACTOR[unit]
    factor: int = 10 ** len(fraction)
    size, rest = divmod(scaled, factor)
    if rest:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    if size >= 1 << 64:
        raise ValueError(f"{text!r} does not fit 64 bits")
    return size


def format_size(size: int) -> str:
    """Write a size for a person: the largest unit of which it is at least one, 1 decimal at most.

    536870912 → "512 MiB", 1610612736 → "1.5 GiB".
    """
    for unit, factor in (("TiB", TiB), ("GiB", GiB), ("MiB", MiB), ("KiB", KiB)):
        if size >= factor:
            return f"{size / factor:.1f}".removesuffix(".0") + f" {unit}"
    return f"{size} B"


def align_down(value: int, alignment: int) -> int:
    """The largest multiple of alignment (a power of two) that is not above value."""
    return value & ~(alignment - 1)


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of alignment (a power of two) that is not below value."""
    return align_down(value + alignment - 1, alignment)


def power_of_two_up(value: int) -> int:
    """The smallest power of two that is not below value, which is above 0."""
    return 1 << (value - 1).bit_length()
