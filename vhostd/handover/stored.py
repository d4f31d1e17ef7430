"""What a service manager has stored of one VM, and the names that this has there.

Must not know how the manager is spoken to, nor what a descriptor is for.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vhostd.fds import OwnedFd
from vhostd.handover.bundle import Entry

NAME_LENGTH_MAX: Final = 6
"""Of what we store: a letter and a number of base 36."""


@dataclass(slots=True)
class Stored:
    """What is stored of one VM.

    Attributes:
        name, bundle: of the bundle, if there is one.
        number: of that bundle.
        entries: by role.
        loose: descriptors that the release before stored each by itself, as long as nobody took
            them.
    """

    name: str = ""
    bundle: OwnedFd | None = None
    number: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)
    loose: Mapping[str, OwnedFd] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Descriptors in the manager's store."""
        return bool(self.name) + sum(bool(entry.stored) for entry in self.entries.values())

    def inside(self) -> list[str]:
        """Roles of what is in the bundle, in its order."""
        return [role for role, entry in self.entries.items() if not entry.stored]


def identity_of(fd: int) -> str:
    """Tells files apart that take turns under one name, without asking their file system.

    proc_pid_fdinfo(5): eventfds share an inode and have a number of their own.
    """
    wanted = ("mnt_id:", "ino:", "eventfd-id:")
    with open(f"/proc/self/fdinfo/{fd}") as file:  # noqa: PTH123  # quicker, and it is done often
        found = [line.split()[-1] for line in file if line.startswith(wanted)]
    if len(found) == 1:  # before Linux 5.14 there is no "ino:"
        status = os.fstat(fd)
        found = [str(status.st_dev), str(status.st_ino)]
    return " ".join(found)


def may_be_bundled(fd: int) -> bool:
    """Whether it is of the kinds that are surely no socket, and no file whose close may hang."""
    link = str(Path(f"/proc/self/fd/{fd}").readlink())
    return link.startswith(("/memfd:", "anon_inode:[eventfd"))


class Names:
    """A letter and a number of base 36, so that they are short; each is given once at a time."""

    def __init__(self) -> None:
        self._free: list[int] = []
        self._next = 0

    def begin_after(self, used: Iterable[str]) -> None:
        """These are given already."""
        numbers = (_number_of(name) for name in used)
        self._next = max((number for number in numbers if number is not None), default=-1) + 1

    def give(self, kind: str) -> str:
        """A new one that begins with this letter."""
        if self._free:
            number = heapq.heappop(self._free)
        else:
            number, self._next = self._next, self._next + 1
        return kind + _in_base_36(number)

    def take_back(self, name: str) -> None:
        """It means nothing any more."""
        number = _number_of(name)
        if number is not None:
            heapq.heappush(self._free, number)


_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"


def _in_base_36(number: int) -> str:
    text = ""
    while True:
        number, digit = divmod(number, len(_DIGITS))
        text = _DIGITS[digit] + text
        if not number:
            return text


def _number_of(name: str) -> int | None:
    """Of a name that _new_name() made; None: of none."""
    return int(name[1:], len(_DIGITS)) if name[:1] in ("a", "b") and name[1:].isalnum() else None
