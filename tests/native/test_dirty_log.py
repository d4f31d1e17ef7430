"""What the device writes is marked for a migration: used rings, answers, discards."""

from __future__ import annotations

import errno
import os

import pytest
from vhostd._native import Event, Handler, Log, RingFeature

from tests.fakes.driver import Buffer
from tests.fakes.memory import MIB, PAGE_SIZE, GuestMemory, open_memfd
from tests.native.rig import DATA_ADDR, Guest, Host, Layout, pages_at

LOG_SIZE = 64 * MIB // PAGE_SIZE // 8
LOG_OFFSET = 4096 + 64
USED_LOG_ADDR = 40 * MIB  # an address of its own: it must be used, and not where the ring lies


class LogFile:
    """The VMM's side of a dirty log."""

    def __init__(self) -> None:
        """Make the file, all clean."""
        self.fd = open_memfd(LOG_OFFSET + LOG_SIZE)
        self.log = Log(self.fd, LOG_SIZE, LOG_OFFSET)

    def dirty(self) -> list[int]:
        """Take the numbers of dirty pages, and clean them."""
        bits = os.pread(self.fd, LOG_SIZE, LOG_OFFSET)
        os.pwrite(self.fd, bytes(LOG_SIZE), LOG_OFFSET)
        return [8 * at + bit for at, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1]

    def close(self) -> None:
        """Unmap and close."""
        self.log.close()
        os.close(self.fd)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_used_writes_are_marked_at_their_log_address(host: Host, packed: bool) -> None:
    log = LogFile()
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.DEFLATE, Layout(packed), start=False)
        ring.features = RingFeature.LOG_USED
        ring.log_addr = USED_LOG_ADDR
        with host.parked():
            guest.device.set_log(log.log, False)
        ring.start()
        ring.send_pfns(pages_at(DATA_ADDR, 1))
        marked = [USED_LOG_ADDR // PAGE_SIZE]
        if packed:  # gives back in its descriptor ring, which has no log address
            marked.insert(0, ring.driver.parts.desc // PAGE_SIZE)
        assert log.dirty() == marked
        with host.parked():
            guest.device.set_log(None, False)
        ring.send_pfns(pages_at(DATA_ADDR, 1))
        assert log.dirty() == []
    log.close()


def test_a_ring_that_asked_for_no_log_marks_nothing(host: Host) -> None:
    log = LogFile()
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE)
        with host.parked():
            guest.device.set_log(log.log, False)
        ring.send_pfns(pages_at(DATA_ADDR, 3))
        assert log.dirty() == []
    log.close()


def test_discarded_pages_are_marked(host: Host) -> None:
    log = LogFile()
    with Guest.on(host, GuestMemory.flat()) as guest:
        inflate = guest.ring(Handler.INFLATE)
        report = guest.ring(Handler.REPORT)
        with host.parked():
            guest.device.set_log(log.log, True)
        inflate.send_pfns(pages_at(DATA_ADDR, 3))
        assert log.dirty() == pages_at(DATA_ADDR, 3)
        report.send(Buffer(DATA_ADDR + MIB, 5 * PAGE_SIZE, writable=True))
        assert log.dirty() == pages_at(DATA_ADDR + MIB, 5)
    log.close()


def test_answers_are_marked(host: Host) -> None:
    log = LogFile()
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.CONTROL)
        with host.parked():
            guest.device.set_log(log.log, True)
        ring.driver.add_chain([Buffer(DATA_ADDR + PAGE_SIZE - 2, 8, True)])
        ring.driver.kick()
        host.wait_event(guest.device, Event.CHAINS)
        chain = guest.device.take_chain(0)
        assert chain is not None
        guest.device.complete_chain(0, chain.token, b"1234")
        ring.driver.wait_used()
        assert log.dirty() == pages_at(DATA_ADDR, 2)
    log.close()


def test_pages_beyond_the_log_are_left_out(host: Host) -> None:
    fd = open_memfd(4096)
    log = Log(fd, 8, 0)  # 64 pages
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE)
        with host.parked():
            guest.device.set_log(log, True)
        ring.send_pfns([63, 64, 1000])
        assert os.pread(fd, 4096, 0) == bytes(7) + b"\x80" + bytes(4088)
    log.close()
    os.close(fd)


@pytest.mark.parametrize(("size", "offset"), [(0, 0), (4097, 0), (1, 4096), (8, (1 << 64) - 4)])
def test_a_log_outside_its_file_is_refused(size: int, offset: int) -> None:
    fd = open_memfd(4096)
    with pytest.raises(OSError, match="dirty log") as refused:
        Log(fd, size, offset)
    assert refused.value.errno == errno.EINVAL
    os.close(fd)
