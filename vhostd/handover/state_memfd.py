"""One VM's committed state, in a memfd that outlives the process. Must not know what it says.

Two slots take turns. A commit goes into the one that is not in force: its header is cleared, then
comes the payload, then the header with the next sequence number and a checksum over all of it. So
a writer that is killed between any two instructions leaves the other slot as it was, and a slot
that is not whole has either no sequence number or a checksum that does not fit.

Written with pwrite(2), not through a mapping: each step is done in the page cache when its call
returns, in this order whatever a compiler or CPU thinks, and a host without memory says so with an
error instead of SIGBUS. The page cache of a memfd is what any later reader sees; whether the writer
was killed meanwhile plays no part.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import zlib
from typing import Final, NamedTuple, Self

from vhostd.errors import HostError, VhostdError
from vhostd.fds import OwnedFd

VERSION: Final = 1
"""Of the layout below. The payload's own version is its writer's business."""

CAPACITY_MAX: Final = 1 << 28
"""Bytes; 1000 times what a VM of 1 TiB in blocks of 2 MiB needs for its bitmap."""

_MAGIC: Final = b"vhostdST"
_HEADER: Final = struct.Struct("<8sIIQI")  # magic, version, 0, capacity, CRC of what precedes
_SLOT_HEADER: Final = struct.Struct("<QII")  # sequence number, length, CRC; 0: not in use
_CHECKED: Final = struct.Struct("<QI")  # sequence number and length, as the CRC takes them in
_SLOTS_START: Final = 64
_ALIGNMENT: Final = 64  # a slot header lies within one cache line and one page
_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

assert _HEADER.size <= _SLOTS_START


class StateDamaged(VhostdError):
    """What should be a state memfd is none, or was changed by somebody else."""


class StateVersionUnknown(VhostdError):
    """A state memfd of a release that we cannot read; its VM must be left alone."""


class StateTooLarge(VhostdError):
    """The payload does not fit; nothing was changed. See StateMemfd.grown()."""


class _Slot(NamedTuple):
    number: int  # 0 or 1
    sequence: int
    payload: bytes


class StateMemfd:
    """Holds the last payload committed; it takes twice its capacity of memory from the start.

    One object at a time may write.

    Attributes:
        capacity: bytes of the largest payload.
        sequence: how many commits there were, 0 for none; grown() counts as one. Of two memfds of
            one VM, which a death amid an exchange leaves, the one with the higher is in force.
    """

    def __init__(self, fd: OwnedFd, capacity: int, last: _Slot | None) -> None:
        """For create() and adopt()."""
        self._fd = fd
        self.capacity = capacity
        self.sequence = 0 if last is None else last.sequence
        self._next_slot = 0 if last is None else 1 - last.number

    @classmethod
    def create(cls, name: str, capacity: int) -> Self:
        """Make an empty one.

        Args:
            name: shown in /proc/PID/fd, memfd_create(2).
            capacity: bytes, 1 to CAPACITY_MAX; it never changes, a larger one is another memfd.

        Raises:
            ValueError: no such capacity.
            HostError: the host has no memory for it. So no later write() can fail for want of it.
        """
        if not 0 < capacity <= CAPACITY_MAX:
            raise ValueError(f"capacity {capacity}")
        try:
            fd = OwnedFd(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            os.posix_fallocate(fd.fileno(), 0, _file_size(capacity))
            _write_at(fd, 0, _header(VERSION, capacity))
            fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            text = f"state of {name}: no memfd of {_file_size(capacity)} bytes: {error.strerror}"
            raise HostError(text) from error
        return cls(fd, capacity, None)

    @classmethod
    def adopt(cls, fd: OwnedFd) -> Self:
        """Take over one that a predecessor made.

        Args:
            fd: ours from here on; it is closed if we raise.

        Raises:
            StateDamaged: it is no state memfd, or its size or seals are not as create() left them,
                or there was a payload, and no slot has one that is whole.
            StateVersionUnknown: another release's.
        """
        try:
            capacity = _checked_capacity(fd)
            last = _in_force(fd, capacity)
        except OSError as error:
            fd.close()
            raise StateDamaged(f"state memfd cannot be read: {error.strerror}") from error
        except VhostdError:
            fd.close()
            raise
        return cls(fd, capacity, last)

    def fileno(self) -> int:
        """The descriptor, to be stored; it stays ours."""
        return self._fd.fileno()

    def close(self) -> None:
        """Let go of it; the state lives as long as somebody else has it open."""
        self._fd.close()

    def read(self) -> bytes | None:
        """The payload committed last; None before the first.

        A slot that is not whole counts as never committed: that is what a killed writer leaves.

        Raises:
            StateDamaged: as adopt().
        """
        slot = _in_force(self._fd, self.capacity)
        return None if slot is None else slot.payload

    def write(self, payload: bytes) -> None:
        """Commit: once this returns, read() gives `payload`, here and in any successor.

        Raises:
            StateTooLarge: it is longer than capacity; nothing was changed.
            HostError: the host does not let us write. The last payload stays committed.
        """
        if len(payload) > self.capacity:
            raise StateTooLarge(f"state of {len(payload)} bytes, there is room for {self.capacity}")
        self._commit(self.sequence + 1, payload)

    def grown(self, capacity: int) -> Self:
        """Another one with the same content and more room; the caller stores it, then forgets us.

        Raises:
            ValueError: the content does not fit, or no such capacity.
            StateDamaged: as read().
            HostError: as create().
        """
        payload = self.read()
        if payload is not None and len(payload) > capacity:
            raise ValueError(f"capacity {capacity} for {len(payload)} bytes")
        larger = type(self).create(_name_of(self._fd), capacity)
        if payload is not None:
            larger._commit(self.sequence + 1, payload)
        return larger

    def _commit(self, sequence: int, payload: bytes) -> None:
        start = _slot_start(self._next_slot, self.capacity)
        header = _SLOT_HEADER.pack(sequence, len(payload), _checksum(sequence, payload))
        try:
            _write_at(self._fd, start, bytes(_SLOT_HEADER.size))
            _write_at(self._fd, start + _SLOT_HEADER.size, payload)
            _write_at(self._fd, start, header)
        except OSError as error:
            raise HostError(f"state cannot be written: {error.strerror}") from error
        self.sequence, self._next_slot = sequence, 1 - self._next_slot


def _in_force(fd: OwnedFd, capacity: int) -> _Slot | None:
    """The slot with the last whole commit; None before the first. Raises StateDamaged."""
    used = False
    best: _Slot | None = None
    for number in range(2):
        start = _slot_start(number, capacity)
        header = os.pread(fd.fileno(), _SLOT_HEADER.size, start)
        sequence, length, checksum = _SLOT_HEADER.unpack(header)
        if sequence == 0:
            continue
        used = True
        if length > capacity or (best is not None and best.sequence >= sequence):
            continue
        payload = os.pread(fd.fileno(), length, start + _SLOT_HEADER.size)
        if _checksum(sequence, payload) == checksum:
            best = _Slot(number, sequence, payload)
    if best is None and used:
        raise StateDamaged("state memfd: no slot is whole")
    return best


def _header(version: int, capacity: int) -> bytes:
    checked = _HEADER.pack(_MAGIC, version, 0, capacity, 0)[: -struct.calcsize("<I")]
    return checked + struct.pack("<I", zlib.crc32(checked))


def _checksum(sequence: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(_CHECKED.pack(sequence, len(payload))))


def _slot_start(index: int, capacity: int) -> int:
    size = _SLOT_HEADER.size + capacity
    return _SLOTS_START + index * (-(-size // _ALIGNMENT) * _ALIGNMENT)


def _file_size(capacity: int) -> int:
    return _slot_start(2, capacity)


def _write_at(fd: OwnedFd, offset: int, data: bytes) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd.fileno(), data[done:], offset + done)


def _name_of(fd: OwnedFd) -> str:
    # proc_pid_fd(5) has it as "/memfd:NAME (deleted)".
    link = os.readlink(f"/proc/self/fd/{fd.fileno()}")  # noqa: PTH115  # a link to no path
    return link.removeprefix("/memfd:").removesuffix(" (deleted)")


def _checked_capacity(fd: OwnedFd) -> int:
    try:
        seals = fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise StateDamaged("state memfd: the descriptor is no memfd") from error
    if seals & _SEALS != _SEALS:
        raise StateDamaged(f"state memfd: seals {seals:#x} do not fix its size")
    data = os.pread(fd.fileno(), _HEADER.size, 0)
    if len(data) < _HEADER.size:
        raise StateDamaged(f"state memfd: {len(data)} bytes are no header")
    capacity: int
    magic, version, _, capacity, _ = _HEADER.unpack(data)
    if magic != _MAGIC:
        raise StateDamaged("state memfd: it does not begin as one")
    # Before the checksum: where that lies is this version's business.
    if version != VERSION:
        raise StateVersionUnknown(f"state memfd: version {version}, this release reads {VERSION}")
    if data != _header(version, capacity):
        raise StateDamaged("state memfd: its header is damaged")
    size = os.fstat(fd.fileno()).st_size
    if not 0 < capacity <= CAPACITY_MAX or size != _file_size(capacity):
        raise StateDamaged(f"state memfd: {size} bytes for a capacity of {capacity}")
    return capacity
