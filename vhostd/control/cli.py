"""vhostctl: the command line of the control API.

Arguments to requests, answers to text. Must not decide anything the daemon should.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import click

from vhostd import __version__
from vhostd.errors import ConfigError
from vhostd.units import MiB, parse_size

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
timeout_option = click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(0, 3600),
    default=WAIT_DEFAULT_S,
    show_default=True,
    help="Seconds to wait at most.",
)


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
@timeout_option
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


@main.group()
def mem() -> None:
    """Add memory to a guest, and take it away again, in blocks (virtio-mem)."""


@mem.command("resize")
@vm_argument
@click.argument("size", callback=size_argument)
@click.option("--device", help="Id of the device; needed where there are several.")
@click.option("--wait", is_flag=True, help="Show progress; return once the guest is there.")
@timeout_option
@pass_session
def resize_mem(
    session: Session, vm: str, size: int, device: str | None, wait: bool, timeout_s: float
) -> None:
    """Set how much of a memory device VM's guest is to use.

    With --wait, and a guest that does not get there in time, says where it stands and why, and
    exits with 4.
    """
    with session.client() as client:
        answer = client.resize_mem(vm, size, device)
        if wait:
            statuses = client.mem_progress(vm, answer["id"], timeout_s)
            answer = deque(statuses, 1)[0] if session.json else _render().show_progress(statuses)
        session.show(answer, _show_nothing)


@main.group()
def memory() -> None:
    """The memory of a guest as a whole."""


@memory.command("set")
@vm_argument
@click.argument("size", callback=size_argument)
@click.option("--wait", is_flag=True, help="Return once the guest has it.")
@timeout_option
@pass_session
def set_memory(session: Session, vm: str, size: int, wait: bool, timeout_s: float) -> None:
    """Set VM's usable memory: memory devices first, block by block, then the balloon.

    Says what was asked of whom.
    """
    with session.client() as client:
        plan = client.set_memory(vm, size, timeout_s if wait else None)
        session.show(plan, lambda answer: _render().show_plan(answer))


@main.command("qemu-args")
@vm_argument
@click.option(
    "--format", "form", type=click.Choice(["cli", "libvirt"]), default="cli", show_default=True
)
@click.option(
    "--memory",
    default="1G",
    show_default=True,
    callback=ram_argument,
    help="Guest RAM to write into the options.",
)
@pass_session
def qemu_args(session: Session, vm: str, form: str, memory: int) -> None:
    """Print the QEMU options, or the libvirt XML, that connect VM to this daemon.

    Guest RAM must be a shared memory file; change --memory to the guest's size.
    """
    from vhostd.control import qemu_args as text

    with session.client() as client:
        devices = client.devices(vm)
    try:
        options = [*text.memory_options(memory, devices), *text.device_options(devices)]
    except ConfigError as error:
        click.echo(f"vhostctl: {error}", err=True)
        raise click.exceptions.Exit(1) from error
    if form == "libvirt":
        xml = text.libvirt_xml(memory, devices)
        session.show({"xml": xml}, lambda answer: click.echo(answer["xml"]))
    else:
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
