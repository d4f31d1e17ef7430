"""Memory in unplugged blocks: a guest that uses more than was agreed.

Decides what is news from one look at the window to the next. Must not know how a look is taken,
nor what is done about a guest that cheats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from vhostd.devices.base import DeviceEvent, Effect, Event, JsonObject, Log, StopVm
from vhostd.devices.mem_blocks import BlockSet, Run
from vhostd.units import format_size

RUNS_TOLD_MAX: Final = 32
"""Of an event and of the status; the sizes beside them count all."""


class OnViolation(StrEnum):
    """What to do about memory in unplugged blocks."""

    REPORT = "report"
    DISCARD = "discard"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Violation:
    """What one look found new.

    Attributes:
        runs: blocks that hold memory though they are unplugged, and did not at the last look.
        size: bytes of memory in all offending blocks, also those known already.
    """

    runs: list[Run] = field(default_factory=list)
    size: int = 0


class ViolationWatch:
    """Compares looks at the unplugged blocks of one device.

    Attributes:
        violations: blocks ever found to hold memory while unplugged; one that was emptied and
            used again counts again.
        offending: those that held memory at the last look.
        size: bytes of memory in them.
    """

    def __init__(self, block_count: int) -> None:
        self.violations = 0
        self.size = 0
        self.offending = BlockSet(block_count)
        self._changed: BlockSet | None = None  # since the look under way began

    def look_begins(self) -> None:
        """A look at blocks that are unplugged now begins."""
        self._changed = BlockSet(len(self.offending))

    def changed(self, first: int, count: int) -> None:
        """These blocks were plugged, unplugged or filled: what a look under way says of them is
        worth nothing."""
        self.offending.remove(first, count)
        if self._changed is not None:
            self._changed.add(first, count)

    def look_ends(self, found: Mapping[int, int]) -> Violation:
        """What the look found: bytes of memory by block."""
        changed, self._changed = self._changed, None
        assert changed is not None, "no look was under way"
        now = BlockSet(len(self.offending))
        size = 0
        for block, block_size in found.items():
            if not changed.has_any(block, 1):
                now.add(block, 1)
                size += block_size
        news = now.copy()
        news.difference_update(self.offending)
        self.offending, self.size = now, size
        self.violations += news.size
        return Violation(list(news.runs()), size)

    def excess_found(self, size: int, block_size: int) -> Violation | None:
        """The window as a whole holds `size` bytes more than is plugged; None: no news.

        The end of a look at a window whose pages can't be looked at one by one.
        """
        self._changed = None
        before, self.size = self.size, size
        if size <= before:
            return None
        self.violations += -(-(size - before) // block_size)
        return Violation([], size)

    def forget(self) -> None:
        """The memory is gone: a new VMM, or it was given back."""
        self.offending.clear()
        self.size = 0
        self._changed = None


def tell(violation: Violation, told: JsonObject, action: OnViolation) -> list[Effect]:
    """Say what was found, and pause the VM if that is the policy.

    Args:
        told: names the device, and its sizes in bytes.
    """
    fields = {
        **told,
        "blocks": violation.runs[:RUNS_TOLD_MAX],
        "block_count": sum(count for _, count in violation.runs),
        "size": violation.size,
        "action": action.value,
    }
    effects: list[Effect] = [
        Log(DeviceEvent.MEM_VIOLATION, fields),
        Event(DeviceEvent.MEM_VIOLATION, fields),
    ]
    if action is OnViolation.STOP:
        size = format_size(violation.size)
        effects.append(StopVm(f"{told['device']}: the guest uses {size} of unplugged memory"))
    return effects
