"""Servers are killed at random moments of a busy guest, which notices nothing.

The moments are those a generator gives, spun off from when the rings were filled; where the kernel
has the server then is chance.
"""

from __future__ import annotations

import random
import time

import pytest

from tests.native.rig import Layout
from tests.native.takeover_life import VARIANTS, Life, Variant
from tests.native.takeover_load import Guest
from tests.native.takeover_sweep import HANDLERS, ring_size

KILLED_AFTER_S = (0.0, 0.003)
KILLS_SHARE = 0.25  # of the times the rings were filled
INDIRECT = [Variant(Layout(packed, True, indirect=True)) for packed in (False, True)]


@pytest.mark.parametrize("variant", [*VARIANTS, *INDIRECT], ids=str)
def test_a_busy_guest_does_not_notice_that_its_servers_are_killed(
    variant: Variant, rounds: int
) -> None:
    chance = random.Random(str(variant))
    with (
        Life.begin(variant, HANDLERS, ring_size(variant)) as life,
        life.heirs() as heirs,
    ):
        guest = Guest(life, chance)
        heirs.succeed()
        while heirs.count <= rounds:
            guest.send()
            if chance.random() < KILLS_SHARE:
                until_s = time.monotonic() + chance.uniform(*KILLED_AFTER_S)
                while time.monotonic() < until_s:
                    pass
                heirs.succeed()
            guest.receive()
        guest.settle()
        # Nothing is left that somebody could give back once more.
        heirs.succeed()
        heirs.wait_ready()
        guest.settle()
        completed = {name: traffic.completed for name, traffic in guest.traffics.items()}
        assert min(completed.values()) > rounds, completed
        assert life.origin.balloon_counters().inflated_pages == len(guest.in_balloon)
        for driver in life.drivers:
            assert driver.collect() == []
