"""An image in another process' address space: found, and given back to the host page by page.

A page that a guest has used is mapped by its VMM, and the kernel keeps mapped pages whatever
fadvise(2) says. process_madvise(2) is its way to ask for them on the VMM's behalf, for which the
caller must be allowed to look into that process and have CAP_SYS_NICE. Source: madvise(2),
process_madvise(2), proc_pid_maps(5), proc_pid_smaps(5).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vhostd._native import Image, process_cool, process_page_out

_MAPS_LINE: Final = re.compile(
    rb"([0-9a-f]+)-([0-9a-f]+) \S{4} [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) (\d+)"
)


@dataclass(frozen=True, slots=True)
class MappedPart:
    """A mapping of the image: host-virtual address in that process, and bytes."""

    address: int
    size: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """What dropping the page cache came to; bytes, None where the kernel can't tell.

    Attributes:
        why_not_all: what stood in the way of the VMM's own pages, or None.
    """

    cached_before: int | None
    cached_after: int | None
    why_not_all: str | None


def drop_cache(image: Image, fd: int, identity: tuple[int, int], pid: int | None) -> Dropped:
    """Make the image durable and take its pages out of host memory; they come back when read.

    Args:
        fd: the image, open.
        identity: its st_dev and st_ino.
        pid: the VMM's, None: not known.

    Raises:
        OSError: it can't be made durable; nothing was dropped.
    """
    image.sync()  # the kernel drops clean pages only
    before = image.cache()
    why_not = _page_out(identity, pid)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    after = image.cache()
    return Dropped(
        None if before is None else before.cached, None if after is None else after.cached, why_not
    )


def _page_out(identity: tuple[int, int], pid: int | None) -> str | None:
    if pid is None:
        return "the VMM's process is not known"
    try:
        pidfd = os.pidfd_open(pid)
        try:
            for part in _parts(pid, identity):
                process_page_out(pidfd, part.address, part.size)
        finally:
            os.close(pidfd)
    except OSError as error:
        return _reason(pid, error)
    return None


def referenced_size(identity: tuple[int, int], pid: int) -> int:
    """Bytes of the image that the VMM's guest has used since mark_cold().

    Raises:
        OSError: we may not look into that process.
    """
    wanted = {(part.address, part.size) for part in _parts(pid, identity)}
    total, counting = 0, False
    for line in _lines(pid, "smaps"):
        if (found := _MAPS_LINE.match(line)) is not None:
            start, end = int(found[1], 16), int(found[2], 16)
            counting = (start, end - start) in wanted
        elif counting and line.startswith(b"Referenced:"):
            total += int(line.split()[1]) * 1024
    return total


def mark_cold(identity: tuple[int, int], pid: int) -> None:
    """Forget which pages were used, so that referenced_size() counts from now on.

    Raises:
        OSError: we may not advise that process.
    """
    pidfd = os.pidfd_open(pid)
    try:
        for part in _parts(pid, identity):
            process_cool(pidfd, part.address, part.size)
    finally:
        os.close(pidfd)


def _parts(pid: int, identity: tuple[int, int]) -> Iterator[MappedPart]:
    device = (os.major(identity[0]), os.minor(identity[0]))
    for line in _lines(pid, "maps"):
        found = _MAPS_LINE.match(line)
        if found is None:
            continue
        start, end, major, minor, inode = found.groups()
        if (int(major, 16), int(minor, 16)) == device and int(inode) == identity[1]:
            yield MappedPart(int(start, 16), int(end, 16) - int(start, 16))


def _lines(pid: int, name: str) -> list[bytes]:
    # Files of that process may have any name: it need be no text, and of all that could end a
    # line the kernel escapes the newline alone.
    return Path(f"/proc/{pid}/{name}").read_bytes().split(b"\n")


def _reason(pid: int, error: OSError) -> str:
    reason = os.strerror(error.errno or 0)
    if isinstance(error, PermissionError):
        reason += "; vhostd needs CAP_SYS_NICE and CAP_SYS_PTRACE for it"
    return f"pages in use by process {pid} stay: {reason}"
