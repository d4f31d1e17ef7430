"""Ranges of a memory file, given back, filled ahead and looked at, with the pages as witness."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vhostd._native import Mapping

from tests.fakes.memory import (
    MIB,
    PAGE_SIZE,
    GuestMemory,
    Region,
    open_file,
    open_hugetlb,
    open_memfd,
)

PAGES = 64
SIZE = PAGES * PAGE_SIZE
LAST = PAGES - 1
HUGE = 2 * MIB
HUGE_PAGES = 4
RESERVE = Path("/proc/sys/vm/nr_hugepages")
RESERVED = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
USED_UP_MAX = 64
F_SEAL_FUTURE_WRITE = 0x10  # include/uapi/linux/fcntl.h
NODES_MAX = 1024
NO_NODE = NODES_MAX - 1
NOT_ALLOWED = (errno.EPERM, errno.ENOSYS)  # what a container says of mbind(2)


class Window:
    """A memory file as a guest and as the host sees it, in pages."""

    def __init__(self, fd: int, page_size: int = PAGE_SIZE) -> None:
        """Take ownership of the file."""
        size = os.fstat(fd).st_size
        self.page_size = page_size
        self.memory = GuestMemory(fd, [Region(0, size, 0)])
        self.mapping = Mapping(fd)

    def close(self) -> None:
        """Unmap and close."""
        self.mapping.close()
        self.memory.close()

    def touch(self, first: int, count: int = 1) -> None:
        """Write all of some pages, each in its own way."""
        for page in range(first, first + count):
            self.memory.touch(page * self.page_size, self.page_size, page % 255 + 1)

    def present(self) -> list[int]:
        """Which pages are in the file."""
        return [
            page
            for page in range(self.memory.file_size // PAGE_SIZE)
            if self.memory.page_present(page * PAGE_SIZE)
        ]

    def kept(self, page: int) -> bool:
        """Whether a page holds what touch() wrote."""
        content = self.memory.read(page * self.page_size, self.page_size)
        return content == bytes([page % 255 + 1]) * self.page_size

    def discard(self, first: int, count: int) -> None:
        """The same in pages."""
        self.mapping.discard(first * self.page_size, count * self.page_size)

    def populate(self, first: int, count: int) -> None:
        """The same in pages."""
        self.mapping.populate(first * self.page_size, count * self.page_size)

    def next_data(self, first: int, count: int) -> tuple[int, int] | None:
        """The same in pages."""
        found = self.mapping.next_data(first * self.page_size, count * self.page_size)
        return found and (found[0] // self.page_size, found[1] // self.page_size)


@pytest.fixture(params=[open_memfd, open_file], ids=["memfd", "tmpfs"])
def window(request: pytest.FixtureRequest) -> Iterator[Window]:
    """An empty file of 64 pages."""
    make: Callable[[int], int] = request.param
    made = Window(make(SIZE))
    yield made
    made.close()


@pytest.fixture
def huge() -> Iterator[Window]:
    """Four huge pages, all there; as root they are set aside for the time of the test."""
    before = int(RESERVE.read_text())
    try:
        RESERVE.write_text(str(before + HUGE_PAGES))
    except OSError as error:
        if before < HUGE_PAGES:
            pytest.skip(f"no huge pages set aside, and {RESERVE} says {error.strerror}")
    try:
        try:
            made = Window(open_hugetlb(HUGE_PAGES * HUGE), HUGE)
        except OSError as error:
            pytest.skip(f"no {HUGE_PAGES} huge pages: {error.strerror}")
        yield made
        made.close()
    finally:
        if int(RESERVE.read_text()) != before:
            RESERVE.write_text(str(before))


# -- giving back ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "count"), [(0, 1), (LAST, 1), (0, PAGES), (7, 1), (7, 20), (1, PAGES - 2)]
)
def test_discard_takes_just_the_pages_of_its_range(window: Window, first: int, count: int) -> None:
    window.touch(0, PAGES)
    window.discard(first, count)
    rest = [page for page in range(PAGES) if not first <= page < first + count]
    assert window.present() == rest
    assert all(window.kept(page) for page in rest)
    assert window.memory.read(first * PAGE_SIZE, count * PAGE_SIZE) == bytes(count * PAGE_SIZE)
    assert os.fstat(window.memory.fd).st_size == SIZE


def test_discard_of_what_is_not_there_is_nothing(window: Window) -> None:
    window.touch(5)
    for _ in range(2):
        window.discard(6, PAGES - 6)
    assert window.present() == [5]


def test_discard_says_what_the_kernel_says() -> None:
    window = Window(open_memfd(SIZE))
    try:
        window.touch(0, 2)
        fcntl.fcntl(window.memory.fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
        with pytest.raises(OSError, match="discard") as refused:
            window.discard(0, 1)
        assert refused.value.errno == errno.EPERM
        assert window.present() == [0, 1]
    finally:
        window.close()


# -- filling ahead -------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "count"), [(0, 1), (LAST, 1), (0, PAGES), (3, 8)])
def test_populate_takes_memory_for_its_range_alone(window: Window, first: int, count: int) -> None:
    window.populate(first, count)
    assert window.memory.blocks() == count * PAGE_SIZE
    assert os.fstat(window.memory.fd).st_size == SIZE
    # The range has its memory: using it takes no more; using its neighbours does.
    window.touch(first, count)
    assert window.memory.blocks() == count * PAGE_SIZE
    assert window.present() == list(range(first, first + count))


def test_populate_leaves_what_is_there(window: Window) -> None:
    window.touch(2, 3)
    window.populate(0, 8)
    assert all(window.kept(page) for page in (2, 3, 4))
    assert window.memory.read(0, 2 * PAGE_SIZE) == bytes(2 * PAGE_SIZE)
    assert window.memory.blocks() == 8 * PAGE_SIZE
    window.discard(0, 8)
    assert window.memory.blocks() == 0


def test_populate_costs_this_process_nothing(window: Window) -> None:
    before = mapped_kib()
    window.populate(0, PAGES)
    assert mapped_kib() == before


def mapped_kib() -> int:
    """Shared memory in the page tables of this process."""
    (line,) = re.findall(r"RssShmem:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line)


# -- looking -------------------------------------------------------------------------------------

LOOKS = {
    "nothing anywhere": ([], (0, PAGES), None),
    "the first page of the file": ([0], (0, PAGES), (0, 1)),
    "the last page of the file": ([LAST], (0, PAGES), (LAST, 1)),
    "the first page of the range": ([8], (8, 8), (8, 1)),
    "the last page of the range": ([15], (8, 8), (15, 1)),
    "the page before the range": ([7], (8, 8), None),
    "the page behind the range": ([16], (8, 8), None),
    "both pages around the range": ([7, 16], (8, 8), None),
    "from before into the range": ([6, 7, 8, 9], (8, 8), (8, 2)),
    "out of the range": ([14, 15, 16, 17], (8, 8), (14, 2)),
    "more than the range": (list(range(PAGES)), (8, 8), (8, 8)),
    "the whole file": (list(range(PAGES)), (0, PAGES), (0, PAGES)),
    "the first of two parts": ([9, 10, 12], (8, 8), (9, 2)),
    "a range of one page, used": ([8], (8, 1), (8, 1)),
    "a range of one page, unused": ([7, 9], (8, 1), None),
}


@pytest.mark.parametrize(("used", "range_", "found"), LOOKS.values(), ids=LOOKS.keys())
def test_next_data_finds_the_first_part_in_its_range(
    window: Window, used: list[int], range_: tuple[int, int], found: tuple[int, int] | None
) -> None:
    for page in used:
        window.touch(page)
    assert window.next_data(*range_) == found
    assert window.present() == used  # looking takes no memory


def test_next_data_sees_what_a_read_allocated_and_not_what_was_given_back(window: Window) -> None:
    window.touch(0, 16)
    window.memory.read(20 * PAGE_SIZE, 1)
    window.discard(0, 16)
    assert window.next_data(0, PAGES) == (20, 1)


def test_resident_size_follows_every_page(window: Window) -> None:
    assert window.mapping.resident_size == 0
    window.touch(3, 5)
    assert window.mapping.resident_size == 5 * PAGE_SIZE
    window.populate(6, 4)
    assert window.mapping.resident_size == 7 * PAGE_SIZE
    window.discard(4, 1)
    assert window.mapping.resident_size == 6 * PAGE_SIZE


# -- wrong ranges --------------------------------------------------------------------------------

WRONG_RANGES = {
    "empty": (0, 0),
    "empty at the end": (SIZE, 0),
    "an offset inside a page": (1, PAGE_SIZE),
    "an offset inside a word": (512, PAGE_SIZE),
    "a size of half a page": (0, PAGE_SIZE // 2),
    "a size of a page and a half": (PAGE_SIZE, PAGE_SIZE + PAGE_SIZE // 2),
    "behind the end": (SIZE, PAGE_SIZE),
    "over the end": (SIZE - PAGE_SIZE, 2 * PAGE_SIZE),
    "more than the file": (0, SIZE + PAGE_SIZE),
    "a sum of 2^64": ((1 << 64) - PAGE_SIZE, PAGE_SIZE),
    "a sum beyond 2^64": ((1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE),
    "a size of nearly 2^64": (PAGE_SIZE, (1 << 64) - PAGE_SIZE),
}
CALLS: dict[str, Callable[[Mapping, int, int], object]] = {
    "discard": Mapping.discard,
    "populate": Mapping.populate,
    "next_data": Mapping.next_data,
    "bind": lambda mapping, offset, size: mapping.bind(offset, size, 0),
}


@pytest.mark.parametrize(("offset", "size"), WRONG_RANGES.values(), ids=WRONG_RANGES.keys())
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_wrong_ranges_are_refused_and_change_nothing(
    window: Window, call: Callable[[Mapping, int, int], object], offset: int, size: int
) -> None:
    window.touch(0, 3)
    window.touch(LAST)
    with pytest.raises(OSError, match=r".") as refused:
        call(window.mapping, offset, size)
    assert refused.value.errno == errno.EINVAL
    assert window.present() == [0, 1, 2, LAST]
    assert window.memory.file_size == os.fstat(window.memory.fd).st_size == SIZE


# -- memory policy -------------------------------------------------------------------------------


def bind(window: Window, first: int, count: int, node: int) -> None:
    """Bind pages to a node, or skip."""
    try:
        window.mapping.bind(first * PAGE_SIZE, count * PAGE_SIZE, node)
    except OSError as error:
        if error.errno in NOT_ALLOWED:
            pytest.skip(f"mbind(2): {error.strerror}")
        raise


def policies(window: Window) -> list[str]:
    """Every memory policy the kernel names for this file's pages, whoever maps it."""
    inode = os.fstat(window.memory.fd).st_ino
    maps = Path("/proc/self/maps").read_text().splitlines()
    starts = {line.split("-")[0] for line in maps if line.split()[4] == str(inode)}
    lines = [line.split() for line in Path("/proc/self/numa_maps").read_text().splitlines()]
    return [words[1] for words in lines if words[0].zfill(8) in starts or words[0] in starts]


