"""What of a virtio-pmem device outlives its process, as plain data. Knows shapes and limits."""

from __future__ import annotations

from typing import Annotated

import msgspec

from vhostd.devices.base import JsonObject


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
    if state.failure is not None and not 0 < state.failure.error < 4096:
        raise ValueError("a saved failure has no errno")
    return state.failure, dict(state.totals)
