"""A file that is a guest's persistent memory: made durable, and its page cache seen."""

from __future__ import annotations

import errno
from typing import Any, Final

from vhostd._native._core import ffi, lib
from vhostd._native.failure import check
from vhostd._native.values import ImageCache, ImageStatistics

_NO_CACHESTAT: Final = (-errno.ENOSYS, -errno.EOPNOTSUPP, -errno.EPERM)
"""Too old a kernel, a file that has no such cache, a sandbox that does not know the call."""


class Image:
    """An open regular file or block device; descriptors are duplicated.

    Args:
        fd: it; the same open file for a successor too.
        witness_fd: the same file, opened a second time (not duplicated) before the first sync, and
            used for nothing else: a write error that a predecessor was told of as it died is told
            to this one again. -1: such an error is lost.
        shared_fd: what a predecessor's shared_fd was; -1: a new one.

    Raises:
        OSError: EINVAL it is neither, or witness_fd is another file; EPROTO shared_fd is not such
            a memfd; or no memory or descriptor for it.
    """

    def __init__(self, fd: int, witness_fd: int = -1, shared_fd: int = -1) -> None:
        error = ffi.new("int *")
        self.handle: Any = lib.vhd_image_create(fd, witness_fd, shared_fd, error)
        if not self.handle:
            check(error[0], "image")

    def close(self) -> None:
        """Let go of it; a sync that is under way keeps it open until it ends. Twice is fine."""
        handle, self.handle = self.handle, ffi.NULL
        lib.vhd_image_release(handle)

    @property
    def shared_fd(self) -> int:
        """The memfd behind its statistics and its failure; stays ours."""
        fd: int = lib.vhd_image_shared_fd(self.handle)
        return fd

    def statistics(self) -> ImageStatistics:
        """What its syncs came to."""
        raw = lib.vhd_image_shared(self.handle)
        return ImageStatistics(
            raw.failed_errno, raw.syncs, raw.sync_ns, raw.sync_ns_last, raw.sync_ns_max
        )

    def fail(self, error: int) -> None:
        """Declare it failed, with an errno, unless it is already."""
        lib.vhd_image_fail(self.handle, error)

    # These may take as long as the storage likes, without the GIL.

    def sync(self) -> None:
        """Make all that was written durable.

        Raises:
            OSError: it failed, or an earlier sync did and that was not cleared.
        """
        check(lib.vhd_image_sync(self.handle), "sync")

    def clear(self) -> None:
        """Forget that a sync failed, once the one under way is over."""
        lib.vhd_image_clear(self.handle)

    def wait_alone(self) -> None:
        """Wait until no device has it and no worker syncs it any more."""
        lib.vhd_image_wait_alone(self.handle)

    def write_back(self) -> None:
        """Begin to write dirty pages, without waiting for them.

        Raises:
            OSError: what sync_file_range(2) says.
        """
        check(lib.vhd_image_write_back(self.handle), "write back")

    def cache(self) -> ImageCache | None:
        """Its page cache; None where the kernel can't tell (before Linux 6.5).

        Raises:
            OSError: what cachestat(2) says.
        """
        raw = ffi.new("struct vhd_image_cache *")
        result = lib.vhd_image_cache(self.handle, raw)
        if result in _NO_CACHESTAT:
            return None
        check(result, "page cache")
        return ImageCache(raw.cached, raw.dirty, raw.writeback)


# Other processes: what process_madvise(2) does needs the right to look into them and CAP_SYS_NICE.


def process_page_out(pidfd: int, address: int, size: int) -> None:
    """Take pages of a process (its address, bytes) out of host memory; dirty ones stay.

    Raises:
        OSError: EPERM we may not, ENOMEM it has no memory there, ESRCH it has ended.
    """
    check(lib.vhd_process_page_out(pidfd, address, size), "page out")


def process_cool(pidfd: int, address: int, size: int) -> None:
    """Forget that pages of a process were used.

    Raises:
        OSError: as process_page_out().
    """
    check(lib.vhd_process_cool(pidfd, address, size), "cool")
