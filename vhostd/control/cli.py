"""vhostctl: the command line of the control API.

Arguments to requests, answers to text. Must not decide anything the daemon should.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Final

import click

from vhostd import __version__
from vhostd.control.cli_common import (
    Session,
    pass_session,
    ram_argument,
    render,
    say,
    show_nothing,
    size_argument,
    timeout_option,
    vm_argument,
)
from vhostd.control.cli_pmem import doctor, pmem
from vhostd.control.cli_unit import unit_stop
from vhostd.errors import ConfigError

DEFAULT_SOCKET: Final = Path("/run/vhostd/control.sock")
FRESH_DEFAULT_S: Final = 5.0


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
            session.show(client.vms(), lambda answer: render().show_vms(answer))
        else:
            session.show(client.vm(vm), lambda answer: render().show_vm(answer))


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
        answer = client.set_balloon(vm, size, timeout_s if wait else None)
        if answer["target"] != size:
            say(f"{size} bytes are no whole pages of 4 KiB: set to {answer['target']} bytes")
        session.show(answer, show_nothing)


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
            lambda answer: render().show_statistics(answer),
        )


@balloon.command()
@vm_argument
@click.option("--stop", is_flag=True, help="Break the round off; the guest takes its memory back.")
@pass_session
def hint(session: Session, vm: str, stop: bool) -> None:
    """Ask VM's guest to list its free memory, once."""
    with session.client() as client:
        session.show(
            client.hint(vm, "stop" if stop else "start"), lambda answer: render().show_hint(answer)
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
        answer = client.resize_mem(vm, size, device, again=wait)
        if wait:
            statuses = client.mem_progress(vm, answer["id"], timeout_s)
            answer = deque(statuses, 1)[0] if session.json else render().show_progress(statuses)
        session.show(answer, show_nothing)


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
        session.show(plan, lambda answer: render().show_plan(answer))


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
                session.show(event, lambda answer: click.echo(render().event_line(answer)))
    except KeyboardInterrupt:
        return


main.add_command(pmem)
main.add_command(doctor)
main.add_command(unit_stop)
