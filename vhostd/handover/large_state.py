"""State of which a small part changes at a time: a memfd that is changed in place, never anew.

The change stands in the VM's record before it is made here. Whoever reads both makes the record's
changes once more: where the writer died before, between or after, the result is the same. Must not
know what the bytes mean.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from typing import Self, TypeAlias

from vhostd.errors import HostError
from vhostd.fds import OwnedFd
from vhostd.handover.state_memfd import StateDamaged

Change: TypeAlias = tuple[int, int, int]
"""First byte, how many, and what they become: 0 or 1."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class LargeMemfd:
    """One device's."""

    def __init__(self, fd: OwnedFd, size: int) -> None:
        """See create() and adopt()."""
        self._fd = fd
        self._size = size

    @classmethod
    def create(cls, name: str, content: bytes) -> Self:
        """A new one with this content. Raises HostError: no memory or descriptor for it."""
        try:
            fd = OwnedFd(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            os.ftruncate(fd.fileno(), len(content))
            if content.count(0) != len(content):  # else it takes up no memory yet
                _write_at(fd, content, 0)
            fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            raise HostError(error.errno, f"state cannot be kept: {error.strerror}") from error
        return cls(fd, len(content))

    @classmethod
    def adopt(cls, fd: OwnedFd) -> Self:
        """A predecessor's; fd is ours from here on. Raises StateDamaged: it is none."""
        try:
            if fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise StateDamaged("a device's kept state: its size is not fixed")
            return cls(fd, os.fstat(fd.fileno()).st_size)
        except OSError as error:
            raise StateDamaged("a device's kept state: the descriptor is no memfd") from error

    def fileno(self) -> int:
        """The descriptor, to be stored; it stays ours."""
        return self._fd.fileno()

    def close(self) -> None:
        """Let go of it."""
        self._fd.close()

    def read(self) -> bytes:
        """All of it. Raises StateDamaged: it can't be read."""
        content = os.pread(self._fd.fileno(), self._size, 0)
        if len(content) != self._size:
            raise StateDamaged(f"a device's kept state: {len(content)} of {self._size} bytes")
        return content

    def change(self, changes: Iterable[Change]) -> None:
        """Make them, in order.

        Raises:
            HostError: no memory for it.
            StateDamaged: one lies outside.
        """
        for first, count, value in changes:
            if not 0 <= first <= first + count <= self._size:
                raise StateDamaged(f"a change of {first}+{count} in {self._size} bytes")
            try:
                _write_at(self._fd, bytes([value]) * count, first)
            except OSError as error:
                raise HostError(error.errno, f"state cannot be kept: {error.strerror}") from error


def _write_at(fd: OwnedFd, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd.fileno(), data[done:], offset + done)
