"""Guest RAM as a VMM builds it: a shared file, cut into regions with holes between them.

Addresses are guest-physical unless named frontend_addr. Knows the file and its pages; knows no
message, ring or device.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.fakes.messages import WireRegion

MIB = 1 << 20
PAGE_SIZE = 4096
FRONTEND_BASE = 0x7E00_0000_0000  # where this front end says it mapped the file
BLOCK_SIZE = 512  # st_blocks counts these whatever the file system's block

_RESERVE = Path("/proc/sys/vm/nr_hugepages")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


@dataclass(frozen=True, slots=True)
class Region:
    """A contiguous piece of guest RAM; file_offset says where it lies in the file."""

    guest_addr: int
    size: int
    file_offset: int

    @property
    def end(self) -> int:
        """First guest address behind the region."""
        return self.guest_addr + self.size


def open_memfd(size: int, name: str = "ram") -> int:
    """Return a memfd of size bytes, all holes."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


def open_hugetlb(size: int, name: str = "huge") -> int:
    """Return a memfd of 2 MiB pages.

    Raises:
        OSError: ENOMEM when the host has not set enough of them aside.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    try:
        os.ftruncate(fd, size)
        os.posix_fallocate(fd, 0, size)  # reserve now: a later fault would be SIGBUS
    except OSError as error:
        os.close(fd)
        if error.errno == errno.ENOSPC:
            raise OSError(errno.ENOMEM, "not enough huge pages") from error
        raise
    return fd


@contextmanager
def huge_pages(count: int) -> Iterator[None]:
    """Have so many pages of 2 MiB more set aside; skips the test where that can't be."""
    before = int(_RESERVE.read_text())
    try:
        _RESERVE.write_text(str(before + count))
    except OSError as error:
        if before < count:
            pytest.skip(f"no huge pages set aside, and {_RESERVE} says {error.strerror}")
    try:
        yield
    finally:
        if int(_RESERVE.read_text()) != before:
            _RESERVE.write_text(str(before))


def open_file(size: int, folder: str = "/dev/shm") -> int:
    """Return an unnamed file of size bytes in folder, tmpfs by default."""
    fd, path = tempfile.mkstemp(dir=folder)
    os.unlink(path)  # noqa: PTH108 - a plain string comes from mkstemp
    os.ftruncate(fd, size)
    return fd


