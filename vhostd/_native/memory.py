"""Guest memory files and the dirty log, mapped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vhostd._native._core import ffi, lib
from vhostd._native.failure import check


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What a descriptor is of: st_dev, st_ino, st_size (bytes), the type that st_mode holds."""

    device: int
    inode: int
    size: int
    mode: int


def identify_file(fd: int) -> FileIdentity:
    """What fstat(2) says, of a descriptor of somebody else's; no file system is waited for.

    Raises:
        OSError: it is no descriptor, or the file system does not let us look.
    """
    found = ffi.new("struct vhd_file *")
    check(lib.vhd_file_identify(fd, found), "file")
    return FileIdentity(found.device, found.inode, found.size, found.mode)


class Mapping:
    """A guest memory file, mapped whole and shared.

    Args:
        fd: the file; duplicated.
        given_up_fd: what a predecessor's given_up_fd was, so that pages in the balloon are not
            forgotten; duplicated. -1: nothing is in the balloon.

    Raises:
        OSError: EOPNOTSUPP a file of neither shmem nor hugetlbfs, EINVAL a mere path, ENODATA an
            empty file, EACCES not open for reading and writing, EPROTO given_up_fd is none or of a
            file of another size, or what mmap(2) says.
    """

    def __init__(self, fd: int, given_up_fd: int = -1) -> None:
        error = ffi.new("int *")
        self.handle: Any = lib.vhd_mapping_create(fd, given_up_fd, error)
        if not self.handle:
            check(error[0], "guest memory")
        self.size: int = lib.vhd_mapping_size(self.handle)
        self.page_size: int = lib.vhd_mapping_page_size(self.handle)

    @property
    def given_up_pages(self) -> int:
        """4 KiB pages of the file that are in the balloon."""
        pages: int = lib.vhd_mapping_given_up_pages(self.handle)
        return pages

    @property
    def given_up_fd(self) -> int:
        """The memfd behind that, one bit for 4 KiB; stays ours."""
        fd: int = lib.vhd_mapping_given_up_fd(self.handle)
        return fd

    # Ranges below: bytes, in whole pages of the file. These calls may take long, without the GIL.

    def discard(self, offset: int, size: int) -> None:
        """Give a range back to the host.

        Raises:
            OSError: what fallocate(2) says.
        """
        check(lib.vhd_mapping_discard(self.handle, offset, size), "discard")

    def populate(self, offset: int, size: int) -> None:
        """Allocate a range's pages.

        Raises:
            OSError: ENOMEM, ENOSPC and the like; a part of it may be allocated then.
        """
        check(lib.vhd_mapping_populate(self.handle, offset, size), "populate")

    def next_data(self, offset: int, size: int) -> tuple[int, int] | None:
        """Offset and size of the first part of a range that has memory; None if nothing has.

        Raises:
            OSError: EOPNOTSUPP on hugetlbfs, which can't tell.
        """
        begin, end = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        result = lib.vhd_mapping_next_data(self.handle, offset, size, begin, end)
        if check(result, "look for memory") == 0:
            return None
        return begin[0], end[0] - begin[0]

    @property
    def resident_size(self) -> int:
        """Bytes of host memory the whole file takes up."""
        return check(lib.vhd_mapping_resident_size(self.handle), "resident size")

    def bind(self, offset: int, size: int, node: int) -> None:
        """Take a range's future pages from one host NUMA node, for all who map the file.

        Raises:
            OSError: EINVAL there is no such node.
        """
        check(lib.vhd_mapping_bind(self.handle, offset, size, node), f"bind to node {node}")

    def close(self) -> None:
        """Unmap it; no device may have it in its memory table. Twice is fine."""
        handle, self.handle = self.handle, ffi.NULL
        lib.vhd_mapping_destroy(handle)


@dataclass(frozen=True, slots=True)
class Region:
    """A slot of guest memory; all numbers in bytes.

    Attributes:
        preallocated: what the guest reports free in it stays.
    """

    guest_addr: int
    size: int
    file_offset: int
    mapping: Mapping
    preallocated: bool = False


class Log:
    """A dirty log, mapped: size bytes at offset of its file, one bit for 4 KiB of guest memory.

    Raises:
        OSError: EINVAL the file is shorter; or as for a Mapping.
    """

    def __init__(self, fd: int, size: int, offset: int) -> None:
        error = ffi.new("int *")
        self.handle: Any = lib.vhd_log_create(fd, size, offset, error)
        if not self.handle:
            check(error[0], "dirty log")

    def close(self) -> None:
        """Unmap it; no device may use it. Twice is fine."""
        handle, self.handle = self.handle, ffi.NULL
        lib.vhd_log_destroy(handle)
