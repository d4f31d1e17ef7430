"""One life of the service: fork, exec with descriptors at 3 and up, signals, end.

Must not know why a service is started or ended.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn

from vhostd.fds import OwnedFd
from vhostd.keeper.speech import say
from vhostd.systemd import LISTEN_FDS_START

EXIT_NOT_STARTED: Final = 2
"""What a program that cannot be executed counts as: the command line is wrong."""

KEEPER: Final = "VHOSTD_KEEPER"
"""In a service's environment: the keeper's process id."""

_OURS: Final = frozenset(
    {
        "NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID",
        "WATCHDOG_PID", "WATCHDOG_USEC",
    }
)  # fmt: skip
"""Assignments of our own service manager; they are not for the service."""


class Child:
    """A process we started and have not reaped, so its number cannot mean another.

    Attributes:
        pid: its number.
        started_s: when, on the monotonic clock.
        ready: whether it said READY=1.
    """

    def __init__(self, pid: int, pidfd: OwnedFd) -> None:
        self.pid = pid
        self.started_s = time.monotonic()
        self.ready = False
        self._pidfd = pidfd

    def fileno(self) -> int:
        """Readable once it has ended, pidfd_open(2)."""
        return self._pidfd.fileno()

    @property
    def lived_s(self) -> float:
        """Seconds since it was started."""
        return time.monotonic() - self.started_s

    @property
    def killed(self) -> bool:
        """Its main thread has ended, and the kernel waits for another one: proc_pid_stat(5)."""
        stat = Path(f"/proc/{self.pid}/stat").read_text()
        return stat.rpartition(") ")[2].startswith("Z")

    def begin_life(self) -> None:
        """Its life begins now, though the process is older."""
        self.started_s = time.monotonic()

    def send_signal(self, number: int) -> None:
        """Send it a signal; one that has ended gets none."""
        os.kill(self.pid, number)

    def reap(self) -> int:
        """Wait for its end; its exit code, or the negative number of the signal it died by."""
        _, status = os.waitpid(self.pid, 0)
        self._pidfd.close()
        return os.waitstatus_to_exitcode(status)


def service_environment(
    environment: Mapping[str, str],
    notify_path: str,
    watchdog_s: float | None,
    store_max: int,
) -> dict[str, str]:
    """The environment of a service, except for what start() alone can tell.

    store_max: descriptors that are kept; sd_notify(3) says it as FDSTORE.
    """
    result = {key: value for key, value in environment.items() if key not in _OURS}
    result["NOTIFY_SOCKET"] = notify_path
    result["FDSTORE"] = str(store_max)
    result[KEEPER] = str(os.getpid())
    if watchdog_s is not None:
        result["WATCHDOG_USEC"] = str(round(watchdog_s * 1e6))
    return result


def start(
    argv: Sequence[str], environment: Mapping[str, str], stored: Sequence[tuple[str, int]]
) -> Child:
    """Start a program with stored descriptors, as sd_listen_fds(3) has it.

    It leads a process group of its own: Ctrl-C on a terminal is for us, who pass it on once.

    Args:
        argv: the program, searched for in PATH, and its arguments.
        environment: as service_environment() returns it.
        stored: name and descriptor; they stay the caller's.

    Raises:
        OSError: no process could be had. A program that cannot be executed is no error here: that
            process ends with EXIT_NOT_STARTED.
    """
    # Between fork and exec the child still has our handlers, which would act on us.
    mask = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _become(argv, environment, stored, mask)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        return Child(pid, OwnedFd(os.pidfd_open(pid)))
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _become(
    argv: Sequence[str],
    environment: Mapping[str, str],
    stored: Sequence[tuple[str, int]],
    mask: set[int | signal.Signals],
) -> NoReturn:
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            # Ours are handled, so exec resets them; Python ignores SIGPIPE, which exec would keep.
            if signal.getsignal(number) not in (signal.SIG_DFL, None):
                signal.signal(number, signal.SIG_DFL)
        place([fd for _, fd in stored])
        given = dict(environment)
        pid = str(os.getpid())  # only known here, hence no posix_spawn
        if stored:
            given["LISTEN_PID"] = pid
            given["LISTEN_FDS"] = str(len(stored))
            given["LISTEN_FDNAMES"] = ":".join(name for name, _ in stored)
        if "WATCHDOG_USEC" in given:
            given["WATCHDOG_PID"] = pid
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.execvpe(argv[0], list(argv), given)
    except BaseException as error:  # noqa: BLE001  # nothing may return into the keeper's code
        say(f"{argv[0]} cannot be started: {error}")
    finally:
        os._exit(EXIT_NOT_STARTED)


def place(fds: Sequence[int]) -> None:
    """Move descriptors to LISTEN_FDS_START and up, in order, where exec keeps them.

    Whatever else was there is closed. It takes two descriptors more than there are, not twice as
    many: a store may fill most of what the host allows.
    """
    now = list(fds)
    index_of = {fd: index for index, fd in enumerate(now)}
    for index, target in enumerate(range(LISTEN_FDS_START, LISTEN_FDS_START + len(now))):
        if now[index] == target:
            os.set_inheritable(target, True)
            continue
        in_the_way = index_of.pop(target, None)
        if in_the_way is not None:
            beyond = LISTEN_FDS_START + len(now)
            moved = fcntl.fcntl(target, fcntl.F_DUPFD_CLOEXEC, beyond)
            now[in_the_way], index_of[moved] = moved, in_the_way
        os.dup2(now[index], target, inheritable=True)
        os.close(now[index])
        del index_of[now[index]]


def occupy_standard_descriptors() -> None:
    """Have /dev/null where stdin, stdout or stderr is closed."""
    # A keeper started with stdin closed would otherwise give its socket to the service as stdin.
    fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    while fd <= 2:
        os.set_inheritable(fd, True)
        fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.close(fd)
