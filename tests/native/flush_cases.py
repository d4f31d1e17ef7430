"""Flushes whose sync hangs, fails or ends too late: each case runs in a program of its own.

    SYNC_SHIM=FILE LD_PRELOAD=sync_shim.so python -m tests.native.flush_cases CASE LAYOUT FOLDER

test_flush.py starts them. Here is what is answered, and what fails; flush_held.py has what happens
meanwhile. Knows vhostd._native and the fake guest; must not know the protocol.
"""

from __future__ import annotations

import errno
import sys
import threading
import time
from functools import partial
from pathlib import Path

from vhostd._native import Event

from tests.fakes.sync_shim import SyncKind
from tests.native import flush_held
from tests.native.flush_rig import DONE, FAILED, FLUSH, RESPONSE_SIZE, UNTOUCHED
from tests.native.flush_stand import CASES, QUIET_S, Stand, case, stand
from tests.native.rig import LAYOUTS

__all__ = ["CASES"]

LOOP = 200
assert flush_held.CASES is CASES  # its cases are among them


# -- answers -------------------------------------------------------------------------------------


@case
def no_answer_comes_before_its_sync_returned(stand: Stand) -> None:
    posted = stand.hold(3)
    stand.quiet(posted)
    stand.file.release()
    stand.disk.await_all(posted, DONE)
    (call,) = stand.file.calls()
    assert (call.ended, call.error, call.kind) == (True, 0, SyncKind.FSYNC)


@case
def every_answer_has_a_sync_that_began_after_its_request(stand: Stand) -> None:
    laid = [stand.disk.lay() for _ in range(8)]
    for turn in range(LOOP):
        published_ns = time.monotonic_ns()
        posted = [stand.disk.add_laid(buffers) for buffers in laid[: turn % 8 + 1]]
        stand.disk.publish()
        for one in posted:
            (used,) = stand.disk.ring.driver.wait_used()
            seen_ns = time.monotonic_ns()
            assert (used.token, stand.disk.content(one)) == (one.token, DONE)
            assert stand.file.covered(published_ns, seen_ns), f"turn {turn}"
    assert len(stand.file.calls()) == stand.disk.counters().batches == LOOP


@case
def the_first_sync_takes_along_the_size_and_later_ones_the_data(stand: Stand) -> None:
    for _ in range(3):
        assert stand.disk.exchange() == (RESPONSE_SIZE, DONE)
    kinds = [call.kind for call in stand.file.calls()]
    assert kinds == [SyncKind.FSYNC, SyncKind.FDATASYNC, SyncKind.FDATASYNC]


@case
def what_comes_during_a_sync_is_answered_by_the_next(stand: Stand) -> None:
    first = stand.hold(2)
    later = stand.disk.post(5)
    stand.quiet([*first, *later])
    stand.file.release_one()
    stand.disk.await_all(first, DONE)
    stand.file.wait_held(2)
    stand.forget_calls()
    stand.quiet(later)
    stand.file.release()
    stand.disk.await_all(later, DONE)
    assert len(stand.file.calls()) == stand.disk.counters().batches == 2


@case
def what_is_no_flush_touches_no_file(stand: Stand) -> None:
    assert stand.disk.exchange([b"\1\0\0\0"]) == (RESPONSE_SIZE, FAILED)
    assert stand.disk.exchange([FLUSH[:3]]) == (RESPONSE_SIZE, FAILED)
    assert stand.disk.exchange(rooms=(3,)) == (0, bytes([UNTOUCHED]) * 3)
    assert stand.file.calls() == []


# -- errors --------------------------------------------------------------------------------------


def stays_failed(stand: Stand, error: int) -> None:
    """One sync fails, all later ones would go well; no flush does until it is cleared."""
    disk, image = stand.disk, stand.disk.image
    assert image is not None
    assert disk.exchange() == (RESPONSE_SIZE, DONE)
    assert not stand.host.has_event(disk.guest.device, Event.FLUSH_FAILED)
    stand.file.fail(error, 1)
    for _ in range(5):
        assert disk.exchange() == (RESPONSE_SIZE, FAILED)
        stand.host.wait_event(disk.guest.device, Event.FLUSH_FAILED)
    assert [call.error for call in stand.file.calls()] == [0, error]
    assert image.statistics().failed_errno == error
    image.clear()
    assert disk.exchange() == (RESPONSE_SIZE, DONE)
    assert [call.error for call in stand.file.calls()] == [0, error, 0]
    counters = disk.counters()
    assert (counters.flushes, counters.flush_errors, counters.malformed) == (7, 5, 0)


for _error in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
    CASES[f"after_{errno.errorcode[_error]}_all_fail_until_cleared"] = partial(
        stays_failed, error=_error
    )


@case
def all_of_a_batch_fail_together(stand: Stand) -> None:
    stand.file.fail(errno.EIO, 1)
    posted = stand.hold(10)
    later = stand.disk.post(3)
    stand.file.release()
    stand.disk.await_all(posted, FAILED)
    stand.disk.await_all(later, FAILED)
    assert len(stand.file.calls()) == 1


@case
def a_disk_that_fails_for_ever_fails_again_after_clearing(stand: Stand) -> None:
    image = stand.disk.image
    assert image is not None
    stand.file.fail(errno.EIO)
    for turn in range(1, 4):
        assert stand.disk.exchange() == (RESPONSE_SIZE, FAILED)
        assert len(stand.file.calls()) == turn
        image.clear()
    stand.file.heal()
    assert stand.disk.exchange() == (RESPONSE_SIZE, DONE)


@case
def an_interrupted_sync_is_made_again(stand: Stand) -> None:
    stand.file.fail(errno.EINTR, 3)
    assert stand.disk.exchange() == (RESPONSE_SIZE, DONE)
    assert [call.error for call in stand.file.calls()] == [errno.EINTR] * 3 + [0]


@case
def an_operator_and_the_guest_never_sync_at_once(stand: Stand) -> None:
    """The kernel tells a write error once: two at a time would share out who learns of it."""
    image = stand.disk.image
    assert image is not None
    told: list[int | None] = []

    def flush() -> None:
        try:
            image.sync()
        except OSError as error:
            told.append(error.errno)

    posted = stand.hold()
    stand.file.fail(errno.EIO, 1)
    operator = threading.Thread(target=flush)
    operator.start()
    operator.join(QUIET_S)
    assert operator.is_alive()
    assert len(stand.file.calls()) == 1
    stand.file.release()
    operator.join()
    stand.disk.await_all(posted, FAILED)
    assert told == [errno.EIO]
    assert len(stand.file.calls()) == 1


def main() -> None:
    """Run one case."""
    name, label, folder = sys.argv[1:]
    (layout,) = (layout for layout in LAYOUTS if str(layout) == label)
    with stand(layout, Path(folder)) as opened:
        try:
            CASES[name](opened)
        finally:
            for raw in ("image", "other", "far"):  # whatever is held would hold us
                path = Path(folder) / raw
                if path.exists():
                    opened.shim.watch(path).release()


if __name__ == "__main__":
    main()
