"""A ring's life with the worker: parking, quarantine, interrupts, kicks, memory that changes."""

from __future__ import annotations

import errno
import os
import threading

import pytest
from vhostd._native import Event, Fault, Handler, RingPosition

from tests.fakes.driver import Buffer, Queue
from tests.fakes.eventfd import drain
from tests.fakes.memory import MIB, PAGE_SIZE, GuestMemory
from tests.fakes.split import SplitQueue
from tests.native.rig import (
    DATA_ADDR,
    LAYOUTS,
    Guest,
    Host,
    Layout,
    Ring,
    make_queue,
    pack_pfns,
    pages_at,
    regions,
    wait_until,
)

EVENTFD_MAX = (1 << 64) - 2
MEASURE_S = 0.3
CHAINS = 10_000


def lists_of(ring: Ring, count: int) -> list[Buffer]:
    """One single page number each, page after page."""
    address = ring.driver.memory.allocate(4 * count)
    ring.driver.memory.write(address, pack_pfns(pages_at(DATA_ADDR, count)))
    return [Buffer(address + 4 * i, 4) for i in range(count)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ten_thousand_chains_one_at_a_time(host: Host, layout: Layout) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.DEFLATE, layout, size=4)
        (buffer,) = lists_of(ring, 1)
        for _ in range(CHAINS):
            ring.send(buffer)
        statistics = ring.statistics()
        assert (statistics.chains, statistics.used, statistics.faults) == (CHAINS, CHAINS, 0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ten_thousand_chains_in_full_rings(host: Host, layout: Layout) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.DEFLATE, layout, size=128)
        (buffer,) = lists_of(ring, 1)
        rounds = CHAINS // 128 + 1
        for _ in range(rounds):
            for _ in range(128):
                ring.driver.add_chain([buffer], publish=False)
            ring.driver.publish()
            ring.driver.notify()
            assert len(ring.driver.wait_used(128)) == 128
        assert ring.statistics().used == rounds * 128


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parking_in_the_middle_of_work_loses_no_chain(host: Host, layout: Layout) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE, layout, size=1024)
        buffers = lists_of(ring, 1024)
        guest.memory.touch(DATA_ADDR, 1024 * PAGE_SIZE)
        for buffer in buffers:
            ring.driver.add_chain([buffer], publish=False)
        ring.driver.publish()
        ring.driver.kick()
        for _ in range(50):
            with host.parked():
                statistics = guest.device.ring_statistics(0)
                assert statistics.chains == statistics.used  # it stands between two chains
        assert len(ring.driver.wait_used(1024)) == 1024
        assert guest.memory.pages_present(DATA_ADDR, 1024) == 0


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_stop_in_the_middle_of_work_goes_on_where_it_stood(host: Host, layout: Layout) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE, layout, size=512)
        for buffer in lists_of(ring, 512):
            ring.driver.add_chain([buffer], publish=False)
        ring.driver.publish()
        ring.driver.kick()
        for _ in range(20):
            ring.start(ring.stop())
        assert len(ring.driver.wait_used(512)) == 512
        counters = guest.device.balloon_counters()
        assert (counters.inflated_pages, counters.pfns_repeated) == (512, 0)


def test_a_kick_before_the_start_is_not_lost(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE, start=False)
        ring.driver.add_chain(lists_of(ring, 1))
        ring.start()  # nobody kicks
        ring.driver.wait_used(1)


def test_a_disabled_ring_waits(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE)
        with host.parked():
            guest.device.enable_ring(0, False)
        ring.driver.add_chain(lists_of(ring, 1))
        ring.driver.kick()
        with host.parked():
            assert guest.device.ring_statistics(0).chains == 0
            guest.device.enable_ring(0, True)
        ring.driver.wait_used(1)


def test_a_kick_that_is_always_readable_does_not_spin(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE)
        os.eventfd_write(ring.driver.kick_fd, 1 << 40)
        with host.parked():
            rounds = host.worker.rounds
        before = host.cpu_s()
        assert not ring.driver.wait_err(MEASURE_S)  # the time to measure over
        assert host.cpu_s() - before <= 0.02
        assert host.worker.rounds <= rounds + 5
        ring.send(*lists_of(ring, 1))


def test_a_full_call_eventfd_drops_calls_and_holds_nothing_up(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE)
        call_fd = os.eventfd(0, os.EFD_CLOEXEC)  # one that blocks
        os.eventfd_write(call_fd, EVENTFD_MAX)
        with host.parked():
            guest.device.set_call(0, call_fd)
        for buffer in lists_of(ring, 3):
            ring.driver.add_chain([buffer])
            ring.driver.kick()
        ring.driver.wait_used(3, interrupts=False)
        wait_until(lambda: guest.device.ring_statistics(0).calls_dropped == 3)
        assert os.eventfd_read(call_fd) == EVENTFD_MAX
        (buffer,) = lists_of(ring, 1)
        ring.driver.add_chain([buffer])
        ring.driver.kick()
        assert os.eventfd_read(call_fd) == 1
        os.close(call_fd)


