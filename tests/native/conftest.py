"""A host thread for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.native.rig import Host


@pytest.fixture
def host() -> Iterator[Host]:
    """A running worker; devices left at the end are detached and closed."""
    with Host() as running:
        yield running
