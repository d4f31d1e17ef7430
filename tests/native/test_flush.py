"""The flush handler: what each request is told, and how few syncs that takes.

What needs a sync that hangs or fails runs in a program of its own, with the files' syncs in the
hands of tests/fakes/sync_shim.py: flush_cases.py.
"""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from vhostd._native import Event, Fault, Image, RingPosition

from tests.fakes.driver import Buffer
from tests.fakes.memory import open_memfd
from tests.fakes.sync_shim import SyncShim
from tests.native.flush_cases import CASES
from tests.native.flush_rig import (
    DONE,
    FAILED,
    FLUSH,
    RESPONSE_SIZE,
    UNTOUCHED,
    Disk,
    disk_on,
    open_image,
)
from tests.native.rig import LAYOUTS, Host, Layout

ROOT = Path(__file__).parents[2]
CASE_LIMIT_S = 60
TAKEN_AT_ONCE = 64  # chains of one ring that may wait for one sync
UNKNOWN_TYPES = (1, 2, 0x100, 0x1_0000, 0x8000_0000, 0xFFFF_FFFF)
KEPT = bytes([UNTOUCHED])

layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=str)


@pytest.fixture(params=LAYOUTS, ids=str)
def disk(request: pytest.FixtureRequest, host: Host, tmp_path: Path) -> Iterator[Disk]:
    """A disk on a real file, with a ring of each kind."""
    with disk_on(host, open_image(tmp_path / "image"), request.param) as disk:
        yield disk


def syncs(disk: Disk) -> int:
    """How often the file was synced."""
    assert disk.image is not None
    return disk.image.statistics().syncs


def serves(disk: Disk) -> None:
    """A legal flush is one sync."""
    before = syncs(disk)
    assert disk.exchange() == (RESPONSE_SIZE, DONE)
    assert syncs(disk) == before + 1


# -- legal requests ------------------------------------------------------------------------------


def test_a_flush_is_one_sync_and_four_bytes(disk: Disk) -> None:
    for turn in range(1, 6):
        assert disk.exchange() == (RESPONSE_SIZE, DONE)
        counters = disk.counters()
        assert (counters.flushes, counters.batches, syncs(disk)) == (turn, turn, turn)
    assert (counters.flush_errors, counters.malformed) == (0, 0)
    assert not disk.guest.host.has_event(disk.guest.device, Event.FLUSH_FAILED)


