"""When an image is looked at next: soon while it changes, seldom while it does not.

The kernel has no news of a file's dirty pages, so somebody must look. Must not know who looks.
"""

from __future__ import annotations

from typing import Final

from vhostd.devices.pmem import ImageView
from vhostd.units import GiB, MiB

BUSY_INTERVAL_S: Final = 0.25
"""So that a guest which writes 1 GiB/s dirties some 256 MiB before they begin to be written."""

QUIET_INTERVAL_S: Final = 4.0
"""The longest interval, of an image that nothing happens to."""

SHARE: Final = 0.02
"""Of a processor at most: where a look takes long, the next one comes later."""

FREE_SIZE_MIN: Final = 256 * MiB
"""Where a sparse image's file system has less than this left, the VM is stopped: the next page that
finds no block would cost it its life (a SIGBUS in the VMM)."""

FILL_RATE_MAX: Final = GiB
"""Bytes a second that a guest may fill a file system with between two looks."""


class Beat:
    """The intervals of one image."""

    def __init__(self, size: int, longest_s: float) -> None:
        """Args:
        size: of the image, bytes.
        longest_s: what else is done at a look must not come later than this; 0: nothing is.
        """
        self._size = size
        self._longest_s = min(longest_s or QUIET_INTERVAL_S, QUIET_INTERVAL_S)
        self._interval_s = BUSY_INTERVAL_S
        self._seen: tuple[int | None, ...] = ()

    def interval_s(self, view: ImageView, took_s: float) -> float:
        """How long to wait after a look that took took_s and found this."""
        seen = (view.cached, view.dirty, view.writeback, view.allocated)
        quiet = seen == self._seen and not view.dirty and not view.writeback
        self._seen = seen
        self._interval_s = 2 * self._interval_s if quiet else BUSY_INTERVAL_S
        self._interval_s = min(self._interval_s, self._longest_s)
        if view.free is not None and (view.allocated or 0) < self._size:
            until_full_s = (view.free - FREE_SIZE_MIN) / FILL_RATE_MAX
            self._interval_s = min(self._interval_s, until_full_s)
        self._interval_s = max(self._interval_s, BUSY_INTERVAL_S)
        return max(self._interval_s, took_s / SHARE)