class GuestMemory:
    """A file and the guest's view of it."""

    def __init__(self, fd: int, regions: Sequence[Region]) -> None:
        """Take ownership of fd and map it whole."""
        self.fd = fd
        self.regions = tuple(sorted(regions, key=lambda region: region.guest_addr))
        self.file_size = os.fstat(fd).st_size
        self._map = mmap.mmap(fd, self.file_size, mmap.MAP_SHARED)
        self.host_addr = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._next_free = 0

    @classmethod
    def flat(cls, size: int = 64 * MIB, guest_addr: int = 0) -> GuestMemory:
        """One region, one memfd."""
        return cls(open_memfd(size), [Region(guest_addr, size, 0)])

    @classmethod
    def with_hole(
        cls, size: int = 64 * MIB, hole_addr: int = 32 * MIB, hole_size: int = 16 * MIB
    ) -> GuestMemory:
        """Two regions of one memfd with a gap in guest-physical space, as at a PC's 4 GiB."""
        low = Region(0, hole_addr, 0)
        high = Region(hole_addr + hole_size, size - hole_addr, hole_addr)
        return cls(open_memfd(size), [low, high])

    @classmethod
    def adjacent(cls, size: int = 64 * MIB, seam_addr: int = 32 * MIB) -> GuestMemory:
        """Two regions that touch in guest-physical space, in swapped order in the file."""
        low = Region(0, seam_addr, size - seam_addr)
        high = Region(seam_addr, size - seam_addr, 0)
        return cls(open_memfd(size), [low, high])

    def __enter__(self) -> Self:
        """Return the memory itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Unmap and close."""
        self.close()

    def close(self) -> None:
        """Unmap and close the file; twice is fine."""
        if self.fd >= 0:
            self._map.close()
            os.close(self.fd)
            self.fd = -1

    # -- addresses ---------------------------------------------------------------------------

    def region_of(self, guest_addr: int) -> Region:
        """Return the region that holds guest_addr.

        Raises:
            KeyError: no region does.
        """
        for region in self.regions:
            if region.guest_addr <= guest_addr < region.end:
                return region
        raise KeyError(hex(guest_addr))

    def file_offset(self, guest_addr: int) -> int:
        """Return where guest_addr lies in the file."""
        region = self.region_of(guest_addr)
        return region.file_offset + guest_addr - region.guest_addr

    def frontend_addr(self, guest_addr: int) -> int:
        """Return where this front end says guest_addr is mapped in its own address space."""
        return FRONTEND_BASE + self.file_offset(guest_addr)

    def wire_regions(self, *, guest_addresses: bool = False) -> tuple[WireRegion, ...]:
        """Describe the regions for SET_MEM_TABLE; guest_addresses as GPA_ADDRESSES demands."""
        return tuple(
            WireRegion(
                region.guest_addr,
                region.size,
                region.guest_addr if guest_addresses else FRONTEND_BASE + region.file_offset,
                region.file_offset,
            )
            for region in self.regions
        )

    def allocate(self, size: int, alignment: int = 16, start: int = MIB) -> int:
        """Hand out zeroed guest RAM from start upwards; never given back."""
        address = max(self._next_free, start)
        address = (address + alignment - 1) // alignment * alignment
        assert address + size <= self.region_of(address).end, "guest RAM exhausted"
        self._next_free = address + size
        self.write(address, bytes(size))
        return address

    # -- bytes -------------------------------------------------------------------------------

    def read(self, guest_addr: int, size: int) -> bytes:
        """Return guest bytes; the range must lie in one region."""
        offset = self._offset_of_range(guest_addr, size)
        return self._map[offset : offset + size]

    def write(self, guest_addr: int, data: bytes) -> None:
        """Store guest bytes; the range must lie in one region."""
        offset = self._offset_of_range(guest_addr, len(data))
        self._map[offset : offset + len(data)] = data

    def read_number(self, guest_addr: int, size: int) -> int:
        """Return a little-endian number of size bytes."""
        return int.from_bytes(self.read(guest_addr, size), "little")

    def write_number(self, guest_addr: int, value: int, size: int) -> None:
        """Store a little-endian number of size bytes; higher bits are cut off."""
        self.write(guest_addr, (value % (1 << 8 * size)).to_bytes(size, "little"))

    def touch(self, guest_addr: int, size: int, fill: int = 0xA5) -> None:
        """Make every page of the range present by writing fill to all of it."""
        self.write(guest_addr, bytes([fill]) * size)

    def _offset_of_range(self, guest_addr: int, size: int) -> int:
        region = self.region_of(guest_addr)
        assert guest_addr + size <= region.end, "the range leaves its region"
        return region.file_offset + guest_addr - region.guest_addr

    # -- pages -------------------------------------------------------------------------------

    def blocks(self) -> int:
        """Return how many bytes of the file are allocated."""
        return os.fstat(self.fd).st_blocks * BLOCK_SIZE

    def page_present(self, guest_addr: int) -> bool:
        """Return whether the page that holds guest_addr is allocated in the file."""
        return self.pages_present(guest_addr, 1) == 1

    def pages_present(self, guest_addr: int, pages: int) -> int:
        """Count the allocated pages of a range of 4 KiB pages; it must lie in one region."""
        offset = self._offset_of_range(guest_addr, pages * PAGE_SIZE) // PAGE_SIZE * PAGE_SIZE
        states = ctypes.create_string_buffer(pages)
        size = pages * PAGE_SIZE
        if _libc.mincore(self.host_addr + offset, size, states) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return sum(state & 1 for state in states.raw)
