"""A place with a short name: a socket's path has 108 bytes, which pytest's own uses up."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vhostd-") as name:
        yield Path(name)
