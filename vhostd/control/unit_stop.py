"""What the unit's ExecStop= does: a stop must not take guests' devices away for good.

A guest can't connect again, so what it needs must be kept from a stop to the next start. systemd
254 and later do so (FileDescriptorStorePreserve=yes) for a unit that is enabled. Else systemd
closes the stored descriptors of a stopped unit, unless a job for it waits: there the stop is made
a restart, by a start job that replaces the stop job. systemctl then says "Job for vhostd.service
canceled."

Asks systemctl and the daemon. Must not know what is stored.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from vhostd.control.client import ClientError, ControlClient, ExitCode

CONFIRMATION: Final = "stop-confirmed"
"""A file beside the control socket: the operator knows that guests lose their devices."""

SYSTEMCTL_TIMEOUT_S: Final = 10.0


class Outcome(Enum):
    """What becomes of the stop."""

    STOP = "nothing is in its way"
    GUESTS_WAIT = "what guests need is kept; they wait for the next start"
    GUESTS_LOST = "it was confirmed: guests lose their devices for good"
    RESTART = "it becomes a restart"


@dataclass(frozen=True, slots=True)
class Stop:
    """A stop as the unit finds it.

    Attributes:
        job: type of the unit's job, such as "stop" or "restart"; "" where it has none.
        host_ends: the host shuts down or reboots.
        preserved: systemd keeps what is stored until the next start.
        connected: VMs that lose their devices without it; None: the daemon did not say.
        confirmed: the operator wants it all the same.
    """

    job: str
    host_ends: bool
    preserved: bool
    connected: Sequence[str] | None
    confirmed: bool

    def outcome(self) -> Outcome:
        """What is to become of it."""
        # Any other job is followed by a start, and so is a death without one (Restart=always).
        if self.job != "stop" or self.host_ends or self.connected == ():
            return Outcome.STOP
        if self.preserved:
            return Outcome.GUESTS_WAIT
        return Outcome.GUESTS_LOST if self.confirmed else Outcome.RESTART


def connected_vms(statuses: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """VMs with a VMM, as far as their status tells; one that is left alone may have one."""
    return tuple(
        status["vm"]
        for status in statuses
        if status["state"] != "waiting" or status.get("paused") is not None
    )


def look(unit: str, control_socket: Path) -> Stop:
    """Ask the service manager and the daemon."""
    try:
        connected: Sequence[str] | None = connected_vms(ControlClient(control_socket).vms())
    except ClientError:
        connected = None  # it hangs, maybe: its guests are there all the same
    return Stop(
        job=_job(unit),
        host_ends=_systemctl("is-system-running") == "stopping",
        preserved=_preserved(unit),
        connected=connected,
        confirmed=(control_socket.parent / CONFIRMATION).exists(),
    )


def act(stop: Stop, unit: str, control_socket: Path) -> str | None:
    """Do what is to be done; what to tell the operator, or None.

    Raises:
        ClientError: systemd did not take the start job.
    """
    confirmation = control_socket.parent / CONFIRMATION
    guests = "guests, maybe" if stop.connected is None else ", ".join(stop.connected)
    match stop.outcome():
        case Outcome.STOP:
            return None
        case Outcome.GUESTS_WAIT:
            return (
                f"{unit} is stopped while VMs are connected: {guests}. Their devices, and each"
                " fsync to a disk of theirs, wait until it is started again"
            )
        case Outcome.GUESTS_LOST:
            confirmation.unlink(missing_ok=True)
            return (
                f"{unit} is stopped while VMs are connected: {guests}. Their devices are gone"
                " for good: restart these VMs"
            )
        case Outcome.RESTART:
            # Replaces the stop job, so that systemd never finds the unit stopped without a job.
            _systemctl("start", "--no-block", unit, check=True)
            return (
                f"{unit} is restarted, not stopped: VMs are connected: {guests}. Their devices"
                " would be gone for good, for systemd would keep nothing of them (that takes"
                " systemd 254 and an enabled unit). End these VMs first. Or, to stop it all the"
                f" same: touch {confirmation}; systemctl stop {unit}"
            )


def _preserved(unit: str) -> bool:
    """Whether systemd keeps what is stored when the unit is stopped.

    It keeps it with the unit, and forgets the unit unless an active one refers to it, as a target
    does once the unit is enabled. Source: systemd.service(5), FileDescriptorStorePreserve=.
    """
    if _property(unit, "FileDescriptorStorePreserve") != "yes":
        return False
    referring = " ".join(_property(unit, name) for name in ("WantedBy", "RequiredBy", "UpheldBy"))
    return any(_property(other, "ActiveState") == "active" for other in referring.split())


def _property(unit: str, name: str) -> str:
    return _systemctl("show", "--value", "-p", name, unit)


def _job(unit: str) -> str:
    for line in _systemctl("list-jobs", "--no-legend", "--plain", unit).splitlines():
        words = line.split()
        if len(words) >= 3 and words[1] == unit:
            return words[2]
    return ""


def _systemctl(*words: str, check: bool = False) -> str:
    try:
        done = subprocess.run(
            ["systemctl", *words],
            capture_output=True,
            text=True,
            check=check,
            timeout=SYSTEMCTL_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        raise ClientError(f"systemctl {words[0]}: {detail.strip()}", ExitCode.REFUSED) from error
    return done.stdout.strip()
