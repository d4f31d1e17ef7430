"""Log lines: their set-up, the names of the shell's events, and a limit on what guests can cause.

Everything goes to stderr, one line each, through structlog; what libraries log goes the same way.
To the journal each line tells its priority.
Must not know what any event means. Names a device gives its events are in devices/base.py.
"""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Literal, TextIO, TypeAlias

import structlog

from vhostd.systemd import is_journal, with_priority

LogFormat: TypeAlias = Literal["json", "console"]
Processor: TypeAlias = Callable[[Any, str, MutableMapping[str, Any]], Any]


class LogEvent(StrEnum):
    """Names of the lines the daemon itself writes; the data is in the line's keys."""

    CONFIG_WRONG = "configuration_wrong"
    DAEMON_STARTED = "daemon_started"
    DAEMON_STOPPING = "daemon_stopping"
    DAEMON_STOPPED = "daemon_stopped"
    CONTROL_LISTENING = "control_listening"
    CONTROL_CONNECTION_FAILED = "control_connection_failed"
    CONTROL_CHANGE = "control_change"
    VM_LISTENING = "vm_listening"
    VM_CONNECTED = "vm_connected"
    VM_DISCONNECTED = "vm_disconnected"
    VM_STARTED = "vm_started"
    VM_STOPPED = "vm_stopped"
    GOAL_GIVEN_UP = "memory_goal_given_up"
    VM_NOT_STOPPED = "vm_not_stopped"
    VERDICT = "discard_verdict"
    MEMORY_UNSHARED = "memory_unshared"
    VM_BORROWED_MEMORY = "vm_memory_of_another_vm"
    MEMORY_LEFT_ALONE = "memory_left_alone"
    QMP_CONNECTED = "qmp_connected"
    QMP_DISCONNECTED = "qmp_disconnected"
    FRONTEND_ERROR = "frontend_error"
    CHANNEL_LOST = "config_change_channel_lost"
    QUEUE_QUARANTINED = "queue_quarantined"
    CHAIN_REJECTED = "chain_rejected"
    DISCARD_FAILED = "discard_failed"
    DEVICE_REFUSED = "device_refused"
    IMAGE_UNUSABLE = "image_unusable"
    IMAGE_NOT_LOCKED = "image_not_locked"
    IMAGE_NOT_MAPPED = "image_not_mapped"
    IMAGE_FAILED = "image_failed"
    IMAGE_REMOVED = "image_removed"
    IMAGE_NO_SPACE = "image_no_space"
    CACHE_DROPPED = "pmem_cache_dropped"
    HOST_ERROR = "host_error"
    NO_FD_STORE = "no_fd_store"
    NOT_KEPT = "vm_not_kept"
    TAKEN_OVER = "vm_taken_over"
    STATE_SET_ASIDE = "state_set_aside"
    VM_PAUSED = "vm_paused"
    WORKER_STUCK = "worker_stuck"
    WORKER_BACK = "worker_back"
    LINES_SUPPRESSED = "lines_suppressed"


_SHARED: Final[Sequence[Processor]] = (
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
)


def _without_debug(
    logger: object, method: str, line: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """A terminal is for operators: what only helps to mend the program is in JSON lines."""
    line.pop("debug", None)
    return line


def configure(
    log_format: LogFormat | None = None,
    *,
    stream: TextIO | None = None,
    level: int = logging.INFO,
) -> None:
    """Send all log lines to `stream` (stderr); None: console on a terminal, else json.

    Lines that go to the journal tell it their priority.
    """
    output = sys.stderr if stream is None else stream
    terminal = output.isatty()
    kind = log_format or ("console" if terminal else "json")
    # An exception becomes part of its line: a line is a record, also for a log collector.
    final: list[Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if kind == "json"
        else [_without_debug, structlog.dev.ConsoleRenderer(colors=terminal)]
    )
    if is_journal(output):
        final[-1] = _prefixed(final[-1])
    structlog.configure(
        processors=[*_SHARED, *final],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=output),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
            foreign_pre_chain=[*_SHARED, structlog.stdlib.add_logger_name],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))


def _prefixed(render: Processor) -> Processor:
    def with_prefix(logger: object, method: str, line: MutableMapping[str, Any]) -> str:
        level = str(line.get("level", method))
        return with_priority(level, str(render(logger, method, line)))

    return with_prefix


def get_logger(**fields: object) -> structlog.typing.FilteringBoundLogger:
    """A logger that adds `fields` (vm="web") to each of its lines."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(**fields)
    return logger


@dataclass(slots=True)
class _Window:
    opened_s: float
    suppressed: int = 0


class RateLimiter:
    """At most one line per interval for each key, such as (vm, queue, kind of event).

    Guests choose how often something happens, so what they can cause is logged through this. The
    latest keys_max keys are remembered, which bounds the memory; one that is forgotten may log.
    """

    def __init__(
        self, clock: Callable[[], float], *, interval_s: float = 1.0, keys_max: int = 4096
    ) -> None:
        self._clock = clock
        self._interval_s = interval_s
        self._keys_max = keys_max
        self._windows: OrderedDict[Hashable, _Window] = OrderedDict()

    def admit(self, key: Hashable) -> int | None:
        """May a line for `key` be written now?

        Returns:
            None if not (it is counted); else how many were suppressed since the last one.
        """
        now_s = self._clock()
        window = self._windows.get(key)
        if window is not None and now_s - window.opened_s < self._interval_s:
            window.suppressed += 1
            return None
        suppressed = 0 if window is None else window.suppressed
        self._windows[key] = _Window(now_s)
        self._windows.move_to_end(key)
        if len(self._windows) > self._keys_max:
            self._windows.popitem(last=False)
        return suppressed
