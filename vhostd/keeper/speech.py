"""What the keeper says on stderr: a line a happening. Must not know what happens."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Final

from vhostd.systemd import is_journal, with_priority

COMPLAINT_INTERVAL_S: Final = 10.0

_STDERR: Final = 2
_TEXT_LENGTH_MAX: Final = 500


def printable(text: str) -> str:
    """Text that somebody else chose, as one short line without control characters."""
    clean = "".join(character if character.isprintable() else "?" for character in text)
    return clean[:_TEXT_LENGTH_MAX]


def say(text: str, level: str = "notice") -> None:
    """Write one line; level: for the journal, one of systemd.PRIORITIES."""
    line = f"vhostd-keeper: {text}"
    if is_journal(_STDERR):
        line = with_priority(level, line)
    # A log that is full or gone is no reason to let guests down.
    with suppress(OSError):
        os.write(_STDERR, f"{line}\n".encode(errors="replace"))


class Complaints:
    """Says each kind of trouble at most once per COMPLAINT_INTERVAL_S: others cause it at will."""

    def __init__(self) -> None:
        self._said_s: dict[str, float] = {}
        self._suppressed: dict[str, int] = {}

    def complain(self, kind: str, detail: str = "") -> None:
        """Say it, or count it.

        Args:
            kind: one of our own few words; the memory this takes grows with them.
        """
        now_s = time.monotonic()
        if now_s - self._said_s.get(kind, -COMPLAINT_INTERVAL_S) < COMPLAINT_INTERVAL_S:
            self._suppressed[kind] = self._suppressed.get(kind, 0) + 1
            return
        self._said_s[kind] = now_s
        missed = self._suppressed.pop(kind, 0)
        more = f" ({missed} more since)" if missed else ""
        say(f"{kind}{': ' if detail else ''}{printable(detail)}{more}", "warning")
