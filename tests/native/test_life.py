"""Nothing is left behind: descriptors, mappings and threads stay flat over many lives."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest
from vhostd._native import Device, Handler, Mapping

from tests.fakes.memory import MIB, GuestMemory, open_memfd
from tests.native.rig import CONFIG_SIZE, CONFIG_WRITABLE, Guest, Host

ROUNDS = 500
DEVICES_MAX = 64


def held() -> tuple[int, int, int]:
    """Descriptors, mappings of memory files, threads."""
    process = Path("/proc/self")
    maps = process.joinpath("maps").read_text().count("memfd:")
    fds = len(list(process.joinpath("fd").iterdir()))
    return fds, maps, len(list(process.joinpath("task").iterdir()))


def test_five_hundred_devices_leave_nothing_behind(host: Host) -> None:
    def live_once() -> None:
        with Guest.on(host, GuestMemory.flat(4 * MIB)) as guest:
            ring = guest.ring(Handler.INFLATE, size=8)
            ring.send_pfns([900])
            front, back = socket.socketpair()
            with front, back:
                with host.parked():
                    guest.device.set_socket(back.fileno())
                guest.device.arm_socket()
                with host.parked():
                    guest.device.set_socket(-1)

    live_once()
    before = held()
    for _ in range(ROUNDS):
        live_once()
    assert held() == before


def test_a_hundred_workers_leave_nothing_behind() -> None:
    with Host():
        pass
    before = held()
    for _ in range(100):
        with Host() as host:
            host.device()
    assert held() == before


def test_a_worker_takes_64_devices_and_no_more(host: Host) -> None:
    for _ in range(DEVICES_MAX):
        host.device(queue_count=1)
    extra = Device(1, CONFIG_SIZE, CONFIG_WRITABLE)
    with host.parked(), pytest.raises(OSError, match="attach") as refused:
        extra.attach(host.worker)
    assert refused.value.errno == errno.ENOSPC
    extra.close()


def test_a_thousand_parkings_in_a_row_all_come(host: Host) -> None:
    for _ in range(1000):
        with host.parked():
            assert host.worker.parked


def test_a_parked_worker_can_be_ended() -> None:
    host = Host()
    host.park()
    host.worker.close()


@pytest.mark.parametrize("kind", ["empty", "pipe", "read-only"])
def test_only_memory_files_are_mapped(kind: str) -> None:
    first, second = os.pipe()
    memory = open_memfd(0 if kind == "empty" else MIB)
    readable = os.open(f"/proc/self/fd/{memory}", os.O_RDONLY)
    fd, code = {
        "empty": (memory, errno.ENODATA),
        "pipe": (first, errno.EACCES),
        "read-only": (readable, errno.EACCES),
    }[kind]
    with pytest.raises(OSError, match="guest memory") as refused:
        Mapping(fd)
    assert refused.value.errno == code
    for each in (first, second, memory, readable):
        os.close(each)
