"""What every test runs under."""

from __future__ import annotations

import signal

import pytest
from hypothesis import settings

# A busy machine is no fault of the code, so no test has a time limit per example.
settings.register_profile("vhostd", deadline=None)
settings.register_profile("long", deadline=None, max_examples=1000)  # `make test-long` takes it
settings.load_profile("vhostd")

# A shell that starts us in the background has SIGINT ignored, and that is inherited: programs under
# test could not be interrupted.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `make test-long` makes longer; the defaults are the everyday ones."""
    parser.addoption("--kills", type=int, default=4, help="times QEMU is killed under a disk")
    parser.addoption("--takeovers", type=int, default=8, help="times vhostd is killed")
    parser.addoption("--repeats", type=int, default=100, help="times a hostile input is repeated")
    parser.addoption("--rounds", type=int, default=100, help="times a VMM comes and goes")
    parser.addoption(
        "--every-place",
        action="store_true",
        help="kill vhostd at every place of a request, not at some of them",
    )


def _number(request: pytest.FixtureRequest, option: str) -> int:
    return int(request.config.getoption(option))


@pytest.fixture
def takeovers(request: pytest.FixtureRequest) -> int:
    """How often to kill vhostd."""
    return _number(request, "--takeovers")


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    """How often to kill QEMU."""
    return _number(request, "--kills")


@pytest.fixture
def repeats(request: pytest.FixtureRequest) -> int:
    """How often to repeat each hostile input."""
    return _number(request, "--repeats")


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    """How often a VMM comes and goes."""
    return _number(request, "--rounds")
