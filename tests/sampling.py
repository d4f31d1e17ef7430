"""Parameters of which the tests of every day take a sample; `make test-long` takes all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def sampled(
    names: str | tuple[str, ...], values: Iterable[Any], *, every_day: Sequence[Any]
) -> pytest.MarkDecorator:
    """Parametrize a test: every day with some of the values, and in `make test-long` with all."""
    every = list(values)
    assert every_day and all(value in every for value in every_day), every_day
    marked = []
    for value in every:
        if value in every_day:
            marked.append(value)
            continue
        parts = value if isinstance(value, tuple) else (value,)
        marked.append(pytest.param(*parts, marks=pytest.mark.long))
    return pytest.mark.parametrize(names, marked)