@layouts
@pytest.mark.parametrize("size", [64, 1024])
def test_a_thousand_flushes_take_few_syncs(
    layout: Layout, size: int, host: Host, tmp_path: Path
) -> None:
    """A ring that holds them all, and one that must be filled again and again."""
    flat = replace(layout, indirect=size == 1024)
    with disk_on(host, open_image(tmp_path / "image"), flat, size) as disk:
        at_once = 1000 if flat.indirect else size // 2
        buffers = [disk.lay() for _ in range(at_once)]
        rounds = -(-1000 // at_once)
        for _ in range(rounds):
            for laid in buffers:
                disk.guest.memory.write(laid[1].guest_addr, KEPT * RESPONSE_SIZE)
            posted = [disk.add_laid(laid) for laid in buffers]
            disk.publish()
            disk.await_all(posted, DONE)
        most = rounds * -(-at_once // TAKEN_AT_ONCE)
        counters = disk.counters()
        assert counters.flushes == rounds * at_once >= 1000
        assert counters.batches == syncs(disk) <= most + rounds
        assert disk.ring.statistics().used == rounds * at_once


@pytest.mark.parametrize("rooms", [(1, 3), (2, 2), (3, 1), (1, 1, 1, 1), (4, 1), (3, 5), (64,)])
def test_a_response_is_four_bytes_wherever_there_is_room(disk: Disk, rooms: tuple[int]) -> None:
    written, content = disk.exchange(rooms=rooms)
    assert written == RESPONSE_SIZE
    assert content == DONE + KEPT * (sum(rooms) - RESPONSE_SIZE)
    assert syncs(disk) == 1


@pytest.mark.parametrize(
    "pieces",
    [
        (b"\0",) * 4,
        (b"\0", b"\0\0\0"),
        (FLUSH + b"\xff" * 60,),
        (FLUSH, b"\xff" * 5000),
        (b"\0\0\0", b"\0" + b"\xff" * 8000),
    ],
    ids=["bytes", "1_and_3", "longer", "much_longer", "cut_and_longer"],
)
def test_a_request_is_its_first_four_bytes(disk: Disk, pieces: tuple[bytes, ...]) -> None:
    assert disk.exchange(pieces, rooms=(1, 3)) == (RESPONSE_SIZE, DONE)
    assert syncs(disk) == 1


@layouts
def test_indirect_chains_are_chains(layout: Layout, host: Host, tmp_path: Path) -> None:
    with disk_on(host, open_image(tmp_path / "image"), replace(layout, indirect=True)) as disk:
        assert disk.exchange([b"\0"] * 4, [1] * 4) == (RESPONSE_SIZE, DONE)
        assert disk.exchange([struct.pack("<I", 1)], [1] * 4) == (RESPONSE_SIZE, FAILED)
        serves(disk)


def test_an_image_that_is_memory_flushes_as_well(host: Host) -> None:
    fd = open_memfd(4096)
    with disk_on(host, Image(fd)) as disk:
        os.close(fd)  # it was duplicated
        serves(disk)


# -- requests that are none ----------------------------------------------------------------------


def failed_without_sync(disk: Disk, pieces: tuple[bytes, ...]) -> None:
    """The request is told -1, and no file is touched."""
    before = disk.counters()
    assert disk.exchange(pieces) == (RESPONSE_SIZE, FAILED)
    counters = disk.counters()
    assert counters.malformed == before.malformed + 1
    assert counters.flush_errors == before.flush_errors + 1
    assert counters.batches == before.batches


@pytest.mark.parametrize("kind", UNKNOWN_TYPES, ids=hex)
def test_an_unknown_type_fails_without_a_sync(disk: Disk, kind: int) -> None:
    failed_without_sync(disk, (struct.pack("<I", kind),))
    assert syncs(disk) == 0
    assert not disk.guest.host.has_event(disk.guest.device, Event.FLUSH_FAILED)
    serves(disk)


@pytest.mark.parametrize(
    "pieces", [(), (b"\0",), (b"\0\0",), (b"\0\0\0",), (b"\0", b"\0", b"\0")], ids=len
)
def test_a_short_request_fails_without_a_sync(disk: Disk, pieces: tuple[bytes, ...]) -> None:
    failed_without_sync(disk, pieces)
    assert syncs(disk) == 0
    serves(disk)


def test_a_short_request_does_not_end_in_what_came_before(disk: Disk) -> None:
    """The room that held another request's bytes is used again."""
    for _ in range(TAKEN_AT_ONCE):
        serves(disk)
    for _ in range(TAKEN_AT_ONCE):
        failed_without_sync(disk, (b"\0\0\0",))


@pytest.mark.parametrize("rooms", [(), (1,), (3,), (1, 2), (1, 1, 1)], ids=str)
def test_where_no_response_fits_nothing_is_written(disk: Disk, rooms: tuple[int, ...]) -> None:
    for turn in range(1, 4):
        assert disk.exchange(rooms=rooms) == (0, KEPT * sum(rooms))
        assert disk.ring.statistics().rejected == turn
        counters = disk.counters()
        assert (counters.malformed, counters.batches, counters.flush_errors) == (turn, 0, 0)
    assert syncs(disk) == 0
    serves(disk)


def test_good_and_bad_at_once_come_back_in_their_order(disk: Disk) -> None:
    wrong = struct.pack("<I", 7)
    sent: list[tuple[tuple[bytes, ...], tuple[int, ...], bytes]] = [
        ((wrong,), (4,), FAILED),
        ((FLUSH,), (2,), KEPT * 2),
        ((FLUSH,), (4,), DONE),
        ((wrong,), (4,), FAILED),
        ((FLUSH,), (3,), KEPT * 3),
        ((FLUSH,), (4,), DONE),
        ((FLUSH[:3],), (4,), FAILED),
    ]
    posted = [disk.add(pieces, rooms) for pieces, rooms, _ in sent]
    disk.publish()
    used = disk.ring.driver.wait_used(len(sent))
    assert [one.token for one in used] == [one.token for one in posted]
    assert [disk.content(one) for one in posted] == [content for _, _, content in sent]
    assert [one.written for one in used] == [4, 0, 4, 4, 0, 4, 4]
    assert syncs(disk) == 1
    counters = disk.counters()
    assert (counters.flushes, counters.flush_errors, counters.malformed) == (5, 3, 5)


def test_a_full_ring_of_nonsense_is_given_back(disk: Disk) -> None:
    for pieces, rooms in (((b"\1\0\0\0",), (4,)), ((FLUSH,), (1,))):
        for _ in range(4):
            count = disk.ring.driver.size // 2
            for _ in range(count):
                disk.add(pieces, rooms)
            disk.publish()
            assert len(disk.ring.driver.wait_used(count)) == count
    assert syncs(disk) == 0
    serves(disk)


def test_a_bad_chain_stops_the_ring_before_the_sync(disk: Disk) -> None:
    """What came before it has no answer, and comes again."""
    serves(disk)
    serves(disk)
    posted = disk.add()
    disk.add_laid([Buffer(1 << 40, 4), Buffer(1 << 40, 4, writable=True)])
    disk.publish()
    assert disk.ring.driver.wait_err()
    assert disk.ring.statistics().fault is Fault.ADDRESS
    assert disk.content(posted) == KEPT * RESPONSE_SIZE
    assert syncs(disk) == 2
    position = disk.ring.stop()
    assert position == RingPosition(4, 4) if disk.ring.layout.packed else RingPosition(2, 2)


# -- failure -------------------------------------------------------------------------------------


def test_an_image_declared_failed_fails_all_flushes_until_it_is_cleared(disk: Disk) -> None:
    host, device, image = disk.guest.host, disk.guest.device, disk.image
    assert image is not None
    serves(disk)
    image.fail(errno.ENODATA)
    image.fail(errno.EIO)  # the first one counts
    for turn in range(1, 4):
        assert disk.exchange() == (RESPONSE_SIZE, FAILED)
        host.wait_event(device, Event.FLUSH_FAILED)
        assert disk.counters().flush_errors == turn
    assert syncs(disk) == 1
    assert image.statistics().failed_errno == errno.ENODATA
    with pytest.raises(OSError, match="sync") as refused:
        image.sync()
    assert refused.value.errno == errno.ENODATA
    image.clear()
    serves(disk)
    assert not host.has_event(device, Event.FLUSH_FAILED)
    assert disk.counters().flush_errors == 3


@layouts
def test_without_an_image_flushes_fail(layout: Layout, host: Host, tmp_path: Path) -> None:
    with disk_on(host, None, layout) as disk:
        for _ in range(3):
            assert disk.exchange() == (RESPONSE_SIZE, FAILED)
            host.wait_event(disk.guest.device, Event.FLUSH_FAILED)
        counters = disk.counters()
        assert (counters.flushes, counters.flush_errors, counters.batches) == (3, 3, 0)
        disk.use(open_image(tmp_path / "image"))
        serves(disk)


@pytest.mark.parametrize("kind", ["pipe", "directory", "path"])
def test_only_files_are_images(kind: str, tmp_path: Path) -> None:
    first, second = os.pipe()
    flags = os.O_PATH if kind == "path" else os.O_RDONLY
    other = os.open(tmp_path, flags)
    with pytest.raises(OSError, match="image") as refused:
        Image(first if kind == "pipe" else other)
    assert refused.value.errno == errno.EINVAL
    for fd in (first, second, other):
        os.close(fd)


# -- syncs that are held, or fail ----------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> SyncShim:
    """What takes the syncs into its hands."""
    return SyncShim.build(tmp_path_factory.mktemp("shim"))


@layouts
@pytest.mark.parametrize("name", CASES)
def test_with_syncs_in_hand(name: str, layout: Layout, library: SyncShim, tmp_path: Path) -> None:
    """See the case's own words."""
    library.forget()
    case = subprocess.run(
        [sys.executable, "-m", "tests.native.flush_cases", name, str(layout), tmp_path],
        cwd=ROOT,
        env={**os.environ, **library.environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=CASE_LIMIT_S,
        check=False,
    )
    assert case.returncode == 0, case.stdout
