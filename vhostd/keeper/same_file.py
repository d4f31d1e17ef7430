"""Are two descriptors the same open file? An order of open files answers it fast. Knows no store.

os.path.sameopenfile() compares inodes, and all eventfds of a host share one, as do all epolls: it
would take a guest's kick for its call. F_GETFL tells no two eventfds apart either. The kernel alone
knows, through kcmp(2), which moreover orders what it compares: a sorted list finds one among
thousands in a dozen calls. (F_DUPFD_QUERY is newer than Debian 12, and orders nothing.)
"""

from __future__ import annotations

import ctypes
import functools
import os
from bisect import bisect_left
from typing import Final

_KCMP_FILE: Final = 0  # include/uapi/linux/kcmp.h
_KCMP_NUMBERS: Final = {"x86_64": 312, "aarch64": 272, "riscv64": 272}
"""The system call's number, arch/x86/entry/syscalls/syscall_64.tbl and asm-generic/unistd.h."""

_LESS: Final = 1  # kcmp(2), "the return value": 0 equal, 1 less, 2 greater, 3 not equal, no order
_GREATER: Final = 2

_libc: Final = ctypes.CDLL(None, use_errno=True)


class Incomparable(Exception):
    """This kernel does not say (CONFIG_KCMP is off, or a seccomp filter forbids it)."""


def compare(one: int, other: int) -> int:
    """Order two descriptors of this process by what they have open; 0: the same open file.

    Raises:
        Incomparable: the kernel does not tell.
    """
    number = _KCMP_NUMBERS.get(os.uname().machine)
    if number is None:
        raise Incomparable
    pid = os.getpid()
    arguments = (pid, pid, _KCMP_FILE, one, other)
    result = _libc.syscall(ctypes.c_long(number), *(ctypes.c_long(value) for value in arguments))
    if result == 0:
        return 0
    if result == _LESS:
        return -1
    if result == _GREATER:
        return 1
    raise Incomparable


_key = functools.cmp_to_key(compare)


class OpenFiles:
    """A set of open files: descriptors, none of which is a duplicate of another.

    Where the kernel does not compare, nothing is ever taken for a duplicate: a descriptor kept
    twice costs a number, one wrongly dropped costs a guest.
    """

    def __init__(self) -> None:
        self._sorted: list[int] = []
        self._comparable = True

    def duplicate_of(self, fd: int) -> int | None:
        """The member that is the same open file as fd; else None, and fd is a member now."""
        if not self._comparable:
            return None
        try:
            position = bisect_left(self._sorted, _key(fd), key=_key)
            if position < len(self._sorted) and compare(self._sorted[position], fd) == 0:
                return self._sorted[position]
        except Incomparable:
            self._comparable = False
            self._sorted.clear()
            return None
        self._sorted.insert(position, fd)
        return None

    def discard(self, fd: int) -> None:
        """Leave it out; call it before fd is closed, when its number may come to mean another."""
        if self._comparable:
            self._sorted.remove(fd)