def test_bind_sets_the_policy_of_the_file(window: Window) -> None:
    assert set(policies(window)) == {"default"}
    bind(window, 0, PAGES, 0)
    assert "bind:0" in policies(window)
    window.touch(0, 4)
    window.populate(4, 4)
    assert window.memory.blocks() == 8 * PAGE_SIZE


@pytest.mark.parametrize("node", [NO_NODE, NODES_MAX, NODES_MAX + 1, (1 << 32) - 1])
def test_bind_to_no_node_is_refused(window: Window, node: int) -> None:
    bind(window, 0, 1, 0)  # whether it may be done at all
    with pytest.raises(OSError, match=f"bind to node {node}") as refused:
        window.mapping.bind(PAGE_SIZE, PAGE_SIZE, node)
    assert refused.value.errno == errno.EINVAL


# -- huge pages ----------------------------------------------------------------------------------


def test_huge_pages_go_and_come_one_by_one(huge: Window) -> None:
    huge.touch(0, HUGE_PAGES)
    assert huge.mapping.resident_size == HUGE_PAGES * HUGE
    huge.discard(1, 2)
    assert huge.mapping.resident_size == 2 * HUGE == huge.memory.blocks()
    assert huge.kept(0)
    assert huge.kept(3)
    huge.populate(0, 2)
    assert huge.mapping.resident_size == 3 * HUGE
    assert huge.kept(0)
    assert huge.memory.read(HUGE, HUGE) == bytes(HUGE)


