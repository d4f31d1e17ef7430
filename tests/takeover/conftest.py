"""How long the runs are that can be made longer."""

from __future__ import annotations

import pytest

KILLS_EVERYDAY = 3


@pytest.fixture
def kills_most(request: pytest.FixtureRequest) -> int | None:
    """How many places of a request to kill at; None: all."""
    every: bool = request.config.getoption("--every-place")
    return None if every else KILLS_EVERYDAY
