"""Why a VM is not served, in words for its operator. Knows errors; must not know VMs."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from vhostd.errors import PauseVm, VhostdError

TRY_AGAIN: Final = (
    "restart the VM, which is served again then, or restart vhostd, which tries once more;"
    " other guests do not notice"
)
"""The remedy where nothing better is known."""

_PACKAGE: Final = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Pause:
    """Why, and what to do about it; one line each.

    Attributes:
        details: for who mends the program: where an error came from, many lines; or None.
    """

    reason: str
    remedy: str = TRY_AGAIN
    details: str | None = field(default=None, compare=False)

    @classmethod
    def because(cls, error: BaseException) -> Self:
        """An error, or the first one of a group, in words."""
        first = next(_leaves(error))
        details = "".join(traceback.format_exception(error))
        remedy = first.remedy if isinstance(first, PauseVm) else TRY_AGAIN
        return cls(" ".join(_words(first).split()), remedy, details)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error


def _words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    if isinstance(error, VhostdError | OSError):
        return str(error)
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"internal error: {what}{_place(error)}"


def _place(error: BaseException) -> str:
    """Where in our own code it was raised, the innermost place."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(_PACKAGE):
            return f" ({path.relative_to(_PACKAGE.parent)}:{frame.lineno})"
    return ""
