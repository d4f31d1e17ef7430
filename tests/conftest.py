"""What every test runs under."""

from __future__ import annotations

import signal

import pytest

# A shell that starts us in the background has SIGINT ignored, and that is inherited: programs under
# test could not be interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Long runs of what is random; few repeats are the everyday ones."""
    parser.addoption("--kills", type=int, default=8, help="times QEMU is killed under a disk")
    parser.addoption("--takeovers", type=int, default=8, help="times vhostd is killed")


@pytest.fixture
def takeovers(request: pytest.FixtureRequest) -> int:
    """How often to kill vhostd."""
    found: int = request.config.getoption("--takeovers")
    return found


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    """How often to kill QEMU."""
    found: int = request.config.getoption("--kills")
    return found
