"""What of a balloon outlives its process, as plain data. Knows shapes and limits only."""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from vhostd.devices.balloon_hinting import DONE, STOP, HintPhase
from vhostd.devices.balloon_statistics import Statistics
from vhostd.devices.base import JsonObject
from vhostd.units import BALLOON_PAGE_SIZE

PAGES_MAX: Final = 0xFFFF_FFFF


class LastingBalloon(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What outlives the host, too. target: bytes."""

    target: Annotated[
        int, msgspec.Meta(ge=0, le=PAGES_MAX * BALLOON_PAGE_SIZE, multiple_of=BALLOON_PAGE_SIZE)
    ]


def decode_target(lasting: JsonObject) -> int:
    """The target that lasted, bytes.

    Raises:
        ValueError: there is none.
    """
    try:
        return msgspec.convert(lasting, LastingBalloon).target
    except msgspec.ValidationError as error:
        raise ValueError(f"not what lasts of a balloon: {error}") from error


class BalloonState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a successor process needs to go on as if nothing had happened."""

    target_pages: int
    actual_pages: int
    poison_value: int
    guest_memory_size: int
    hint_phase: HintPhase
    hint_shown: int
    hint_command: int
    hint_driver_command: int
    hint_unanswered: list[int]
    hint_blocks: int
    hint_size: int
    hint_ignored_blocks: int
    hint_rounds: int
    statistics: Statistics
    statistics_received_s: float
    statistics_updates: int
    statistics_held: int | None
    hint_handled: int | None = None

    def __post_init__(self) -> None:
        fields = (self.target_pages, self.actual_pages, self.poison_value, self.hint_shown)
        if not all(0 <= value <= PAGES_MAX for value in (*fields, *self.hint_unanswered)):
            raise ValueError("a saved balloon field does not fit 32 bits")
        open_round = self.hint_phase is not HintPhase.IDLE
        if open_round != (self.hint_shown not in (STOP, DONE)):
            raise ValueError("a saved hinting round contradicts the command id shown")
