"""A systemd of each kind; without root, or where it can't be had, the reason is printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.systemd import trees
from tests.systemd.machine import why_not
from tests.vm.stack import Stack, ensure

KERNELS = ("6.12",)


@pytest.fixture(scope="session")
def stack() -> Stack:
    """QEMU and a guest kernel; fetched on the first run ever."""
    return ensure(KERNELS)


def _tree(name: str) -> Path:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    try:
        return trees.of_this_machine() if name == "machine" else trees.of_debian(name)
    except trees.NoTree as error:
        pytest.skip(str(error))


@pytest.fixture
def machine_tree() -> Path:
    """The systemd of this machine."""
    return _tree("machine")


@pytest.fixture(params=["machine", "trixie"])
def tree(request: pytest.FixtureRequest) -> Path:
    """Each systemd: this machine's (252 on Debian 12), and 257 of Debian 13."""
    return _tree(request.param)
