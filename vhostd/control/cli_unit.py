"""The verb of vhostctl that the units in systemd/ use."""

from __future__ import annotations

import sys

import click

from vhostd.control.cli_common import Session, pass_session
from vhostd.systemd import is_journal, with_priority


@click.command("unit-stop")
@click.argument("unit")
@pass_session
def unit_stop(session: Session, unit: str) -> None:
    """For ExecStop= of UNIT: do not let its stop take the devices of connected VMs away for good.

    Where systemd keeps what is stored for a stopped unit (254 and later), they wait for the next
    start. Else the stop becomes a restart, unless the file stop-confirmed is beside the control
    socket.
    """
    from vhostd.control.unit_stop import act, look

    with session.client():
        told = act(look(unit, session.socket), unit, session.socket)
    if told is not None:
        click.echo(with_priority("warning", told) if is_journal(sys.stderr) else told, err=True)
