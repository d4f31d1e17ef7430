"""The native thread itself: its name, its signals, its notifications, and what it forgets."""

from __future__ import annotations

import errno
import os
import signal
import struct
from functools import partial
from pathlib import Path

import pytest
from vhostd._native import Event, Handler, Worker

from tests.fakes.eventfd import drain, wait_readable
from tests.fakes.memory import GuestMemory
from tests.native.rig import LAYOUTS, PATIENCE_S, Guest, Host, Layout, Ring, wait_until

QUIET_S = 0.05
RESIDENT_GROWTH_MAX_PAGES = 256  # below what one ring sets aside twice over
INTERRUPT = signal.SIGURG  # ends its wait for a VMM
ITS_OWN = {signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE, signal.SIGILL, INTERRUPT}
UNBLOCKABLE = {signal.SIGKILL, signal.SIGSTOP}


def threads() -> set[Path]:
    """The tasks of this process."""
    return set(Path("/proc/self/task").iterdir())


def test_a_thread_bears_its_name_cut_to_15_characters() -> None:
    before = threads()
    worker = Worker("vm-with-a-very-long-name")
    (thread,) = threads() - before
    assert thread.joinpath("comm").read_text() == "vm-with-a-very-\n"
    worker.close()
    assert threads() == before


def test_signals_are_left_to_python_but_its_own() -> None:
    before = threads()
    worker = Worker("signals")
    (thread,) = threads() - before
    worker.park()
    assert wait_readable(worker.notify_fd, PATIENCE_S)  # it runs our code now, not libc's
    status = dict(
        line.split(":\t", 1) for line in thread.joinpath("status").read_text().splitlines()
    )
    blocked = int(status["SigBlk"], 16)
    open_to = {
        number for number in signal.valid_signals() - UNBLOCKABLE if not blocked >> (number - 1) & 1
    }
    assert open_to == ITS_OWN
    worker.close()


def test_an_event_not_yet_taken_is_told_once(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.CONTROL)
        drain(host.worker.notify_fd)
        for number in range(10):
            ring.driver.add_chain(ring.buffers(bytes([number])))
            ring.driver.kick()
        wait_until(lambda: guest.device.ring_statistics(0).chains == 10)
        assert os.eventfd_read(host.worker.notify_fd) == 1
        assert guest.device.take_events() == Event.CHAINS
        assert guest.device.take_events() == Event(0)
        ring.driver.add_chain(ring.buffers(b"x"))
        ring.driver.kick()
        assert wait_readable(host.worker.notify_fd, PATIENCE_S)


def test_an_idle_worker_sleeps(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE)
        ring.send_pfns([4096])
        with host.parked():
            pass
        rounds = host.worker.rounds
        assert not ring.driver.wait_err(QUIET_S)  # the time to look at
        assert host.worker.rounds <= rounds + 1  # the one that ended its parking


def has_kicks(ring: Ring, kicks: int) -> bool:
    """Whether the worker has seen so many."""
    return ring.statistics().kicks == kicks


def test_kicks_are_counted_and_looks_without_one_are_not(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE)
        for kicks in range(1, 6):
            ring.driver.kick()
            wait_until(partial(has_kicks, ring, kicks))
        for _ in range(5):
            with host.parked():  # looked at again, nobody kicked
                guest.device.set_handler(0, Handler.INFLATE)
        assert ring.statistics().kicks == 5


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_token_of_before_a_stop_completes_nothing_after_it(host: Host, layout: Layout) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.CONTROL, layout)
        ring.driver.add_chain(ring.buffers(struct.pack("<I", 7)))
        ring.driver.kick()
        host.wait_event(guest.device, Event.CHAINS)
        old = guest.device.take_chain(0)
        assert old is not None
        ring.start(ring.stop())
        host.wait_event(guest.device, Event.CHAINS)
        again = guest.device.take_chain(0)
        assert again is not None
        assert again.data == old.data
        with pytest.raises(OSError, match="chain") as refused:
            guest.device.complete_chain(0, old.token)
        assert refused.value.errno == errno.ESTALE
        assert ring.statistics().used == 0
        guest.device.complete_chain(0, again.token)
        ring.driver.wait_used(1)


def test_rings_come_and_go_without_using_up_memory(host: Host) -> None:
    """What Python may hand up is set aside for each ring, and costs pages only when used."""

    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    with Guest.on(host, GuestMemory.flat()) as guest:
        rings = [guest.ring(Handler.CONTROL, size=8) for _ in range(5)]
        before = resident_pages()
        for _ in range(50):
            for ring in rings:
                ring.start(ring.stop())
        assert resident_pages() - before < RESIDENT_GROWTH_MAX_PAGES
