"""Bit masks whose values come from guests and VMMs."""

from __future__ import annotations

from enum import IntFlag
from typing import Final

REMEMBERED_BITS_MAX: Final = 8
"""All combinations of so many bits are few enough to be remembered."""


class Flags(IntFlag):
    """An IntFlag whose memory has a bound.

    Python's own keeps an object for every value it has ever met (Lib/enum.py,
    `_value2member_map_`). A VMM chooses 64 bits as it likes: each message could cost some hundred
    bytes for ever. This one keeps combinations of named bits where these are few, and nothing else.
    """

    @classmethod
    def _missing_(cls, value: object) -> Flags:
        met: Flags = super()._missing_(value)
        named: int = cls._flag_mask_  # type: ignore[attr-defined]  # Lib/enum.py: all members' bits
        if int(met) & ~named or named.bit_count() > REMEMBERED_BITS_MAX:
            for key in (value, int(met)):  # two for a negative one
                cls._value2member_map_.pop(key, None)
        return met
