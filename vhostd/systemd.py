"""The service manager's protocol, seen from a service: sd_notify, the fd store, the watchdog.

Promise: systemd and our own keeper are spoken to in the same words, and no descriptor a manager
hands over is lost in silence. Knows no daemon state and no event loop: each call is a few system
calls, and blocks only while the manager's queue of datagrams is full.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import socket
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from vhostd.errors import ConfigError
from vhostd.fds import OwnedFd

FDS_PER_MESSAGE_MAX: Final = 253
"""SCM_MAX_FD, include/net/scm.h."""

FD_NAME_LENGTH_MAX: Final = 255
"""FDNAME_MAX of systemd, sd_notify(3)."""

LISTEN_FDS_START: Final = 3
"""The first descriptor a manager passes, sd_listen_fds(3)."""

UNKNOWN_NAME: Final = "unknown"
"""What a descriptor is called when the manager named none, sd_listen_fds_with_names(3)."""


PRIORITIES: Final = {"critical": 2, "error": 3, "warning": 4, "notice": 5, "info": 6, "debug": 7}
"""Levels of log lines as syslog(3) numbers them."""


class HasFileno(Protocol):
    """Whatever holds a descriptor: an OwnedFd, a socket, a file."""

    def fileno(self) -> int:
        """The descriptor."""
        ...


def connect(
    environment: Mapping[str, str] = os.environ, timeout_s: float | None = None
) -> socket.socket | None:
    """A channel to the service manager, the caller's to close; None where there is none.

    Source: sd_notify(3); an "@" at the start of NOTIFY_SOCKET means the abstract namespace.

    Args:
        timeout_s: how long a message may wait for room in the manager's queue; None: for ever.

    Raises:
        OSError: NOTIFY_SOCKET is set but cannot be reached.
    """
    address = environment.get("NOTIFY_SOCKET", "")
    if not address:
        return None
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    channel.settimeout(timeout_s)
    try:
        channel.connect("\0" + address[1:] if address.startswith("@") else address)
    except OSError:
        channel.close()
        raise
    return channel


def send(channel: socket.socket, *assignments: str, fds: Sequence[HasFileno | int] = ()) -> None:
    """Send assignments such as "READY=1" over a channel of connect().

    Source: sd_notify(3), sd_pid_notify_with_fds(3).

    Args:
        fds: sent along, FDS_PER_MESSAGE_MAX at most; they stay the caller's.

    Raises:
        ValueError: too many descriptors for one message.
        OSError: the manager is gone; BlockingIOError or TimeoutError: its queue stayed full.
    """
    if len(fds) > FDS_PER_MESSAGE_MAX:
        raise ValueError(f"{len(fds)} descriptors, a message holds {FDS_PER_MESSAGE_MAX}")
    rights = array.array("i", [fd if isinstance(fd, int) else fd.fileno() for fd in fds])
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
    channel.sendmsg(["\n".join(assignments).encode()], ancillary)


def notify(
    *assignments: str,
    fds: Sequence[HasFileno] = (),
    environment: Mapping[str, str] = os.environ,
    timeout_s: float | None = None,
) -> bool:
    """connect() and send(), which say what may go wrong; False when there is no manager."""
    channel = connect(environment, timeout_s)
    if channel is None:
        return False
    with channel:
        send(channel, *assignments, fds=fds)
    return True


def is_fd_name(name: str) -> bool:
    """Whether systemd takes it as FDNAME: 1 to 255 printable ASCII characters without ":".

    Source: sd_notify(3). systemd takes an empty name too, which nobody could tell from none.
    """
    return (
        0 < len(name) <= FD_NAME_LENGTH_MAX
        and name.isascii()
        and name.isprintable()
        and ":" not in name
    )


def store_fds(
    channel: socket.socket, name: str, fds: Sequence[HasFileno | int], *, poll: bool = True
) -> None:
    """Give descriptors into the manager's store; a successor gets them.

    Nobody answers: use barrier() to know that they are stored. What the manager knows already (the
    same open file, under any name) it does not store again, and a full store refuses in silence.

    Args:
        channel: of connect().
        name: what they are called, see is_fd_name; several may share a name.
        fds: stay the caller's.
        poll: let the manager forget them by itself once they report POLLHUP or POLLERR, as a
            connected socket does when its peer is gone. False is FDPOLL=0, sd_notify(3).

    Raises:
        ValueError: systemd takes no such name.
        OSError: the manager cannot be reached; earlier FDS_PER_MESSAGE_MAX of fds may be stored.
    """
    _check_fd_name(name)
    assignments = ["FDSTORE=1", f"FDNAME={name}"]
    if not poll:
        assignments.append("FDPOLL=0")
    for start in range(0, len(fds), FDS_PER_MESSAGE_MAX):
        send(channel, *assignments, fds=fds[start : start + FDS_PER_MESSAGE_MAX])


def forget_fds(channel: socket.socket, name: str) -> None:
    """Have the manager close every descriptor stored under a name.

    Source: FDSTOREREMOVE=1 of sd_notify(3). A name it does not know is no mistake.

    Raises:
        ValueError: systemd takes no such name.
        OSError: the manager cannot be reached.
    """
    _check_fd_name(name)
    send(channel, "FDSTOREREMOVE=1", f"FDNAME={name}")


def _check_fd_name(name: str) -> None:
    if not is_fd_name(name):
        raise ValueError(f"{name!r} cannot name a stored descriptor")


def barrier(timeout_s: float, *, environment: Mapping[str, str] = os.environ) -> bool:
    """Wait until the manager has taken in all that was sent before; False: no manager.

    Source: sd_notify_barrier(3): the manager closes a pipe's end once it comes to it in its queue.

    Raises:
        TimeoutError: it has not by then. It may still do.
        OSError: the manager cannot be reached.
    """
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    with OwnedFd(read_end) as ours:
        with OwnedFd(write_end) as theirs:
            if not notify("BARRIER=1", fds=[theirs], environment=environment):
                return False
        poller = select.poll()
        poller.register(ours.fileno(), 0)  # POLLHUP is reported unasked
        if not poller.poll(timeout_s * 1000):
            raise TimeoutError(f"the service manager took in nothing for {timeout_s} s")
    return True


def passed_fds(environment: Mapping[str, str], pid: int) -> dict[str, list[OwnedFd]]:
    """Take over what the manager passed, by name; empty where it passed nothing to us.

    Call it once, early: descriptors 3 and up are the caller's from here on, and close on exec. A
    name's descriptors are in the order they were passed. systemd passes the latest stored first
    and shuffles those of one message, so give a name to each whose order matters.

    Source: sd_listen_fds_with_names(3).

    Args:
        environment: has LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES, or not.
        pid: our own; descriptors passed to somebody else are left alone.

    Raises:
        ConfigError: LISTEN_* contradict themselves. Nothing was touched then.
    """
    if "LISTEN_PID" not in environment or _number(environment, "LISTEN_PID") != pid:
        return {}
    if "LISTEN_FDS" not in environment:
        return {}
    count = _number(environment, "LISTEN_FDS")
    fds = range(LISTEN_FDS_START, LISTEN_FDS_START + count)
    if "LISTEN_FDNAMES" in environment:
        names = environment["LISTEN_FDNAMES"].split(":") if count else []
    else:
        names = [UNKNOWN_NAME] * count
    if len(names) != count:
        raise ConfigError(f"LISTEN_FDNAMES: {len(names)} names for {count} descriptors")
    for fd in fds:
        try:
            fcntl.fcntl(fd, fcntl.F_GETFD)
        except OSError as error:
            raise ConfigError(f"LISTEN_FDS: {count}, but {fd} is no descriptor") from error
    passed: dict[str, list[OwnedFd]] = {}
    for name, fd in zip(names, fds, strict=True):
        os.set_inheritable(fd, False)
        passed.setdefault(name or UNKNOWN_NAME, []).append(OwnedFd(fd))
    return passed


def watchdog_interval_s(environment: Mapping[str, str], pid: int) -> float | None:
    """How often at least the manager wants to see WATCHDOG=1; None: it does not watch us.

    Source: sd_watchdog_enabled(3), which advises to send it twice as often.

    Raises:
        ConfigError: WATCHDOG_USEC or WATCHDOG_PID is no number, or the interval is 0.
    """
    if "WATCHDOG_USEC" not in environment:
        return None
    interval_us = _number(environment, "WATCHDOG_USEC")
    if "WATCHDOG_PID" in environment and _number(environment, "WATCHDOG_PID") != pid:
        return None
    if interval_us == 0:
        raise ConfigError("WATCHDOG_USEC: 0 is no interval")
    return interval_us / 1e6


def is_journal(file: HasFileno | int, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a file leads straight to the journal; JOURNAL_STREAM, systemd.exec(5)."""
    try:
        status = os.fstat(file if isinstance(file, int) else file.fileno())
    except OSError:  # closed, or only in memory
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def with_priority(level: str, text: str) -> str:
    """Text whose lines tell the journal their priority; sd-daemon(3), SyslogLevelPrefix=.

    level: one of PRIORITIES; any other counts as info.
    """
    prefix = f"<{PRIORITIES.get(level, PRIORITIES['info'])}>"
    return "\n".join(prefix + line for line in text.split("\n"))


def _number(environment: Mapping[str, str], key: str) -> int:
    text = environment[key]
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(2**64))):
        raise ConfigError(f"{key}: {text[:40]!r} is no number")
    return int(text)
