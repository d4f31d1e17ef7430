"""Waiting for what a guest or a status shows, where nothing announces it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

T = TypeVar("T")


async def until(
    look: Callable[[], Awaitable[T]], holds: Callable[[T], bool], timeout_s: float, what: str
) -> T:
    """Look every 200 ms until it holds; returns what was seen then.

    Raises:
        AssertionError: it did not hold in time; the text has the last thing seen.
    """
    seen = await look()
    with trio.move_on_after(timeout_s):
        while not holds(seen):
            await trio.sleep(0.2)
            seen = await look()
    assert holds(seen), f"{what}: not within {timeout_s} s, last seen {seen}"
    return seen
