"""What the verbs of vhostctl have in common: sizes, the daemon's socket, how answers are shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import click

from vhostd.units import MiB, parse_size

if TYPE_CHECKING:
    from vhostd.control.client import ControlClient

JsonValue: TypeAlias = Any

# Rich and the HTTP client take most of the start: whoever needs them imports them.

WAIT_DEFAULT_S: Final = 60.0


def size_argument(context: click.Context, parameter: click.Parameter, text: str) -> int:
    """A SIZE in bytes. Raises click.BadParameter."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from error


def ram_argument(context: click.Context, parameter: click.Parameter, text: str) -> int:
    """A SIZE in bytes that is a number of whole MiB. Raises click.BadParameter."""
    size = size_argument(context, parameter, text)
    if size == 0 or size % MiB:
        raise click.BadParameter("guest RAM is a number of whole MiB", context, parameter)
    return size


@dataclass(frozen=True, slots=True)
class Session:
    """What the options before the verb say."""

    socket: Path
    json: bool

    @contextmanager
    def client(self) -> Iterator[ControlClient]:
        """A client whose failures end vhostctl with one line on stderr and their exit code."""
        from vhostd.control.client import ClientError, ControlClient

        try:
            yield ControlClient(self.socket, tell=say)
        except ClientError as error:
            say(str(error))
            raise click.exceptions.Exit(error.code) from error

    def show(self, answer: JsonValue, render: Callable[[JsonValue], None]) -> None:
        """Print the answer: as JSON if that was asked for, else rendered."""
        if self.json:
            click.echo(json.dumps(answer))
        else:
            render(answer)


pass_session = click.make_pass_decorator(Session)
vm_argument = click.argument("vm")
timeout_option = click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, 3600),
    default=WAIT_DEFAULT_S,
    show_default=True,
    help="Seconds to wait at most.",
)


def say(line: str) -> None:
    """A line beside the answer, for a person."""
    click.echo(f"vhostctl: {line}", err=True)


def render() -> ModuleType:
    """Rich is imported only where a person reads."""
    from vhostd.control import render as module

    return module


def show_nothing(answer: JsonValue) -> None:
    """Success is silent, as with cp."""
