"""What of a virtio-pmem device outlives its process, as plain data. Knows shapes and limits."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from vhostd.devices.base import JsonObject

ERRNO_END: Final = 4096
"""MAX_ERRNO + 1, include/linux/err.h."""


class Failure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why flushes fail until an operator clears it.

    Attributes:
        error: an errno.
        why: one line for people.
        time_s: when it was found, seconds since the epoch.
    """

    error: int
    why: str
    time_s: float


class PmemState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a successor process needs; totals are counters of connections that have ended."""

    failure: Failure | None
    totals: dict[str, Annotated[int, msgspec.Meta(ge=0)]]


class LastingPmem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What outlives the host, too: what went wrong with which image."""

    file: str
    failure: Failure | None


def encode_lasting(file: str, failure: Failure | None) -> JsonObject:
    """As plain data."""
    plain: JsonObject = msgspec.to_builtins(LastingPmem(file, failure))
    return plain


def decode_failure(lasting: JsonObject, file: str) -> Failure | None:
    """The failure that lasted of this image.

    Raises:
        ValueError: it is nothing of a virtio-pmem device.
    """
    try:
        state = msgspec.convert(lasting, LastingPmem)
    except msgspec.ValidationError as error:
        raise ValueError(f"not what lasts of a virtio-pmem device: {error}") from error
    return _checked(state.failure) if state.file == file else None


def _checked(failure: Failure | None) -> Failure | None:
    if failure is not None and not 0 < failure.error < ERRNO_END:
        raise ValueError("a saved failure has no errno")
    return failure


def encode(failure: Failure | None, totals: dict[str, int]) -> JsonObject:
    """As plain data."""
    plain: JsonObject = msgspec.to_builtins(PmemState(failure, totals))
    return plain


def decode(saved: JsonObject) -> tuple[Failure | None, dict[str, int]]:
    """The failure and the totals that were saved.

    Raises:
        ValueError: it is no such state.
    """
    try:
        state = msgspec.convert(saved, PmemState)
    except msgspec.ValidationError as error:
        raise ValueError(f"not a virtio-pmem device's saved state: {error}") from error
    return _checked(state.failure), dict(state.totals)
