"""Where a guest stands on its way to the size it was asked for, in words for an operator.

Draws conclusions from what the device saw. Must not change anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vhostd.units import GiB

QUIET_S: Final = 3.0
"""A guest that has asked for nothing for so long has given up for the time being."""

OFFLINE_LIMIT_SIZE: Final = 1 * GiB
"""Linux stops growing when so much plugged memory is offline (drivers/virtio/virtio_mem.c)."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What is known; sizes in bytes, the reasons missing_window, inhibited and busy may be None."""

    requested_size: int
    plugged_size: int
    started: bool
    missing_window: str | None
    inhibited: str | None
    busy: str | None
    last_request_s: float


def standing(progress: Progress, now_s: float) -> str:
    """One line: how far, and why not further."""
    plugged, requested = progress.plugged_size, progress.requested_size
    if plugged == requested:
        return "reached"
    if not progress.started:
        return "no guest driver runs: load virtio_mem in the guest"
    if progress.missing_window is not None:
        return progress.missing_window
    if progress.inhibited is not None and plugged > requested:
        return f"no memory is given back: {progress.inhibited}"
    if progress.busy is not None:
        return f"{progress.busy}; it is told to try again"
    if now_s - progress.last_request_s < QUIET_S:
        return "the guest is at work"
    if plugged > requested:
        return (
            "the guest is busy: it can't empty more blocks now and tries again by itself;"
            " memory onlined as movable can be emptied"
        )
    if plugged and plugged % OFFLINE_LIMIT_SIZE == 0:
        return (
            "the guest has not onlined what was plugged: see memhp_default_state in its command"
            " line, or /sys/devices/system/memory/auto_online_blocks"
        )
    return "the guest has stopped asking; it tries again by itself"
