"""How often an image is looked at."""

from __future__ import annotations

import pytest
from vhostd.backend.image_beat import (
    BUSY_INTERVAL_S,
    FILL_RATE_MAX,
    FREE_SIZE_MIN,
    QUIET_INTERVAL_S,
    Beat,
)
from vhostd.devices.pmem import ImageView
from vhostd.units import GiB

SIZE = 8 * GiB
WHOLE = ImageView(cached=4096, dirty=0, writeback=0, allocated=SIZE, free=GiB)
SPARSE = ImageView(cached=4096, dirty=0, writeback=0, allocated=GiB, free=1000 * GiB)


def test_a_quiet_image_is_looked_at_seldom_and_a_busy_one_soon_again() -> None:
    beat = Beat(SIZE, 0)
    intervals = [beat.interval_s(WHOLE, 0) for _ in range(8)]
    assert intervals == [0.25, 0.5, 1, 2, 4, 4, 4, 4]
    assert intervals[-1] == QUIET_INTERVAL_S
    busy = ImageView(cached=8192, dirty=4096, writeback=0, allocated=SIZE, free=GiB)
    assert beat.interval_s(busy, 0) == BUSY_INTERVAL_S
    assert beat.interval_s(busy, 0) == BUSY_INTERVAL_S  # as long as something is dirty
    assert beat.interval_s(WHOLE, 0) == BUSY_INTERVAL_S
    assert beat.interval_s(WHOLE, 0) > BUSY_INTERVAL_S


@pytest.mark.parametrize("seconds", [0.3, 1.0, 3.0])
def test_a_file_system_can_t_be_filled_between_two_looks(seconds: float) -> None:
    beat = Beat(SIZE, 0)
    free = FREE_SIZE_MIN + int(seconds * FILL_RATE_MAX)
    view = ImageView(cached=0, dirty=0, writeback=0, allocated=GiB, free=free)
    assert max(beat.interval_s(view, 0) for _ in range(10)) <= seconds
    assert max(beat.interval_s(SPARSE, 0) for _ in range(10)) == QUIET_INTERVAL_S


def test_what_else_is_due_is_not_late_and_slow_looks_come_seldom() -> None:
    beat = Beat(SIZE, 1.5)
    assert max(beat.interval_s(WHOLE, 0) for _ in range(10)) == 1.5
    assert beat.interval_s(WHOLE, 1.0) == 50
