"""How a service that was asked to end is made to: killed after a while, left behind after another.

A thread that waits in the kernel for a file system which never answers ends by no signal, and its
process does not end before it. After SIGKILL no instruction of that process runs any more, so its
successor need not wait. Must not know why a service is to end.
"""

from __future__ import annotations

import signal
import time
from typing import Final

from vhostd.keeper.child import Child
from vhostd.keeper.speech import say

LEAVE_TIMEOUT_S: Final = 2.0
"""From SIGKILL until a service is left behind; exiting takes longer only in the kernel."""


class Ending:
    """The deadlines of one service's end, on the monotonic clock."""

    def __init__(self, stop_timeout_s: float) -> None:
        """stop_timeout_s: from asking to SIGKILL."""
        self._stop_timeout_s = stop_timeout_s
        self._kill_at_s: float | None = None
        self._leave_at_s: float | None = None

    @property
    def begun(self) -> bool:
        """It has been asked to end, or said that it does."""
        return self.due_s is not None

    @property
    def due_s(self) -> float | None:
        """When on_deadline() has something to do; None: never."""
        return self._leave_at_s if self._kill_at_s is None else self._kill_at_s

    def begin(self) -> None:
        """It may take stop_timeout_s from now on."""
        self._kill_at_s = time.monotonic() + self._stop_timeout_s
        self._leave_at_s = None

    def over(self) -> None:
        """It has ended."""
        self._kill_at_s = self._leave_at_s = None

    def on_deadline(self, now_s: float, child: Child) -> bool:
        """Kill it if that is due; whether to go on without it."""
        if self._kill_at_s is not None and self._kill_at_s <= now_s:
            self._kill_at_s, self._leave_at_s = None, now_s + LEAVE_TIMEOUT_S
            say(f"PID {child.pid} has not ended after {self._stop_timeout_s} s: killed")
            child.send_signal(signal.SIGKILL)
        return self._leave_at_s is not None and self._leave_at_s <= now_s
