"""Run a program for which ptrace(2) knows no extended processor state: `PROGRAM ARGUMENT...`.

User Mode Linux before 6.13 has no room for the state of processors with AMX, and its first process
dies ("ptrace set fp regs failed"). Without PTRACE_GETREGSET it does with what x86-64 always has.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

PR_SET_NO_NEW_PRIVS = 38
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW = 0x7FFF_0000
SECCOMP_RET_ERRNO = 0x0005_0000
ENODEV = 19
LOAD_WORD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06  # of linux/bpf_common.h
PTRACE = 101  # of x86-64's system calls
REGSETS = (0x4204, 0x4205)  # PTRACE_GETREGSET, PTRACE_SETREGSET
NUMBER_OFFSET, FIRST_ARGUMENT_OFFSET = 0, 16  # in struct seccomp_data


def _instruction(code: int, value: int, on_true: int = 0, on_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, on_true, on_false, value)


def forbid_regsets() -> None:
    """Have them fail in this process and all that it starts.

    Raises:
        OSError: the kernel has no seccomp filters.
    """
    program = b"".join(
        (
            _instruction(LOAD_WORD, NUMBER_OFFSET),
            _instruction(JUMP_EQUAL, PTRACE, 0, 4),
            _instruction(LOAD_WORD, FIRST_ARGUMENT_OFFSET),
            _instruction(JUMP_EQUAL, REGSETS[0], 1, 0),
            _instruction(JUMP_EQUAL, REGSETS[1], 0, 1),
            _instruction(RETURN, SECCOMP_RET_ERRNO | ENODEV),
            _instruction(RETURN, SECCOMP_RET_ALLOW),
        )
    )
    code = ctypes.create_string_buffer(program)
    header = struct.pack("@HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(header), 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    forbid_regsets()
    os.execv(sys.argv[1], sys.argv[1:])
