"""How long the runs are that can be made longer."""

from __future__ import annotations

import pytest

KILLS_EVERYDAY = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    """The long run is `pytest tests/takeover --every-place`."""
    parser.addoption(
        "--every-place",
        action="store_true",
        default=False,
        help=f"kill vhostd at every place of a request, not at {KILLS_EVERYDAY} of them",
    )
    parser.addoption("--rounds", type=int, default=100, help="times a VMM comes and goes")


@pytest.fixture
def kills_most(request: pytest.FixtureRequest) -> int | None:
    """How many places of a request to kill at; None: all."""
    every: bool = request.config.getoption("--every-place", default=False)
    return None if every else KILLS_EVERYDAY


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    """How often a VMM comes and goes."""
    return int(request.config.getoption("--rounds", default=100))
