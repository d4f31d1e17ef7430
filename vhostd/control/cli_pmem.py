"""vhostctl's verbs about disks, and doctor. Arguments to requests, answers to text."""

from __future__ import annotations

from pathlib import Path

import click

from vhostd.control.cli_common import (
    Session,
    pass_session,
    render,
    show_nothing,
    size_argument,
    vm_argument,
)

device_option = click.option("--device", help="Id of the disk; needed where there are several.")


@click.group()
def pmem() -> None:
    """Disks that are memory of a guest (virtio-pmem)."""


@pmem.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("size", callback=size_argument)
@click.option("--preallocate", is_flag=True, help="Take all its room from the file system now.")
def create(file: Path, size: int, preallocate: bool) -> None:
    """Make FILE, a raw image of SIZE zeroes, sparse unless told otherwise. Needs no daemon."""
    from vhostd.images.image_file import ImageUnusable, create_image

    try:
        create_image(file, size, preallocate=preallocate)
    except ImageUnusable as error:
        click.echo(f"vhostctl: {error}", err=True)
        raise click.exceptions.Exit(1) from error


@pmem.command()
@vm_argument
@device_option
@pass_session
def flush(session: Session, vm: str, device: str | None) -> None:
    """Return once all that VM wrote to its disk is on the host's disk."""
    with session.client() as client:
        session.show(client.flush_pmem(vm, device), show_nothing)


@pmem.command("drop-cache")
@vm_argument
@device_option
@pass_session
def drop_cache(session: Session, vm: str, device: str | None) -> None:
    """Flush VM's disk, then give its page cache back to the host; reads bring it back."""
    with session.client() as client:
        session.show(client.drop_pmem_cache(vm, device), lambda told: render().show_dropped(told))


@pmem.command()
@vm_argument
@device_option
@pass_session
def clear(session: Session, vm: str, device: str | None) -> None:
    """Let flushes of VM's disk succeed again, after a failure was seen to.

    What could not be written then is lost unless the guest writes it again.
    """
    with session.client() as client:
        session.show(client.clear_pmem(vm, device), show_nothing)


@click.command()
@click.option("--guest-kernel", metavar="VERSION", help="Also say what such a guest can use.")
@pass_session
@click.pass_context
def doctor(context: click.Context, session: Session, guest_kernel: str | None) -> None:
    """Look for what is wrong with this host, the daemon and its VMs, and say what to do.

    Exit codes: 0 nothing failed, 1 something did, 3 the daemon can't be reached.
    """
    from vhostd.control import diagnosis
    from vhostd.control.client import ClientError, ControlClient, ExitCode

    code = 0
    checks = diagnosis.host_checks()
    try:
        if guest_kernel is not None:
            checks += diagnosis.guest_checks(guest_kernel)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--guest-kernel") from error
    try:
        statuses = ControlClient(session.socket).vms()
    except ClientError as error:
        checks.append(diagnosis.unreachable(str(error)))
        code = int(ExitCode.UNREACHABLE)
    else:
        checks += diagnosis.daemon_checks(str(session.socket), statuses)
    session.show([check.as_dict() for check in checks], lambda found: render().show_checks(found))
    if code == 0 and any(check.verdict == diagnosis.FAILED for check in checks):
        code = int(ExitCode.REFUSED)
    context.exit(code)
