"""What a successor takes from its predecessor's memfds, and which memfds it refuses."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator

import pytest
from vhostd._native import Device, Event, Handler, Mapping
from vhostd._native._core import ffi

from tests.fakes.memory import MIB, GuestMemory, open_memfd
from tests.native.rig import CONFIG_SIZE, CONFIG_WRITABLE, Guest, Host, pages_at

CONTENT = bytes(range(CONFIG_SIZE))
QUEUES = 5
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
DATA_ADDR = 4 * MIB


@pytest.fixture
def origin() -> Iterator[Device]:
    """A device whose memfds are taken over; nobody serves it."""
    device = Device(QUEUES, CONFIG_SIZE, CONFIG_WRITABLE)
    device.publish_config(0, CONTENT)
    yield device
    device.close()


def adopt(
    shared_fd: int, reply_fd: int, queues: int = QUEUES, writable: bytes = CONFIG_WRITABLE
) -> Device:
    """Take over."""
    return Device.adopt(shared_fd, reply_fd, queues, len(writable), writable)


def copy_of(fd: int, size: int | None = None, seals: int = SEALS) -> int:
    """A memfd with the same bytes; the caller closes it."""
    content = os.pread(fd, 1 << 20, 0)
    copy = open_memfd(len(content) if size is None else size)
    os.pwrite(copy, content[:size], 0)
    fcntl.fcntl(copy, fcntl.F_ADD_SEALS, seals)
    return copy


def test_config_bytes_go_on_and_somebody_looks_at_them(origin: Device, host: Host) -> None:
    device = host.add(adopt(origin.shared_fd, origin.reply_fd))
    assert device.read_config() == CONTENT
    host.wait_event(device, Event.CONFIG)


def test_counters_and_the_balloon_go_on(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat(8 * MIB)) as guest:
        ring = guest.ring(Handler.INFLATE)
        pfns = pages_at(DATA_ADDR, 300)
        ring.send_pfns(pfns)
        counted = guest.device.balloon_counters()
        heir = adopt(guest.device.shared_fd, guest.device.reply_fd)
        assert heir.balloon_counters() == counted
        assert heir.balloon_counters().inflated_pages == 300
        assert not heir.ring_statistics(0).started
        assert heir.ring_statistics(0).used == 1
        heir.close()
        mapping = Mapping(guest.memory.fd, guest.mapping.given_up_fd)
        assert mapping.given_up_pages == 300
        mapping.close()


def test_a_bitmap_with_holes_is_counted_whole() -> None:
    size = 1 << 40  # its bitmap has 32 MiB
    fd = open_memfd(size)
    first = Mapping(fd)
    pages = [0, 63, 64, 4096 * 8 - 1, 4096 * 8, 5 * MIB * 8 + 1, size // 4096 - 1]
    for page in pages:
        byte = os.pread(first.given_up_fd, 1, page // 8)[0]
        os.pwrite(first.given_up_fd, bytes([byte | 1 << page % 8]), page // 8)
    second = Mapping(fd, first.given_up_fd)
    assert second.given_up_pages == len(pages)
    assert os.fstat(first.given_up_fd).st_blocks * 512 < MIB
    first.close()
    second.close()
    os.close(fd)


def test_a_balloon_that_starts_afresh_leaves_no_page_of_the_bitmap(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat(8 * MIB)) as guest:
        ring = guest.ring(Handler.INFLATE)
        ring.send_pfns(pages_at(DATA_ADDR, 10))
        assert os.fstat(guest.mapping.given_up_fd).st_blocks > 0
        with host.parked():
            guest.device.balloon_reset()
        assert guest.mapping.given_up_pages == 0
        assert os.fstat(guest.mapping.given_up_fd).st_blocks == 0
        ring.send_pfns(pages_at(DATA_ADDR, 10))
        assert guest.mapping.given_up_pages == 10


@pytest.mark.parametrize("fd", ["bitmap of a larger file", "unsealed", "no memfd", "closed"])
def test_a_bitmap_that_is_not_of_this_file_is_refused(fd: str) -> None:
    memory, larger = open_memfd(8 * MIB), open_memfd(16 * MIB)
    right, wrong = Mapping(memory), Mapping(larger)
    given = {
        "bitmap of a larger file": lambda: os.dup(wrong.given_up_fd),
        "unsealed": lambda: copy_of(right.given_up_fd, seals=0),
        "no memfd": lambda: os.open("/dev/zero", os.O_RDWR),
        "closed": lambda: 1 << 20,
    }[fd]()
    with pytest.raises(OSError) as refusal:
        Mapping(memory, given)
    assert refusal.value.errno == (errno.EBADF if fd == "closed" else errno.EPROTO)
    right.close()
    wrong.close()
    for one in (memory, larger, *([] if fd == "closed" else [given])):
        os.close(one)


def changed(field: str) -> Callable[[int], int]:
    """A copy with a field that is one more than it was."""

    def change(fd: int) -> int:
        copy = copy_of(fd)
        with mmap.mmap(copy, 0) as content:
            at = ffi.offsetof("struct vhd_shared", field)
            content[at] = (content[at] + 1) % 256
        return copy

    return change


UNFIT: dict[str, Callable[[int], int]] = {
    "another version": changed("version"),
    "no magic": changed("magic"),
    "another number of queues": changed("queue_count"),
    "another config size": changed("config_size"),
    "longer": lambda fd: copy_of(fd, os.fstat(fd).st_size + 8),
    "shorter": lambda fd: copy_of(fd, os.fstat(fd).st_size - 8),
    "not sealed": lambda fd: copy_of(fd, seals=0),
    "sealed against writing": lambda fd: copy_of(fd, seals=SEALS | fcntl.F_SEAL_WRITE),
    "no memfd": lambda _: os.open("/dev/zero", os.O_RDWR),
    "empty": lambda _: open_memfd(0),
}


@pytest.mark.parametrize("name", UNFIT)
def test_memory_that_another_made_otherwise_is_refused(origin: Device, name: str) -> None:
    fd = UNFIT[name](origin.shared_fd)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a count is wanted
    with pytest.raises(OSError) as refusal:
        adopt(fd, origin.reply_fd)
    assert refusal.value.errno == errno.EPROTO
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    os.close(fd)


def test_another_kind_of_device_is_refused(origin: Device) -> None:
    for queues, writable in ((QUEUES - 1, CONFIG_WRITABLE), (QUEUES, CONFIG_WRITABLE + b"\0")):
        with pytest.raises(OSError) as refusal:
            adopt(origin.shared_fd, origin.reply_fd, queues, writable)
        assert refusal.value.errno == errno.EPROTO
    adopt(origin.shared_fd, origin.reply_fd).close()


def test_replies_of_no_device_are_refused(origin: Device) -> None:
    other = open_memfd(4096)
    for reply_fd in (origin.shared_fd, other):
        with pytest.raises(OSError) as refusal:
            adopt(origin.shared_fd, reply_fd)
        assert refusal.value.errno == errno.EPROTO
    for fds in ((-1, origin.reply_fd), (origin.shared_fd, -1)):
        with pytest.raises(OSError) as refusal:
            adopt(*fds)
        assert refusal.value.errno == errno.EBADF
    os.close(other)
