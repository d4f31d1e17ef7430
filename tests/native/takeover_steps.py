"""A thread of another process, driven with ptrace(2) to the places where a kill matters.

A place is where a kill leaves something behind that a kill before would not have: before and after
each system call, and after each instruction that changed what outlives the process. They are found
by going through the instructions of one process one by one, and reached in others, forked from the
same one, by breakpoints. x86-64 alone. Must not know what the thread does.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.native.rig import wait_until

PTRACE_PEEKTEXT, PTRACE_POKETEXT, PTRACE_SINGLESTEP = 1, 4, 9
PTRACE_GETREGS, PTRACE_SETREGS, PTRACE_SYSCALL = 12, 13, 24
PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
WALL = 0x40000000
SYSCALL_INSTRUCTION = b"\x0f\x05"
BREAKPOINT_INSTRUCTION = 0xCC
POLL, EPOLL_WAIT, EPOLL_PWAIT = 7, 232, 281
MINUS_ONE = 0xFFFFFFFF

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class Registers(ctypes.Structure):
    """struct user_regs_struct of x86-64, sys/user.h."""

    _fields_ = tuple(
        (name, ctypes.c_ulonglong)
        for name in (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx"),
            *("rdx", "rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base"),
            *("gs_base", "ds", "es", "fs", "gs"),
        )
    )


def _ptrace(request: int, task: int, data: int | None = None, at: int | None = None) -> None:
    if _libc.ptrace(request, task, at, data) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _sleeps(task: int) -> bool:
    """Whether a thread waits in one of the calls that wait for events."""
    call = Path(f"/proc/{task}/syscall").read_text().split()
    return call[0] in {str(POLL), str(EPOLL_WAIT), str(EPOLL_PWAIT)}


@dataclass(frozen=True, slots=True)
class Place:
    """Before an instruction is executed for the so-manieth time; 0: at the very beginning."""

    address: int
    time: int


class Stepper:
    """A stopped thread, that waited for events; its process is to be killed in the end."""

    def __init__(self, task: int, frozen: Sequence[int] = ()) -> None:
        """Stop it once it waits; frozen: others of its process, which stay where they are."""
        if platform.machine() != "x86_64":
            pytest.skip("knows the instructions of x86-64 alone")
        self._task = task
        self._frozen = frozen
        self._registers = Registers()
        for one in (task, *frozen):
            wait_until(partial(_sleeps, one))
            try:
                _ptrace(PTRACE_SEIZE, one)
            except PermissionError:
                pytest.skip("may not trace a process")
            _ptrace(PTRACE_INTERRUPT, one)
            self._wait(one)
        self._memory = os.open(f"/proc/{task}/mem", os.O_RDONLY)

    def bury(self) -> None:
        """Its process was killed: let it go."""
        os.close(self._memory)
        for one in (self._task, *self._frozen):
            _, status = os.waitpid(one, WALL)
            while os.WIFSTOPPED(status):
                _, status = os.waitpid(one, WALL)

    @staticmethod
    def _wait(task: int) -> None:
        _, status = os.waitpid(task, WALL)
        assert os.WIFSTOPPED(status), f"it ended: {status:#x}"
        assert os.WSTOPSIG(status) == signal.SIGTRAP, f"signal {os.WSTOPSIG(status)}"

    def _go(self, request: int) -> Registers:
        _ptrace(request, self._task)
        self._wait(self._task)
        return self._look()

    def _look(self) -> Registers:
        _ptrace(PTRACE_GETREGS, self._task, ctypes.addressof(self._registers))
        return self._registers

    def _before_call(self, registers: Registers) -> bool:
        return os.pread(self._memory, 2, registers.rip) == SYSCALL_INSTRUCTION

    @staticmethod
    def _waits(number: int, registers: Registers) -> bool:
        """Whether a system call is one that waits without a limit."""
        if number == POLL:
            return bool(registers.rdx & MINUS_ONE == MINUS_ONE)
        limit = registers.r10 & MINUS_ONE
        return number in (EPOLL_WAIT, EPOLL_PWAIT) and limit == MINUS_ONE

    # -- by instruction --------------------------------------------------------------------------

    def run_idle(self) -> None:
        """Let it go on until it is about to wait for events; what follows begins there."""
        while True:
            registers = self._go(PTRACE_SYSCALL)  # on its way in
            if self._waits(registers.orig_rax, registers):
                return
            self._go(PTRACE_SYSCALL)

    def record(
        self, look: Callable[[], bytes], done: Callable[[], bool], most: int | None = None
    ) -> list[Place]:
        """Find the places of what it has to do, which must be there already.

        Args:
            look: what outlives the process, as far as it is memory.
            done: whether it has done its work, so that waiting now is the end.
            most: stop at the last of so many.
        """
        places = [Place(0, 0)]
        if most == len(places):
            return places
        registers, seen = self._go(PTRACE_SYSCALL), look()  # it has waited
        places.append(Place(registers.rip, 1))
        passed: Counter[int] = Counter()
        before = self._before_call(registers)
        while most != len(places) and not (
            before and self._waits(registers.rax, registers) and done()
        ):
            passed[registers.rip] += 1
            after = before
            registers = self._go(PTRACE_SINGLESTEP)
            before = self._before_call(registers)
            now = look()
            if before or after or now != seen:
                places.append(Place(registers.rip, passed[registers.rip] + 1))
            seen = now
        return places

    def reach(self, place: Place, done: Callable[[], bool]) -> bool:
        """Go to a place that was recorded; False: it never came by, and is about to wait again.

        Others that run would end at the breakpoint.
        """
        if place.time == 0:
            return True
        registers = self._go(PTRACE_SYSCALL)  # it has waited
        left = place.time - (registers.rip == place.address)
        if left == 0:
            return True
        if registers.rip == place.address:
            self._go(PTRACE_SINGLESTEP)
        self._break_at(place.address)
        entering = True
        while True:
            registers = self._go(PTRACE_SYSCALL)
            if registers.rip == place.address + 1:
                left -= 1
                if left == 0:
                    return True
                self._step_over(place.address)
            elif entering and self._waits(registers.orig_rax, registers) and done():
                return False
            else:
                entering = not entering

    def _break_at(self, address: int) -> None:
        ctypes.set_errno(0)
        self._text = _libc.ptrace(PTRACE_PEEKTEXT, self._task, address, None)
        assert ctypes.get_errno() == 0
        _ptrace(PTRACE_POKETEXT, self._task, self._text & ~0xFF | BREAKPOINT_INSTRUCTION, address)

    def _step_over(self, address: int) -> None:
        """Execute what the breakpoint hides."""
        _ptrace(PTRACE_POKETEXT, self._task, self._text & (1 << 64) - 1, address)
        self._registers.rip = address
        _ptrace(PTRACE_SETREGS, self._task, ctypes.addressof(self._registers))
        self._go(PTRACE_SINGLESTEP)
        self._break_at(address)

    # -- by system call --------------------------------------------------------------------------

    def advance_calls(self, places: int, done: Callable[[], bool]) -> bool:
        """The same, stopping at system calls alone: for a thread with very many instructions."""
        while places:
            registers = self._go(PTRACE_SYSCALL)  # on its way in
            if self._waits(registers.orig_rax, registers) and done():
                return False
            places -= 1
            if places:
                self._go(PTRACE_SYSCALL)  # on its way out
                places -= 1
        return True
