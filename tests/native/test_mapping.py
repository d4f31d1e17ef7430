"""Which files become guest memory, and what mapping one costs."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vhostd._native import Handler, Mapping

from tests.fakes.memory import MIB, PAGE_SIZE, GuestMemory, open_file, open_memfd
from tests.native.rig import DATA_ADDR, Guest, Host, pages_at

TIB = 1 << 40
RESIDENT_GROWTH_MAX_KIB = 512


@contextmanager
def mapped(fd: int) -> Iterator[Mapping]:
    """A mapping of fd's file; fd is closed at once, as a mapping must not need it."""
    mapping = Mapping(fd)
    os.close(fd)
    try:
        yield mapping
    finally:
        mapping.close()


def sealed_memfd() -> int:
    """A memory file nobody may write to."""
    fd = open_memfd(MIB)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    return fd


def path_only() -> int:
    """A descriptor that names a memory file and opens nothing."""
    fd = open_memfd(MIB)
    named = os.open(f"/proc/self/fd/{fd}", os.O_PATH)
    os.close(fd)
    return named


NOT_MEMORY: dict[str, tuple[Callable[[], int], int]] = {
    "a directory": (lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY), errno.EACCES),
    "a character device": (lambda: os.open("/dev/null", os.O_RDWR), errno.EOPNOTSUPP),
    "a file of procfs": (lambda: os.open("/proc/self/mem", os.O_RDWR), errno.EOPNOTSUPP),
    "a file on a disk": (lambda: open_file(MIB, str(Path(__file__).parent)), errno.EOPNOTSUPP),
    "an empty file": (lambda: open_memfd(0), errno.ENODATA),
    "an eventfd": (lambda: os.eventfd(0), errno.EOPNOTSUPP),
    "a path": (path_only, errno.EINVAL),
    "write-only": (lambda: os.open("/dev/shm", os.O_TMPFILE | os.O_WRONLY), errno.EACCES),
    "a sealed file": (sealed_memfd, errno.EPERM),
}


@pytest.mark.parametrize(("make", "code"), NOT_MEMORY.values(), ids=NOT_MEMORY.keys())
def test_what_cannot_be_guest_memory_is_refused_and_not_kept(
    make: Callable[[], int], code: int
) -> None:
    fd = make()
    open_before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - only their number matters
    with pytest.raises(OSError, match="guest memory") as refused:
        Mapping(fd)
    assert refused.value.errno == code
    assert len(os.listdir("/proc/self/fd")) == open_before  # noqa: PTH208
    os.close(fd)


def test_a_closed_descriptor_is_refused() -> None:
    fd = open_memfd(MIB)
    os.close(fd)
    with pytest.raises(OSError, match="guest memory") as refused:
        Mapping(fd)
    assert refused.value.errno == errno.EBADF


def test_memfds_and_files_of_tmpfs_are_guest_memory() -> None:
    with mapped(open_memfd(MIB)) as memfd, mapped(open_file(MIB)) as tmpfs:
        assert (memfd.size, memfd.page_size) == (MIB, PAGE_SIZE)
        assert (tmpfs.size, tmpfs.page_size) == (MIB, PAGE_SIZE)


def test_a_file_that_ends_inside_a_page_is_mapped_to_its_end() -> None:
    with mapped(open_memfd(MIB + 1)) as mapping:
        assert mapping.size == MIB + 1


def test_a_terabyte_costs_nothing_until_it_is_used() -> None:
    def resident_kib() -> int:
        status = Path("/proc/self/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
        return int(line.split()[1])

    before = resident_kib()
    with mapped(open_memfd(4 * TIB)) as mapping:
        assert mapping.given_up_pages == 0
        assert resident_kib() - before < RESIDENT_GROWTH_MAX_KIB


def test_guest_memory_is_in_no_core_dump_and_no_child() -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(MIB)
        inode = os.fstat(file.fileno()).st_ino
        with mapped(os.dup(file.fileno())):
            flags: list[str] = []
            ours = False
            for line in Path("/proc/self/smaps").read_text().splitlines():
                if "-" in line.split()[0] and not line.split()[0].endswith(":"):
                    ours = line.split()[4] == str(inode)
                elif ours and line.startswith("VmFlags:"):
                    flags += line.split()[1:]
    assert {"dd", "dc"} <= set(flags)  # dontdump, dontcopy (proc_pid_smaps(5))


def test_the_pages_of_two_devices_are_counted_by_file(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE)
        ring.send_pfns(pages_at(DATA_ADDR, 100))
        ring.send_pfns(pages_at(DATA_ADDR + 50 * PAGE_SIZE, 100))
        assert guest.mapping.given_up_pages == 150
        with host.parked():
            guest.device.balloon_reset()
        assert guest.mapping.given_up_pages == 0
