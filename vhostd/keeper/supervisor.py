"""The keeper's life: one service at a time, started again with what it stored, until it is done.

Everything is an event: a message, a signal, the service's end, a hang-up, a deadline. Nothing here
blocks, so SIGTERM acts at once whatever goes on. Must not know what the service does.
"""

from __future__ import annotations

import enum
import os
import selectors
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from vhostd.errors import HostError
from vhostd.keeper.child import Child, occupy_standard_descriptors, service_environment
from vhostd.keeper.ending import Ending
from vhostd.keeper.notify_socket import Notification, NotifySocket, Refused
from vhostd.keeper.signals import SignalWakeup
from vhostd.keeper.spare import LOAD_TIMEOUT_S, Starter
from vhostd.keeper.speech import Complaints, printable, say
from vhostd.keeper.store import STORE_MAX, FdStore, room_for
from vhostd.keeper.store_requests import change_store
from vhostd.systemd import notify

STOP_TIMEOUT_S: Final = 5.0
"""From asking a service to end to SIGKILL."""

QUICK_DEATH_S: Final = 1.0
"""A service that lived shorter than this died quickly."""

BACKOFF_FIRST_S: Final = 0.1
BACKOFF_MAX_S: Final = 5.0

EXIT_CONFIG: Final = 2
"""The service's exit code for a configuration that another start would not mend."""

_SIGNAL_EXIT_BASE: Final = 128  # what a shell makes of death by signal

_LAST_WORDS_MAX: Final = 65536
"""Messages taken in after the service's end; more than net.unix.max_dgram_qlen lets wait."""


class Goal(enum.Enum):
    """What the end of the running service will lead to."""

    RUN = "it should not end"
    UPGRADE = "another is started at once"
    ABORT = "another is started; it was stuck"
    STOP = "the keeper ends"


def keep(
    argv: Sequence[str],
    *,
    watchdog_s: float | None = None,
    store_max: int = STORE_MAX,
    stop_timeout_s: float = STOP_TIMEOUT_S,
    quick_death_s: float = QUICK_DEATH_S,
    socket_parent: Path | None = None,
    environment: Mapping[str, str] = os.environ,
    spare: bool = False,
    load_timeout_s: float = LOAD_TIMEOUT_S,
) -> int:
    """Run a service, and again whenever it dies, with the descriptors it stored; its exit code.

    It ends when the service ends with 0 and has nothing stored, or with EXIT_CONFIG before any was
    ever ready, or on SIGTERM and SIGINT, which are passed on. SIGHUP replaces the service (an
    upgrade); with a spare once that has loaded the new program: one that can't leaves the old one.
    It raises the limit of descriptors and handles signals, so call it from the main thread.

    Args:
        argv: the program and its arguments.
        watchdog_s: WATCHDOG=1 is expected this often once the service is ready; None: never.
        store_max: how many descriptors are kept.
        stop_timeout_s: how long a service may take to end when asked to.
        quick_death_s: one that lived shorter is started again more and more slowly.
        socket_parent: where NOTIFY_SOCKET's directory is made (108 bytes); None: TMPDIR or /tmp.
        environment: the service's, less what a manager of ours said in it.
        spare: have a second process load the program in advance, at an upgrade within
            load_timeout_s; it must know of keeper.spare.

    Returns:
        The exit code of the last service, 128 + n if it died by signal n; 0 if SIGTERM came while
        none was running.

    Raises:
        HostError: the socket cannot be made, or no process for the very first start.
    """
    occupy_standard_descriptors()
    parent = socket_parent or Path(environment.get("TMPDIR") or "/tmp")
    room = room_for(store_max)
    notify_socket = NotifySocket(parent)
    supervisor = Supervisor(
        argv,
        service_environment(environment, str(notify_socket.path), watchdog_s, room),
        notify_socket,
        FdStore(room),
        watchdog_s=watchdog_s,
        stop_timeout_s=stop_timeout_s,
        quick_death_s=quick_death_s,
        manager=environment,
        spare=spare,
        load_timeout_s=load_timeout_s,
    )
    try:
        return supervisor.run()
    finally:
        supervisor.close()


