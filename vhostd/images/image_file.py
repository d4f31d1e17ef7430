"""An image on the host: opened with its lock, looked at, created. Knows files and their sizes."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vhostd.errors import VhostdError
from vhostd.fds import OwnedFd
from vhostd.images.locks import ImageInUse, LocksNotSupported, lock_image
from vhostd.units import MiB, format_size

PMEM_ALIGNMENT: Final = 2 * MiB
"""Linux maps persistent memory in sections of this size (drivers/nvdimm/pfn.h)."""

FILE_SIZE_MAX: Final = (1 << 63) - 1
"""What off_t holds."""

CREATE_MODE: Final = 0o660


class ImageUnusable(VhostdError):
    """The image can't be served; the text says which, why, and what to do."""


@dataclass(frozen=True, slots=True)
class OpenImage:
    """An image that is open and, where `locked`, locked.

    Attributes:
        witness: the same file opened once more: the kernel tells each open file of a write error
            once, so this one knows of those that a process learnt of which died before it said so.
        identity: st_dev and st_ino.
        file_size: bytes; may be more than the device shows.
        locked: False where the file system has no locks.
    """

    path: Path
    file: OwnedFd
    witness: OwnedFd
    identity: tuple[int, int]
    file_size: int
    locked: bool

    def close(self) -> None:
        """Close both; the lock goes with the last descriptor of the open file."""
        self.file.close()
        self.witness.close()


@dataclass(frozen=True, slots=True)
class ImageState:
    """What has become of an open image; bytes.

    Attributes:
        allocated: what it takes up on its file system.
        free: what that has left for us; None for a block device.
        removed: no name leads to it any more.
    """

    file_size: int
    allocated: int
    free: int | None
    removed: bool


def open_image(path: Path, size: int, *, readonly: bool) -> OpenImage:
    """Open and lock an image that is to be a device of `size` bytes.

    Raises:
        ImageUnusable: it is missing, no file or block device, too short, or in use.
    """
    access = os.O_RDONLY if readonly else os.O_RDWR
    try:
        # Without waiting: what is no image may be a pipe nobody writes to.
        file = OwnedFd(os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY))
    except FileNotFoundError as error:
        raise ImageUnusable(
            f"{path}: is not there; make it with: vhostctl pmem create {path} {size}"
        ) from error
    except OSError as error:
        what = "read" if readonly else "written"
        raise ImageUnusable(f"{path}: can't be opened to be {what}: {error.strerror}") from error
    try:
        return _checked(path, file, size, readonly=readonly)
    except OSError as error:
        file.close()
        raise ImageUnusable(f"{path}: can't be used: {error.strerror}") from error
    except BaseException:
        file.close()
        raise


def _checked(path: Path, file: OwnedFd, size: int, *, readonly: bool) -> OpenImage:
    status = os.fstat(file.fileno())
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise ImageUnusable(f"{path}: is neither a file nor a block device")
    file_size = os.lseek(file.fileno(), 0, os.SEEK_END)
    if file_size < size:
        raise ImageUnusable(
            f"{path}: has {file_size} bytes, the device is to have {size}; enlarge it with:"
            f" truncate -s {size} {path}, or lower size"
        )
    locked = True
    try:
        lock_image(file.fileno(), writable=not readonly)
    except ImageInUse as error:
        raise ImageUnusable(f"{path}: {error}; stop that, or use another image") from error
    except LocksNotSupported:
        locked = False
    identity = (status.st_dev, status.st_ino)
    return OpenImage(path, file, _open_again(file), identity, file_size, locked)


def _open_again(file: OwnedFd) -> OwnedFd:
    # By its number: the path may lead elsewhere by now.
    again = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_CLOEXEC)
    return OwnedFd(again)


def adopt_image(path: Path, file: OwnedFd, witness: OwnedFd | None) -> OpenImage:
    """An image that a predecessor had open, and locked if it can be.

    witness: its second descriptor; None: it died before anybody kept that, and before any sync.
    """
    status = os.fstat(file.fileno())
    return OpenImage(
        path,
        file,
        _open_again(file) if witness is None else witness,
        (status.st_dev, status.st_ino),
        os.lseek(file.fileno(), 0, os.SEEK_END),
        locked=True,
    )


def look_at(file: OwnedFd) -> ImageState:
    """What has become of it.

    Raises:
        OSError: the file system does not say.
    """
    status = os.fstat(file.fileno())
    block_device = stat.S_ISBLK(status.st_mode)
    size = os.lseek(file.fileno(), 0, os.SEEK_END)
    free = None
    if not block_device:
        filesystem = os.fstatvfs(file.fileno())
        free = filesystem.f_bavail * filesystem.f_frsize
    return ImageState(
        file_size=size,
        allocated=size if block_device else status.st_blocks * 512,
        free=free,
        removed=status.st_nlink == 0,
    )


def create_image(path: Path, size: int, *, preallocate: bool = False) -> None:
    """Make a raw image of zeroes, sparse unless told otherwise; durable on return.

    Raises:
        ImageUnusable: the size is none a guest can map, the file exists, or there is no room.
    """
    if size <= 0 or size % PMEM_ALIGNMENT:
        below = size // PMEM_ALIGNMENT * PMEM_ALIGNMENT
        next_sizes = f"sizes are {below} and" if below > 0 else "size is"
        raise ImageUnusable(
            f"{path}: {size} bytes are no multiple of {format_size(PMEM_ALIGNMENT)}, in which"
            f" guests map it; the next {next_sizes} {max(below, 0) + PMEM_ALIGNMENT}"
        )
    if size > FILE_SIZE_MAX:
        raise ImageUnusable(f"{path}: can't be made {size} bytes large: no file can be")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        file = OwnedFd(os.open(path, flags, CREATE_MODE))
    except OSError as error:
        raise ImageUnusable(f"{path}: can't be made: {error.strerror}") from error
    try:
        with file:
            os.ftruncate(file.fileno(), size)
            if preallocate:
                os.posix_fallocate(file.fileno(), 0, size)
            os.fsync(file.fileno())
        _sync_directory(path.absolute().parent)
    except OSError as error:
        path.unlink()
        reason = os.strerror(error.errno or errno.EIO)
        raise ImageUnusable(f"{path}: can't be made {size} bytes large: {reason}") from error


def _sync_directory(path: Path) -> None:
    """Make a new name durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