def test_without_a_call_eventfd_the_ring_is_served(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE)
        with host.parked():
            guest.device.set_call(0, -1)
        ring.driver.add_chain(lists_of(ring, 1))
        ring.driver.kick()
        ring.driver.wait_used(1, interrupts=False)
        assert guest.device.ring_statistics(0).calls == 0


# -- quarantine --------------------------------------------------------------------------------


def break_ring(ring: Ring) -> None:
    """Make a chain outside guest memory available."""
    ring.driver.add_chain([Buffer(1 << 40, 4)])
    ring.driver.kick()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_of_a_range_that_begins_in_guest_memory_the_first_address_outside_is_told(
    host: Host, layout: Layout
) -> None:
    end = 64 * MIB
    with Guest.on(host, GuestMemory.flat(end)) as guest:
        ring = guest.ring(Handler.INFLATE, layout)
        ring.driver.add_chain([Buffer(end - 8, 64)])
        ring.driver.kick()
        host.wait_event(guest.device, Event.FAULT)
        assert guest.device.ring_statistics(0).fault_addr == end


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_bad_chain_stops_its_ring_and_no_other(host: Host, layout: Layout) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        broken = guest.ring(Handler.INFLATE, layout)
        sound = guest.ring(Handler.DEFLATE, layout)
        break_ring(broken)
        assert broken.driver.wait_err()
        host.wait_event(guest.device, Event.FAULT)
        statistics = guest.device.ring_statistics(0)
        assert (statistics.fault, statistics.fault_addr) == (Fault.ADDRESS, 1 << 40)
        assert (statistics.faults, statistics.used) == (1, 0)
        broken.driver.kick()
        sound.send_pfns(pages_at(DATA_ADDR, 1))
        with host.parked():
            assert guest.device.ring_statistics(0).faults == 1
        assert not broken.driver.wait_err(0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_quarantined_ring_serves_again_after_a_fresh_start(host: Host, layout: Layout) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE, layout)
        ring.send(*lists_of(ring, 1))
        for _ in range(3):
            break_ring(ring)
            assert ring.driver.wait_err()
            ring.stop()
            ring.driver.reset()
            ring.start()
            assert guest.device.ring_statistics(0).fault == Fault.NONE
            ring.send(*lists_of(ring, 1))


def test_memory_that_goes_away_costs_one_ring(host: Host) -> None:
    other = Guest.on(host, GuestMemory.flat(8 * MIB))
    with other, Guest.on(host, GuestMemory.flat(8 * MIB)) as guest:
        broken = guest.ring(Handler.DEFLATE)
        sound = other.ring(Handler.DEFLATE)
        list_addr = 6 * MIB
        guest.memory.write(list_addr, pack_pfns([1]))
        broken.driver.add_chain([Buffer(list_addr, 4)])
        os.ftruncate(guest.memory.fd, 4 * MIB)  # the ring stays, the list goes
        broken.driver.kick()
        assert broken.driver.wait_err()
        host.wait_event(guest.device, Event.FAULT)
        assert guest.device.ring_statistics(0).fault == Fault.SIGBUS
        sound.send_pfns([1])
        os.ftruncate(guest.memory.fd, 8 * MIB)
        guest.memory.write(list_addr, pack_pfns([1]))
        position = broken.stop()
        assert (position.next_avail, position.next_used) == (0, 0)
        broken.start(position)  # the chain that met the hole comes again
        broken.driver.wait_used(1)


def test_a_ring_that_goes_away_costs_only_itself(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat(8 * MIB)) as guest:
        rings = [guest.ring(handler) for handler in (Handler.DEFLATE, Handler.CONTROL)]
        os.ftruncate(guest.memory.fd, 0)
        for ring in rings:
            ring.driver.kick()
            assert ring.driver.wait_err()
            assert guest.device.ring_statistics(ring.index).fault == Fault.SIGBUS
        os.ftruncate(guest.memory.fd, 8 * MIB)


def test_an_answer_into_memory_that_went_away_costs_its_ring(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat(8 * MIB)) as guest:
        ring = guest.ring(Handler.CONTROL)
        ring.driver.add_chain([Buffer(6 * MIB, 8, True)])
        ring.driver.kick()
        host.wait_event(guest.device, Event.CHAINS)
        chain = guest.device.take_chain(0)
        assert chain is not None
        os.ftruncate(guest.memory.fd, 4 * MIB)
        guest.device.complete_chain(0, chain.token, b"answer")
        assert ring.driver.wait_err()
        assert guest.device.ring_statistics(0).fault == Fault.SIGBUS
        assert ring.stop().next_avail == 0
        os.ftruncate(guest.memory.fd, 8 * MIB)


# -- memory tables -----------------------------------------------------------------------------


