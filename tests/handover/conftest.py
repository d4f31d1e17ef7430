"""What tests of the store share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.handover.manager import Manager


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """A manager whose queue is empty."""
    made = Manager(tmp_path / "notify")
    with made.socket:
        yield made
        for store in made.stores:
            store.leave()