class Supervisor:
    """One service, its store, and what is to happen to it next."""

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        notify_socket: NotifySocket,
        store: FdStore,
        *,
        watchdog_s: float | None,
        stop_timeout_s: float,
        quick_death_s: float,
        manager: Mapping[str, str],
        spare: bool,
        load_timeout_s: float,
    ) -> None:
        """The arguments are keep()'s; the socket and the store are ours from here on.

        manager: the environment in which our own service manager may have said something.
        """
        self._manager = manager
        self._notify_socket = notify_socket
        self._store = store
        self._watchdog_s = watchdog_s
        self._quick_death_s = quick_death_s
        self._signals = SignalWakeup()
        self._complaints = Complaints()
        self._starter = Starter(
            argv, environment, self._complaints, spare=spare, load_timeout_s=load_timeout_s
        )
        self._child: Child | None = None
        self._ending = Ending(stop_timeout_s)
        self._goal = Goal.RUN
        self._ever_ready = False
        self._starts = 0
        self._quick_deaths = 0
        self._exit_code: int | None = None
        # Deadlines on the monotonic clock; None: nothing is due.
        self._start_at_s: float | None = None
        self._ping_due_s: float | None = None
        self._selector = selectors.DefaultSelector()
        for source, react in (
            (notify_socket, self._on_message),
            (store, self._on_hang_up),
            (self._signals, self._on_signals),
            (self._starter, self._on_renewed),
        ):
            self._selector.register(source, selectors.EVENT_READ, react)

    def close(self) -> None:
        """Let go of everything: stored descriptors are closed."""
        self._selector.close()
        self._starter.close()
        self._signals.close()
        self._notify_socket.close()
        self._store.close()

    def run(self) -> int:
        """Do it; the keeper's exit code.

        Raises:
            HostError: no process could be had for the first start.
        """
        self._start()
        while self._exit_code is None:
            for key, _ in self._selector.select(self._wait_s()):
                react: Callable[[], None] = key.data
                react()
            self._on_deadlines()
        return self._exit_code

    def _wait_s(self) -> float | None:
        due_s = [
            at_s
            for at_s in (
                self._start_at_s,
                self._ping_due_s,
                self._ending.due_s,
                self._starter.spare_due_s,
                self._starter.renewed_by_s,
            )
            if at_s is not None
        ]
        return max(0.0, min(due_s) - time.monotonic()) if due_s else None

    def _on_deadlines(self) -> None:
        now_s = time.monotonic()
        if self._start_at_s is not None and self._start_at_s <= now_s and self._exit_code is None:
            self._start()
        self._starter.on_deadline(now_s)
        if self._ping_due_s is not None and self._ping_due_s <= now_s:
            self._abort(f"no WATCHDOG=1 for {self._watchdog_s} s")
        if self._child is not None and self._ending.on_deadline(now_s, self._child):
            self._leave_behind(self._child)

    # The service's life.

    def _start(self) -> None:
        self._start_at_s = None
        try:
            child = self._starter.start(list(self._store))
        except OSError as error:
            if not self._starts:
                raise HostError(f"no process can be started: {error.strerror}") from error
            self._complaints.complain("no process can be started", str(error.strerror))
            self._start_at_s = time.monotonic() + BACKOFF_MAX_S
            return
        self._starts += 1
        self._child, self._goal = child, Goal.RUN
        self._selector.register(child, selectors.EVENT_READ, self._on_end)
        again = "" if self._starts == 1 else "re"
        say(f"{again}started PID {child.pid} with {len(self._store)} descriptors")

    def _on_end(self) -> None:
        child = self._child
        assert child is not None
        self._on_signals()  # an upgrade asked for just before a clean end is an upgrade
        # Whatever it sent before it died is in the queue: it must not be lost, and once the process
        # is reaped we would not know whose it was.
        for _ in range(_LAST_WORDS_MAX):
            if not self._receive():
                break
        self._selector.unregister(child)
        self._ended(child, child.reap())

    def _leave_behind(self, child: Child) -> None:
        """It will never run again, but a thread of it waits in the kernel, maybe for ever."""
        say(f"PID {child.pid} waits for a file system that does not answer: left behind")
        self._selector.modify(child, selectors.EVENT_READ, partial(self._reap_late, child))
        self._ended(child, -signal.SIGKILL)

    def _reap_late(self, child: Child) -> None:
        self._selector.unregister(child)
        child.reap()
        say(f"PID {child.pid}, which was left behind, has ended")

    def _ended(self, child: Child, code: int) -> None:
        lived_s = child.lived_s
        if self._goal is Goal.RUN and self._starter.renewed_by_s is not None:
            self._goal = Goal.UPGRADE  # sooner than was thought
            self._starter.drop_spares()
        goal = self._goal
        self._child = self._ping_due_s = None
        self._ending.over()
        how = f"ended with {code}" if code >= 0 else f"died by signal {-code}"
        say(f"PID {child.pid} {how} after {lived_s:.1f} s")
        # Whoever ended it, if not we, did not ask for the end of what it stored.
        final = (code == 0 and not self._store) or (code == EXIT_CONFIG and not self._ever_ready)
        if goal is Goal.STOP or (goal is Goal.RUN and final):
            self._exit_code = code if code >= 0 else _SIGNAL_EXIT_BASE - code
        elif goal is Goal.UPGRADE:
            self._start()
        else:
            self._start_later(lived_s)

    def _start_later(self, lived_s: float) -> None:
        self._quick_deaths = self._quick_deaths + 1 if lived_s < self._quick_death_s else 0
        if self._quick_deaths <= 1:
            self._start()
            return
        # The exponent is bounded as the number of deaths is not.
        delay_s = min(BACKOFF_FIRST_S * 2 ** min(self._quick_deaths - 2, 16), BACKOFF_MAX_S)
        say(f"quick death {self._quick_deaths} in a row: next start in {delay_s:.1f} s")
        self._start_at_s = time.monotonic() + delay_s

    def _abort(self, why: str) -> None:
        self._ping_due_s = None
        if self._child is None or self._goal is not Goal.RUN:
            return  # it is ending already, and its time is limited
        say(f"PID {self._child.pid} is stuck: {why}")
        if self._child.killed:
            self._goal = Goal.ABORT
            self._leave_behind(self._child)
            return
        self._ask_to_end(self._child, Goal.ABORT, signal.SIGABRT)

    def _ask_to_end(self, child: Child, goal: Goal, number: signal.Signals) -> None:
        self._goal = goal
        self._ping_due_s = None
        self._ending.begin()
        child.send_signal(number)

    # Signals.

    def _on_signals(self) -> None:
        for number in self._signals.take():
            if number == signal.SIGHUP:
                self._upgrade()
            else:
                self._stop(number)

    def _stop(self, number: signal.Signals) -> None:
        if self._goal is Goal.STOP:
            return
        lost = "; VMs that are still connected lose their devices for good" if self._store else ""
        say(f"stopping: {number.name}{lost}", "warning" if lost else "notice")
        if self._child is not None:
            self._ask_to_end(self._child, Goal.STOP, number)
        elif self._exit_code is None:
            self._exit_code = 0

    def _upgrade(self) -> None:
        if self._child is None or self._goal is not Goal.RUN:
            self._starter.drop_spares()  # which have the old program loaded
            if self._child is None:
                self._start_at_s = time.monotonic()
        elif self._starter.renew(time.monotonic()):
            say(f"upgrading: PID {self._child.pid} serves until the new program is loaded")
        else:
            self._replace(self._child)

    def _on_renewed(self) -> None:
        loaded = self._starter.renewed(time.monotonic())
        if loaded and self._child is not None and self._goal is Goal.RUN:
            self._replace(self._child)

    def _replace(self, child: Child) -> None:
        say(f"upgrading: PID {child.pid} is asked to end")
        self._ask_to_end(child, Goal.UPGRADE, signal.SIGTERM)

    # What the service says and stores.

    def _on_hang_up(self) -> None:
        names = self._store.drop_hung_up()
        if names:
            say(f"dropped {len(names)} stored descriptors that hung up, {len(self._store)} left")

    def _on_message(self) -> None:
        self._receive()

    def _receive(self) -> bool:
        """Take one message in; False when there is none."""
        try:
            notification = self._notify_socket.receive(self._child.pid if self._child else None)
            with notification:
                self._on_notification(notification)
        except BlockingIOError:
            return False
        except Refused as refused:
            self._complaints.complain(str(refused))
        return True

    def _on_notification(self, message: Notification) -> None:
        # sd_notify_barrier(3): the sender waits until its descriptor is closed, which it is when we
        # are done with the message. Nothing else may come with it.
        if message.says("BARRIER"):
            if len(message.assignments) != 1 or len(message.fds) != 1:
                raise Refused("refused a BARRIER=1 that did not come alone")
            return
        if message.says("FDSTORE") or message.says("FDSTOREREMOVE"):
            change_store(self._store, message, self._complaints)
        if message.fds:
            self._complaints.complain("closed descriptors that were not to be stored")
        self._change_state(message)

    def _tell_own_manager(self) -> None:
        """Whoever started us as a service waits for READY of us."""
        try:
            notify("READY=1", environment=self._manager)
        except OSError as error:
            say(f"our own service manager can't be told that we are ready: {error.strerror}")

    def _change_state(self, message: Notification) -> None:
        child = self._child
        assert child is not None  # a message is only taken from it
        now_s = time.monotonic()
        if message.says("READY") and not child.ready:
            if not self._ever_ready:
                self._tell_own_manager()
            child.ready = self._ever_ready = True
            self._starter.plan_spare(now_s)
            status = printable(message.assignments.get("STATUS", ""))
            say(
                f"PID {child.pid} ready after {child.lived_s:.2f} s{': ' if status else ''}{status}"
            )
        if message.says("WATCHDOG", "trigger"):
            self._abort("it said so itself")
        if message.says("STOPPING") and self._goal is Goal.RUN and not self._ending.begun:
            self._ping_due_s = None
            self._ending.begin()
        watched = child.ready and self._goal is Goal.RUN and not self._ending.begun
        heard = message.says("WATCHDOG") or (message.says("READY") and self._ping_due_s is None)
        if self._watchdog_s is not None and watched and heard:
            self._ping_due_s = now_s + self._watchdog_s