def test_huge_pages_can_not_be_looked_at(huge: Window) -> None:
    with pytest.raises(OSError, match="look for memory") as refused:
        huge.next_data(0, 1)
    assert refused.value.errno == errno.EOPNOTSUPP


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize(
    ("offset", "size"), [(0, PAGE_SIZE), (PAGE_SIZE, HUGE), (HUGE, HUGE + PAGE_SIZE)]
)
def test_parts_of_huge_pages_are_refused(
    huge: Window, call: Callable[[Mapping, int, int], object], offset: int, size: int
) -> None:
    huge.touch(0, HUGE_PAGES)
    with pytest.raises(OSError, match=r".") as refused:
        call(huge.mapping, offset, size)
    assert refused.value.errno == errno.EINVAL
    assert all(huge.kept(page) for page in range(HUGE_PAGES))


def test_want_of_huge_pages_is_an_error_and_no_signal(huge: Window) -> None:
    """A second file, of one page more than the host has left."""
    free = int((RESERVED / "free_hugepages").read_text())
    if free > USED_UP_MAX:
        pytest.skip(f"the host has {free} free huge pages, too many to use them up")
    fd = os.memfd_create("more", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    os.ftruncate(fd, (free + 1) * HUGE)
    mapping = Mapping(fd)
    os.close(fd)
    try:
        with pytest.raises(OSError, match="populate") as refused:
            mapping.populate(0, (free + 1) * HUGE)
    finally:
        mapping.close()
    assert refused.value.errno == errno.ENOSPC
    assert huge.mapping.resident_size == HUGE_PAGES * HUGE
