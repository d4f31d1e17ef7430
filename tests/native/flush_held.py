"""What happens to a flush ring while its sync is held: parking, stops, other devices and memory.

Run by flush_cases.py. Knows vhostd._native and the fake guest; must not know the protocol.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from vhostd._native import Event, Fault, RingPosition

from tests.fakes.driver import Buffer
from tests.fakes.memory import MIB, GuestMemory
from tests.native.flush_rig import (
    DONE,
    FLUSH,
    RESPONSE_SIZE,
    UNTOUCHED,
    Disk,
    Posted,
    disk_on,
)
from tests.native.flush_stand import CASES, Stand, case, open_files
from tests.native.rig import Host, regions

__all__ = ["CASES"]

LOOP = 200


# -- while a sync is held ------------------------------------------------------------------------


@case
def the_worker_counts_as_parked_at_once(stand: Stand) -> None:
    posted = stand.hold()
    for _ in range(3):
        stand.host.worker.park()
        assert stand.host.worker.parked
        stand.host.worker.unpark()
        assert not stand.host.worker.parked
    stand.file.release()
    stand.disk.await_all(posted, DONE)


@case
def a_sync_that_ends_while_parked_is_answered_after_it(stand: Stand) -> None:
    posted = stand.hold()
    with stand.host.parked():
        stand.file.release()
        stand.wait_ended()
        stand.quiet(posted)
    stand.disk.await_all(posted, DONE)


@case
def a_park_wanted_around_a_sync_s_beginning_comes_true(stand: Stand) -> None:
    """Asked for at any moment: before the worker looks at the ring, and when it is in the sync."""
    laid = stand.disk.lay()
    for turn in range(LOOP * 10):
        stand.file.hold()
        posted = stand.disk.add_laid(laid)
        stand.disk.publish()
        for _ in range(turn % 50):
            os.getppid()
        with stand.host.parked():
            assert stand.host.worker.parked
        stand.file.release()
        stand.disk.await_all([posted], DONE)


@case
def a_stopped_ring_stands_at_its_oldest_request(stand: Stand) -> None:
    """It starts again while the sync is still held: that one answers nothing of it."""
    for _ in range(2):
        assert stand.disk.exchange() == (RESPONSE_SIZE, DONE)
    posted = stand.hold(3)
    position = stand.disk.ring.stop()
    at = 4 if stand.layout.packed else 2
    assert position == RingPosition(at, at)
    stand.disk.ring.start(position)
    stand.quiet(posted)
    stand.file.release_one()
    stand.file.wait_held(4)  # it has come again
    stand.quiet(posted)
    stand.file.release()
    stand.disk.await_all(posted, DONE)
    assert stand.disk.ring.statistics().used == 5
    assert stand.disk.counters().flushes == 5
    assert stand.disk.exchange() == (RESPONSE_SIZE, DONE)


@case
def a_ring_stopped_for_longer_than_the_sync_is_answered_once(stand: Stand) -> None:
    posted = stand.hold(3)
    position = stand.disk.ring.stop()
    stand.file.release()
    stand.wait_ended()
    with stand.host.parked():
        pass  # the worker is back
    stand.quiet(posted)
    assert stand.disk.counters().flushes == 0
    stand.disk.ring.start(position)
    stand.disk.await_all(posted, DONE)
    assert len(stand.file.calls()) == 2
    assert stand.disk.ring.statistics().used == 3


@case
def many_stops_and_starts_answer_each_request_once(stand: Stand) -> None:
    laid = [stand.disk.lay() for _ in range(6)]
    for turn in range(LOOP):
        for buffers in laid:
            stand.disk.guest.memory.write(buffers[1].guest_addr, bytes([UNTOUCHED]) * 4)
        posted = [stand.disk.add_laid(buffers) for buffers in laid]
        stand.disk.publish()
        for _ in range(turn % 5):
            stand.disk.ring.start(stand.disk.ring.stop())
        stand.disk.await_all(posted, DONE)
    assert stand.disk.ring.statistics().used == LOOP * len(laid)


@case
def a_device_taken_away_leaves_nothing_to_the_next(stand: Stand) -> None:
    """The old sync fails; the new device in its place, on the same file, hears nothing of it."""
    old, _ = stand.image("other")
    file = stand.shim.watch(stand.folder / "other")
    with disk_on(stand.host, old, stand.layout) as disk:
        file.fail(errno.EIO, 1)
        file.hold()
        disk.post(2)
        file.wait_held()
    # Detached and closed, its memory unmapped, its image let go: only the sync has it.
    new, _ = stand.image("other")
    with disk_on(stand.host, new, stand.layout) as disk:
        posted = disk.post(2)
        stand.quiet(posted, disk)
        file.release_one()
        file.wait_held(2)
        stand.quiet(posted, disk)
        file.release()
        disk.await_all(posted, DONE)
        assert disk.counters().flush_errors == 0
        assert not stand.host.has_event(disk.guest.device, Event.FLUSH_FAILED)
    assert [call.error for call in file.calls()] == [errno.EIO, 0]
    assert stand.disk.exchange() == (RESPONSE_SIZE, DONE)


@case
def devices_come_and_go_during_one_sync(stand: Stand) -> None:
    stand.hold()
    before = len(open_files())
    for number in range(20):
        image, _ = stand.image("other")
        with disk_on(stand.host, image, stand.layout) as disk:
            disk.post(number % 3)
    assert len(open_files()) == before
    stand.file.release()
    stand.disk.ring.driver.wait_used()


@case
def an_image_taken_away_answers_nothing(stand: Stand) -> None:
    old = stand.disk.image
    assert old is not None
    posted = stand.hold(2)
    stand.file.fail(errno.EIO, 1)
    new, other = stand.image("other")
    other.hold()
    stand.disk.use(new)
    old.close()
    stand.file.release()
    other.wait_held()
    stand.quiet(posted)
    other.release()
    stand.disk.await_all(posted, DONE)
    assert stand.disk.counters().flush_errors == 0


@case
def two_images_are_synced_side_by_side(stand: Stand) -> None:
    posted = stand.hold()
    image, file = stand.image("other")
    with Host() as other, disk_on(other, image, stand.layout) as disk:
        for _ in range(10):
            assert disk.exchange() == (RESPONSE_SIZE, DONE)
    stand.quiet(posted)
    assert len(file.calls()) == 10
    stand.file.release()
    stand.disk.await_all(posted, DONE)


# -- memory that changes meanwhile ---------------------------------------------------------------


@contextmanager
def far_disk(stand: Stand, memory: GuestMemory, at: int) -> Iterator[tuple[Disk, Posted]]:
    """A disk with a sync held whose response is to go to a place of its memory."""
    image, file = stand.image("far")
    with disk_on(stand.host, image, stand.layout, memory=memory) as disk:
        memory.write(at, bytes([UNTOUCHED]) * RESPONSE_SIZE)
        (request,) = disk.ring.buffers(FLUSH)
        file.hold()
        posted = disk.add_laid([request, Buffer(at, RESPONSE_SIZE, writable=True)])
        disk.publish()
        file.wait_held()
        yield disk, posted


@case
def a_response_whose_memory_went_away_costs_one_ring(stand: Stand) -> None:
    memory = GuestMemory.flat(8 * MIB)
    with far_disk(stand, memory, 6 * MIB) as (disk, _):
        os.ftruncate(memory.fd, 4 * MIB)
        stand.shim.watch(stand.folder / "far").release()
        assert disk.ring.driver.wait_err()
        assert disk.guest.device.ring_statistics(0).fault is Fault.SIGBUS
        assert stand.disk.exchange() == (RESPONSE_SIZE, DONE)
        os.ftruncate(memory.fd, 8 * MIB)
        position = disk.ring.stop()
        assert position.next_avail == 0
        disk.ring.start(position)
        disk.ring.driver.wait_used()


@case
def a_response_that_is_guest_memory_no_more_costs_one_ring(stand: Stand) -> None:
    memory = GuestMemory.with_hole(8 * MIB, 4 * MIB, 4 * MIB)
    with far_disk(stand, memory, 9 * MIB) as (disk, posted):
        low, _high = regions(memory, disk.guest.mapping)
        with stand.host.parked():
            disk.guest.device.set_regions([low])
        stand.shim.watch(stand.folder / "far").release()
        assert disk.ring.driver.wait_err()
        assert disk.guest.device.ring_statistics(0).fault is Fault.ADDRESS
        assert disk.content(posted) == bytes([UNTOUCHED]) * RESPONSE_SIZE
