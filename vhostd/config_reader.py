"""Tables of a TOML file, read key by key, with every mistake collected and none fatal.

Knows TOML's types and how to word a mistake; must not know any key.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from vhostd.errors import ConfigError
from vhostd.units import parse_size

TYPE_NAMES = {bool: "true or false", float: "a number", str: "text in quotes"}


class Mistakes:
    """Everything wrong with one file, in the order it was found.

    Attributes:
        refusals: what can be loaded, but is given to no VMM that connects; one line each.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._lines: list[str] = []
        self.refusals: list[str] = []

    def add(self, where: str, text: str) -> None:
        """Add a line "FILE: KEY: TEXT"; a key's or value's line breaks are escaped."""
        self._lines.append(_visible(f"{self._source}: {where}: {text}"))

    def add_refusal(self, where: str, text: str) -> None:
        """Add such a line to the refusals."""
        self.refusals.append(_visible(f"{self._source}: {where}: {text}"))

    def apart(self) -> Mistakes:
        """An empty one of the same file."""
        return Mistakes(self._source)

    @property
    def lines(self) -> Sequence[str]:
        """All of them, refusals left out."""
        return self._lines

    def raise_if_any(self, *, refusals: bool = False) -> None:
        """Raises ConfigError with all lines, if there are any; refusals alone count if asked."""
        if self._lines or (refusals and self.refusals):
            raise ConfigError(*self._lines, *self.refusals)


def _visible(text: str) -> str:
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


class Table:
    """One TOML table. Keys nobody asked for are mistakes, which end() finds.

    Attributes:
        where: the table's dotted name, empty for the file's own.
        mistakes: where what is wrong with it goes.
    """

    def __init__(self, content: Mapping[str, object], mistakes: Mistakes, where: str = "") -> None:
        self.where = where
        self._content = content
        self.mistakes = mistakes
        self._known: dict[str, None] = {}

    def __contains__(self, key: str) -> bool:
        self._known[key] = None
        return key in self._content

    def mistake(self, key: str, text: str) -> None:
        """Say what is wrong with a key; an empty one means the table itself."""
        self.mistakes.add(self._name(key), text)

    def refusal(self, key: str, text: str) -> None:
        """Say why no VMM that connects gets what a key describes.

        A VMM that has it already, from a predecessor of this process, keeps it.
        """
        self.mistakes.add_refusal(self._name(key), text)

    def end(self) -> None:
        """Every key was asked for: name the ones that nobody knows."""
        for key in self._content:
            if key in self._known:
                continue
            close = difflib.get_close_matches(key, self._known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(self._known)}"
            self.mistake(key, f"unknown key; {hint}")

    def table(self, key: str) -> Table:
        """A table inside this one; an empty one if it is missing or no table."""
        found = self._take(key, {})
        if not isinstance(found, dict):
            self.mistake(key, f"is no table; write [{self._name(key)}]")
            found = {}
        return Table(found, self.mistakes, self._name(key))

    def tables(self, key: str) -> Sequence[tuple[str, Table]]:
        """The tables inside one table, by name, in the file's order, each with its own mistakes."""
        parent = self.table(key)
        return [(name, parent._apart(name)) for name in parent._content]

    def _apart(self, key: str) -> Table:
        self._known[key] = None
        return Table(self._content, self.mistakes.apart(), self.where).table(key)

    def array(self, key: str) -> Sequence[Table]:
        """An array of tables, [[...]]."""
        found = self._take(key, [])
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            self.mistake(key, f"is no array of tables; write [[{self._name(key)}]]")
            return []
        return [
            Table(entry, self.mistakes, f"{self._name(key)}[{position}]")
            for position, entry in enumerate(found)
        ]

    def text(self, key: str, *, required: bool = False) -> str | None:
        """A string; None if missing or wrong."""
        value = self._take(key, None)
        if value is None:
            if required:
                self.mistake(key, "is missing; it has no default")
            return None
        if isinstance(value, str):
            return value
        self._wrong_type(key, value, str)
        return None

    def choice(self, key: str, choices: Sequence[str]) -> str | None:
        """One of some strings; None if missing or wrong."""
        value = self.text(key)
        if value is not None and value not in choices:
            self.mistake(key, f"{value!r} is not one of {', '.join(choices)}")
            return None
        return value

    def boolean(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._take(key, default)
        if not isinstance(value, bool):
            self._wrong_type(key, value, bool)
            return default
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number, whole or not."""
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._wrong_type(key, value, float)
            return default
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.mistake(key, "is not a finite number")
            return default
        return number

    def size(self, key: str, *, default: int | None = None, required: bool = False) -> int | None:
        """Bytes, as a whole number or as text such as "16GiB"; None if missing or wrong."""
        value = self._take(key, default)
        if value is None:
            if required:
                self.mistake(key, "is missing; it has no default")
            return None
        if isinstance(value, str):
            try:
                return parse_size(value)
            except ValueError as error:
                self.mistake(key, str(error))
                return None
        if isinstance(value, bool) or not isinstance(value, int):
            self.mistake(key, f'{value!r} is no size; write bytes or text such as "16GiB"')
            return None
        if value < 0:
            self.mistake(key, f"{value} is negative")
            return None
        return value

    def absolute_path(self, key: str, *, required: bool = False) -> Path | None:
        """A path from the root; None if missing or wrong."""
        value = self.text(key, required=required)
        if value is None:
            return None
        if not value.startswith("/") or "\0" in value:
            self.mistake(key, f"{value!r} is not an absolute path; start it with /")
            return None
        return Path(value)

    def _name(self, key: str) -> str:
        return ".".join(part for part in (self.where, key) if part)

    def _take(self, key: str, default: object) -> object:
        self._known[key] = None
        return self._content.get(key, default)

    def _wrong_type(self, key: str, value: object, wanted: type) -> None:
        self.mistake(key, f"{value!r} is wrong; write {TYPE_NAMES[wanted]}")