def test_a_table_that_drops_a_started_ring_is_refused_and_the_old_one_holds(host: Host) -> None:
    with Guest.on(host, GuestMemory.with_hole()) as guest:
        ring = guest.ring(Handler.INFLATE)
        _low, high = regions(guest.memory, guest.mapping)
        for table in ([high], []):
            with host.parked(), pytest.raises(OSError, match="memory table") as refused:
                guest.device.set_regions(table)
            assert refused.value.errno == errno.EFAULT
        guest.memory.touch(DATA_ADDR, PAGE_SIZE)
        ring.send_pfns(pages_at(DATA_ADDR, 1))
        assert not guest.memory.page_present(DATA_ADDR)


def test_overlapping_slots_are_refused(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE)
        (whole,) = regions(guest.memory, guest.mapping)
        with host.parked(), pytest.raises(OSError, match="memory table") as refused:
            guest.device.set_regions([whole, whole])
        assert refused.value.errno == errno.EINVAL
        ring.send(*lists_of(ring, 1))


def test_a_ring_goes_on_after_its_slot_moved_in_the_file(host: Host) -> None:
    with Guest.on(host, GuestMemory.with_hole()) as guest:
        ring = guest.ring(Handler.INFLATE)
        low, high = regions(guest.memory, guest.mapping)
        ring.send(*lists_of(ring, 1))
        with host.parked():
            guest.device.set_regions([low])
        with host.parked():
            guest.device.set_regions([high, low])
        ring.send_pfns(pages_at(high.guest_addr, 1))
        assert guest.device.balloon_counters().pfns_outside == 0


def test_two_devices_of_one_worker_share_a_mapping(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        second = host.device()
        with host.parked():
            second.set_regions(regions(guest.memory, guest.mapping))
        first_ring = guest.ring(Handler.INFLATE)
        driver: Queue = make_queue(guest.memory, Layout(packed=True), 16)
        second_ring = Ring(host, second, 0, Layout(packed=True), driver, Handler.INFLATE)
        second_ring.start()
        guest.memory.touch(DATA_ADDR, 3 * PAGE_SIZE)
        first_ring.send_pfns(pages_at(DATA_ADDR, 1))
        second_ring.send_pfns(pages_at(DATA_ADDR + PAGE_SIZE, 1))
        assert guest.memory.pages_present(DATA_ADDR, 3) == 1
        # Each device is a driver of its own: what is known is of the one that came last.
        assert guest.mapping.given_up_pages == 1
        assert guest.device.balloon_counters().inflated_pages == 1
        assert second.balloon_counters().inflated_pages == 1
        host.remove(second)
        driver.close()


def test_one_busy_ring_leaves_the_others_their_turn(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        busy = guest.ring(Handler.DEFLATE, size=1024)
        other = guest.ring(Handler.DEFLATE)
        (buffer,) = lists_of(busy, 1)
        stop = threading.Event()

        def flood() -> None:
            while not stop.is_set():
                for _ in range(512):
                    busy.driver.add_chain([buffer], publish=False)
                busy.driver.publish()
                busy.driver.kick()
                busy.driver.wait_used(512, interrupts=False)

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            for _ in range(20):
                other.send(buffer)
        finally:
            stop.set()
            thread.join()
        assert other.statistics().used == 20


def test_a_split_ring_starts_at_the_used_index_of_the_guest(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.DEFLATE)
        for buffer in lists_of(ring, 5):
            ring.send(buffer)
        ring.stop()
        ring.start(RingPosition(next_avail=5, next_used=77))
        ring.send(*lists_of(ring, 1))
        assert isinstance(ring.driver, SplitQueue)
        assert ring.driver.used_index() == 6


def test_a_stopped_ring_is_not_served(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE)
        ring.stop()
        ring.driver.add_chain(lists_of(ring, 1))
        ring.driver.kick()
        with host.parked():
            assert guest.device.ring_statistics(0).chains == 0
        assert drain(ring.driver.call_fd) == 0


def test_a_ring_starts_before_anybody_touches_guest_memory(host: Host) -> None:
    """Python only says where it lies; a page that is gone is the worker's to meet."""
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.INFLATE, start=False)
        os.ftruncate(guest.memory.fd, 0)
        ring.start()
        host.wait_event(guest.device, Event.FAULT)
        assert ring.statistics().fault is Fault.SIGBUS
        assert ring.driver.wait_err()
        assert ring.stop() == RingPosition()


def test_a_ring_stopped_at_once_stands_where_its_used_ring_ends(host: Host) -> None:
    with Guest.on(host, GuestMemory.flat()) as guest:
        ring = guest.ring(Handler.DEFLATE)
        ring.send_pfns(pages_at(DATA_ADDR, 1))
        position = ring.stop()
        with host.parked():
            guest.device.start_ring(0, ring.setup(RingPosition(next_avail=position.next_avail)))
        assert ring.stop() == position
        ring.start(position)
        ring.send_pfns(pages_at(DATA_ADDR, 1))
