"""Starts the real program for the attacks and keeps it under observation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.program import Program, executable
from tests.hostile.oracle import Oracle

PROGRAM = "vhostd-balloon"
OFFER_ALL = ("--packed", "--in-order", "--page-poison")  # whatever it can do


class Stand:
    """Holds one running program for many tests and replaces it when a test killed it."""

    def __init__(self, folder: Path) -> None:
        """Start nothing yet."""
        self._folder = folder
        self._oracle: Oracle | None = None
        self._starts = 0

    def oracle(self) -> Oracle:
        """Return the oracle of a program that runs."""
        if self._oracle is None or not self._oracle.program.alive():
            self.stop()
            self._starts += 1
            name = f"device{self._starts}.sock"
            self._oracle = Oracle(Program.start(PROGRAM, self._folder, OFFER_ALL, sock=name))
        return self._oracle

    def stop(self) -> None:
        """Kill the program, if there is one."""
        if self._oracle is not None:
            self._oracle.program.kill()
            self._oracle = None


@pytest.fixture(scope="session")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """One program for the whole session."""
    assert executable(PROGRAM).exists(), f"{PROGRAM} is not installed next to this Python"
    stand = Stand(tmp_path_factory.mktemp("hostile"))
    yield stand
    stand.stop()


@pytest.fixture
def oracle(stand: Stand) -> Oracle:
    """A running program and its idle state."""
    return stand.oracle()


@pytest.fixture
def program(oracle: Oracle) -> Program:
    """A running program."""
    return oracle.program
