"""A daemon's main thread, driven from system call to system call while it handles one request.

x86-64 alone. Must not know what is handled.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from tests.native.takeover_steps import EPOLL_PWAIT, EPOLL_WAIT, PTRACE_SYSCALL, Stepper, _ptrace

PTRACE_DETACH = 17
CALLS_MOST = 20_000  # of one request; more is a loop without end


class CallStepper(Stepper):
    """A stopped main thread; it slept for events when it was stopped.

    Attributes:
        woken: it has handled an event since.
        passed: places it went by: each system call's entry and its exit.
        where: the place it is at.
    """

    def __init__(self, task: int) -> None:
        super().__init__(task)
        self.woken = False
        self.passed = 0
        self.where = ""

    def advance(self, places: int | None, done: Callable[[], bool]) -> bool:
        """Let it go on to a place, None: to the end; whether it came that far.

        Args:
            places: how many it may go by; it is stopped at the next one.
            done: the request was handled, so that waiting for events now is the end.
        """
        while self.passed <= 2 * CALLS_MOST:
            registers = self._go(PTRACE_SYSCALL)  # on its way in
            polls = registers.orig_rax in (EPOLL_WAIT, EPOLL_PWAIT)
            if polls and registers.r10 & 0xFFFF_FFFF != 0 and done():
                return False
            self.where = f"before system call {registers.orig_rax}"
            if self.passed == places:
                return True
            self.passed += 1
            registers = self._go(PTRACE_SYSCALL)  # on its way out
            self.where = f"after system call {registers.orig_rax}"
            self.woken |= polls and 0 < registers.rax < 1 << 31
            if self.passed == places:
                return True
            self.passed += 1
        raise AssertionError(f"not done after {CALLS_MOST} system calls")

    def release(self) -> None:
        """Let it run on by itself."""
        os.close(self._memory)
        _ptrace(PTRACE_DETACH, self._task)
