"""An image that another process maps: its pages are given back, and its use is seen.

The other process is a VMM in all that matters: it maps the file shared and touches it.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from vhostd._native import Image
from vhostd.images.mapped import Dropped, drop_cache, mark_cold, referenced_size
from vhostd.units import MiB

SIZE = 16 * MiB
PAGE_SIZE = os.sysconf("SC_PAGESIZE")
ROOT = os.geteuid() == 0
UNPRIVILEGED = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--") if ROOT else ()

VMM = """
import mmap, os, sys
maps = []
for path in sys.argv[1:]:
    with open(os.fsencode(path), "r+b") as file:
        maps.append(mmap.mmap(file.fileno(), 0))
print("ready", flush=True)
for line in sys.stdin:
    verb, index, offset, size = line.split()
    at, end = int(offset), int(offset) + int(size)
    mapped = maps[int(index)]
    if verb == "write":
        mapped[at:end] = b"\\xa5" * (end - at)
        print("done", flush=True)
    else:
        print(mapped[at:end].count(b"\\xa5"), flush=True)
"""

DROP = """
import os, sys
from vhostd._native import Image
from vhostd.images.mapped import drop_cache
status = os.fstat(0)
dropped = drop_cache(Image(0), 0, (status.st_dev, status.st_ino), int(sys.argv[1]))
print(dropped.cached_before, dropped.cached_after, dropped.why_not_all)
"""


class Vmm:
    """A process that maps files, whole."""

    def __init__(self, *paths: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", VMM, *map(str, paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        assert self._answer() == "ready"

    def write(self, offset: int, size: int, index: int = 0) -> None:
        """Fill a part of the file."""
        assert self._ask(f"write {index} {offset} {size}") == "done"

    def is_filled(self, offset: int, size: int, index: int = 0) -> bool:
        """Whether the part is still as it was filled."""
        return int(self._ask(f"read {index} {offset} {size}")) == size

    def end(self) -> None:
        """Kill it."""
        with self._process:
            self._process.kill()

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@dataclass
class Disk:
    """An open image."""

    path: Path
    fd: int
    image: Image

    @property
    def identity(self) -> tuple[int, int]:
        status = os.fstat(self.fd)
        return status.st_dev, status.st_ino

    def drop(self, pid: int | None) -> Dropped:
        return drop_cache(self.image, self.fd, self.identity, pid)

    def cached(self) -> int:
        cache = self.image.cache()
        if cache is None:
            pytest.skip("this kernel can't tell the page cache of a file (Linux 6.5 can)")
        return cache.cached


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk0.img"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, SIZE)
    image = Image(fd)
    disk = Disk(path, fd, image)
    disk.cached()
    yield disk
    image.close()
    os.close(fd)


@pytest.fixture
def vmm(disk: Disk) -> Iterator[Vmm]:
    vmm = Vmm(disk.path)
    yield vmm
    vmm.end()


@pytest.fixture
def privileged() -> None:
    if not ROOT:
        pytest.skip("pages of another process are taken by root (CAP_SYS_NICE) only")


# -- given back ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("privileged")
def test_what_a_guest_used_is_written_and_given_back_and_comes_again(disk: Disk, vmm: Vmm) -> None:
    vmm.write(0, 8 * MiB)
    dropped = disk.drop(vmm.pid)
    assert dropped.cached_before is not None and dropped.cached_before >= 8 * MiB
    assert (dropped.cached_after, dropped.why_not_all) == (0, None)
    assert vmm.is_filled(0, 8 * MiB)
    assert disk.cached() >= 8 * MiB, "it was read from the disk"


def test_without_the_vmm_s_process_only_what_nobody_maps_goes(disk: Disk, vmm: Vmm) -> None:
    os.pwrite(disk.fd, b"x" * 4 * MiB, 8 * MiB)
    vmm.write(0, MiB)
    dropped = disk.drop(None)
    assert dropped.why_not_all == "the VMM's process is not known"
    assert dropped.cached_before is not None and dropped.cached_after is not None
    assert dropped.cached_before >= 5 * MiB
    assert MiB <= dropped.cached_after < 4 * MiB
    assert vmm.is_filled(0, MiB)


def test_a_process_that_ended_is_said_and_the_rest_goes_all_the_same(disk: Disk, vmm: Vmm) -> None:
    vmm.write(0, MiB)
    vmm.end()
    dropped = disk.drop(vmm.pid)
    assert dropped.why_not_all == f"pages in use by process {vmm.pid} stay: No such process"
    assert dropped.cached_after == 0


def test_without_leave_the_pages_in_use_stay_and_the_capabilities_are_named(
    disk: Disk, vmm: Vmm
) -> None:
    vmm.write(0, 2 * MiB)
    done = subprocess.run(
        [*UNPRIVILEGED, sys.executable, "-c", DROP, str(vmm.pid)],
        stdin=disk.fd,
        capture_output=True,
        text=True,
        check=True,
    )
    before, after, why = done.stdout.strip().split(" ", 2)
    assert int(before) >= int(after) >= 2 * MiB
    assert why.startswith(f"pages in use by process {vmm.pid} stay: ")
    assert why.endswith("; vhostd needs CAP_SYS_NICE and CAP_SYS_PTRACE for it")


@pytest.mark.usefixtures("privileged")
def test_nothing_is_dropped_of_what_can_t_be_made_durable(disk: Disk, vmm: Vmm) -> None:
    vmm.write(0, MiB)
    disk.image.fail(errno.EIO)
    before = disk.cached()
    with pytest.raises(OSError, match="Input/output error"):
        disk.drop(vmm.pid)
    assert disk.cached() == before >= MiB


@pytest.mark.usefixtures("privileged")
def test_other_files_of_the_vmm_are_left_alone(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "other.img"
    path.write_bytes(bytes(4 * MiB))
    vmm = Vmm(disk.path, path, disk.path)
    try:
        vmm.write(0, MiB, index=0)
        vmm.write(0, 4 * MiB, index=1)
        vmm.write(2 * MiB, MiB, index=2)
        assert disk.drop(vmm.pid).cached_after == 0
        with path.open("rb") as other:
            cache = (image := Image(other.fileno())).cache()
            image.close()
        assert cache is not None and cache.cached == 4 * MiB
    finally:
        vmm.end()


@pytest.mark.usefixtures("privileged")
@pytest.mark.parametrize("separator", ["\n", "\r", "\x0b", "\x0c", "\x85", "\u2028"])
def test_a_file_s_name_is_not_taken_for_a_mapping(
    disk: Disk, tmp_path: Path, separator: str
) -> None:
    """A VMM may map files of any name; bytes that are no text must hurt nobody either."""
    device, inode = disk.identity
    line = f"100000-200000 rw-s 0 {os.major(device):x}:{os.minor(device):x} {inode} "
    path = tmp_path / f"\udcff{separator}{line}"
    path.write_bytes(bytes(MiB))
    vmm = Vmm(path, disk.path)
    try:
        vmm.write(0, MiB, index=1)
        assert referenced_size(disk.identity, vmm.pid) >= MiB
        dropped = disk.drop(vmm.pid)
        assert (dropped.cached_after, dropped.why_not_all) == (0, None)
    finally:
        vmm.end()


# -- in use ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("privileged")
def test_what_a_guest_uses_is_seen_and_forgotten_and_seen_again(disk: Disk, vmm: Vmm) -> None:
    assert referenced_size(disk.identity, vmm.pid) == 0
    vmm.write(0, 4 * MiB)
    assert 4 * MiB <= referenced_size(disk.identity, vmm.pid) <= SIZE
    mark_cold(disk.identity, vmm.pid)
    assert referenced_size(disk.identity, vmm.pid) == 0
    assert vmm.is_filled(MiB, PAGE_SIZE)
    assert PAGE_SIZE <= referenced_size(disk.identity, vmm.pid) < 4 * MiB


@pytest.mark.usefixtures("privileged")
def test_the_same_pages_of_another_file_do_not_count(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "other.img"
    path.write_bytes(bytes(4 * MiB))
    vmm = Vmm(path, disk.path)
    try:
        vmm.write(0, 4 * MiB, index=0)
        assert referenced_size(disk.identity, vmm.pid) == 0
        mark_cold(disk.identity, vmm.pid)
        status = path.stat()
        assert referenced_size((status.st_dev, status.st_ino), vmm.pid) >= 4 * MiB
    finally:
        vmm.end()


def test_a_process_that_is_gone_is_an_error(disk: Disk, vmm: Vmm) -> None:
    vmm.end()
    with pytest.raises(OSError):
        referenced_size(disk.identity, vmm.pid)
    with pytest.raises(OSError):
        mark_cold(disk.identity, vmm.pid)
