"""vhostctl: the command line of the control API.

Arguments to requests, answers to text. Must not decide anything the daemon should.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import click

from vhostd import __version__
from vhostd.units import GiB, MiB, parse_size

if TYPE_CHECKING:
    from vhostd.control.client import ControlClient

JsonValue: TypeAlias = Any

# Rich and the HTTP client take most of the start: whoever needs them imports them.

DEFAULT_SOCKET: Final = Path("/run/vhostd/control.sock")
WAIT_DEFAULT_S: Final = 60.0
FRESH_DEFAULT_S: Final = 5.0


def size_argument(context: click.Context, parameter: click.Parameter, text: str) -> int:
    """A SIZE in bytes. Raises click.BadParameter."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from error


def size_text(context: click.Context, parameter: click.Parameter, text: str) -> str:
    """A SIZE in whole MiB as QEMU reads it, such as 1536M. Raises click.BadParameter."""
    size = size_argument(context, parameter, text)
    if size == 0 or size % MiB:
        raise click.BadParameter("guest RAM is a number of whole MiB", context, parameter)
    return f"{size // GiB}G" if size % GiB == 0 else f"{size // MiB}M"


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
            yield ControlClient(self.socket)
        except ClientError as error:
            click.echo(f"vhostctl: {error}", err=True)
            raise click.exceptions.Exit(error.code) from error

    def show(self, answer: JsonValue, render: Callable[[JsonValue], None]) -> None:
        """Print the answer: as JSON if that was asked for, else rendered."""
        if self.json:
            click.echo(json.dumps(answer))
        else:
            render(answer)


pass_session = click.make_pass_decorator(Session)
vm_argument = click.argument("vm")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket",
    type=click.Path(path_type=Path),
    envvar="VHOSTD_SOCKET",
    default=DEFAULT_SOCKET,
    show_default=True,
    show_envvar=True,
    help="The daemon's control socket.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, sizes in bytes.")
@click.version_option(__version__, prog_name="vhostctl")
@click.pass_context
def main(context: click.Context, socket: Path, as_json: bool) -> None:
    """See and set the memory of guests served by vhostd.

    SIZE is bytes or a number with K, M, G or T (powers of 1024), such as 512M or 1.5GiB.

    Exit codes: 0 done, 1 refused or failed, 2 usage, 3 daemon not reachable, 4 timed out.
    """
    context.obj = Session(socket, as_json)


@main.command()
@click.argument("vm", required=False)
@pass_session
def status(session: Session, vm: str | None) -> None:
    """Show one VM, or all of them."""
    with session.client() as client:
        if vm is None:
            session.show(client.vms(), lambda answer: _render().show_vms(answer))
        else:
            session.show(client.vm(vm), lambda answer: _render().show_vm(answer))


@main.group()
def balloon() -> None:
    """Take memory out of a guest, give it back, and see what it says."""


@balloon.command("set")
@vm_argument
@click.argument("size", callback=size_argument)
@click.option("--wait", is_flag=True, help="Return once the guest is there.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, 3600),
    default=WAIT_DEFAULT_S,
    show_default=True,
    help="Seconds to wait at most.",
)
@pass_session
def set_balloon(session: Session, vm: str, size: int, wait: bool, timeout_s: float) -> None:
    """Set the size of VM's balloon: the memory taken out of the guest."""
    with session.client() as client:
        session.show(client.set_balloon(vm, size, timeout_s if wait else None), _show_nothing)


@balloon.command()
@vm_argument
@click.option("--fresh", is_flag=True, help="Ask the guest now instead of showing the latest.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, 3600),
    default=FRESH_DEFAULT_S,
    show_default=True,
    help="Seconds to wait for fresh ones.",
)
@pass_session
def stats(session: Session, vm: str, fresh: bool, timeout_s: float) -> None:
    """Show what VM's guest says about its memory."""
    with session.client() as client:
        session.show(
            client.statistics(vm, timeout_s if fresh else None),
            lambda answer: _render().show_statistics(answer),
        )


@balloon.command()
@vm_argument
@click.option("--stop", is_flag=True, help="Break the round off; the guest takes its memory back.")
@pass_session
def hint(session: Session, vm: str, stop: bool) -> None:
    """Ask VM's guest to list its free memory, once."""
    with session.client() as client:
        session.show(
            client.hint(vm, "stop" if stop else "start"), lambda answer: _render().show_hint(answer)
        )


@main.command("qemu-args")
@vm_argument
@click.option(
    "--format", "form", type=click.Choice(["cli", "libvirt"]), default="cli", show_default=True
)
@click.option(
    "--memory",
    default="1G",
    show_default=True,
    callback=size_text,
    help="Guest RAM to write into the options.",
)
@pass_session
def qemu_args(session: Session, vm: str, form: str, memory: str) -> None:
    """Print the QEMU options, or the libvirt XML, that connect VM to this daemon.

    Guest RAM must be a shared memory file; change --memory to the guest's size.
    """
    from vhostd.control import qemu_args as text

    with session.client() as client:
        devices = client.devices(vm)
    if form == "libvirt":
        session.show({"xml": text.libvirt_xml(devices)}, lambda answer: click.echo(answer["xml"]))
        return
    options = [*text.memory_options(memory), *text.device_options(devices)]
    session.show(options, lambda answer: click.echo(text.command_line(answer)))


@main.command()
@click.option("--follow", is_flag=True, help="Go on with events as they happen, until ^C.")
@pass_session
def events(session: Session, follow: bool) -> None:
    """Show the latest events: one line each, or one JSON object."""
    try:
        with session.client() as client:
            for event in client.events(follow=follow):
                session.show(event, lambda answer: click.echo(_render().event_line(answer)))
    except KeyboardInterrupt:
        return


def _render() -> ModuleType:
    """Rich is imported only where a person reads."""
    from vhostd.control import render

    return render


def _show_nothing(answer: JsonValue) -> None:
    """Success is silent, as with cp."""
