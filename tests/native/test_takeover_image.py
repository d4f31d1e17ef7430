"""What a successor knows of an image: its failure, and of a sync nobody saw the end of.

A write error is real where this machine lets us have one: a loop device on a file that has no room.
Otherwise the calls themselves are recorded.
"""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from vhostd._native import Image
from vhostd._native._core import ffi

from tests.fakes.memory import MIB, open_memfd
from tests.fakes.sync_shim import SyncShim

IMAGE_SIZE = 8 * MIB
ROOM = "1m"
SYNCING = ffi.offsetof("struct vhd_image_shared", "syncing")
VERSION = ffi.offsetof("struct vhd_image_shared", "version")

SYNC_ONCE = """
import os, sys
from vhostd._native import Image
fd, witness_fd = (os.open(sys.argv[1], os.O_RDWR) for _ in range(2))
image = Image(fd, witness_fd)
if sys.argv[2] == "died":
    os.pwrite(image.shared_fd, b"\\1", int(sys.argv[3]))
image = Image(fd, witness_fd, image.shared_fd)
for _ in range(2):
    try:
        image.sync()
        print(0)
    except OSError as error:
        print(error.errno)
"""


def died_in_a_sync(image: Image) -> None:
    """Leave what a predecessor leaves that is killed there."""
    os.pwrite(image.shared_fd, struct.pack("<I", 1), SYNCING)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A block device that can't write most of what it is given."""
    small = tmp_path / "small"
    small.mkdir()
    with ExitStack() as held:
        try:
            _run("mount", "-t", "tmpfs", "-o", f"size={ROOM}", "none", str(small))
            held.callback(_run, "umount", str(small))
            with (small / "image").open("wb") as file:
                file.truncate(IMAGE_SIZE)
            device = _run("losetup", "--find", "--show", str(small / "image"))
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("no loop devices here")
        held.callback(_run, "losetup", "--detach", device)
        yield Path(device)


def _run(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def opened(disk: Path) -> Iterator[tuple[int, int]]:
    """The device, and a witness."""
    with ExitStack() as held:
        fds = []
        for flags in (os.O_RDWR, os.O_RDONLY):
            fds.append(os.open(disk, flags))
            held.callback(os.close, fds[-1])
        yield fds[0], fds[1]


def write_too_much(fd: int) -> None:
    """More than there is room for."""
    os.pwrite(fd, os.urandom(4 * MIB), 0)


def sync_lost(image: Image, fd: int) -> None:
    """The kernel tells of an error, and who is told dies before it can pass it on."""
    write_too_much(fd)
    with pytest.raises(OSError) as failure:
        os.fdatasync(fd)
    assert failure.value.errno == errno.EIO
    died_in_a_sync(image)


def test_an_error_its_predecessor_was_told_of_as_it_died_is_found(
    opened: tuple[int, int],
) -> None:
    fd, witness_fd = opened
    image = Image(fd, witness_fd)
    image.sync()
    sync_lost(image, fd)
    heir = Image(fd, witness_fd, image.shared_fd)
    for _ in range(2):
        with pytest.raises(OSError) as failure:
            heir.sync()
        assert failure.value.errno == errno.EIO
    heir.clear()
    heir.sync()
    # Nor is what was cleared found again.
    died_in_a_sync(heir)
    last = Image(fd, witness_fd, heir.shared_fd)
    last.sync()
    for one in (image, heir, last):
        one.close()


def test_without_a_witness_it_is_lost(opened: tuple[int, int]) -> None:
    """This is why there is one."""
    fd, _ = opened
    image = Image(fd)
    image.sync()
    sync_lost(image, fd)
    heir = Image(fd, -1, image.shared_fd)
    heir.sync()
    image.close()
    heir.close()


def test_an_error_that_was_seen_and_cleared_is_not_found_by_the_witness_later(
    opened: tuple[int, int],
) -> None:
    fd, witness_fd = opened
    image = Image(fd, witness_fd)
    write_too_much(fd)
    with pytest.raises(OSError):
        image.sync()
    image.clear()
    image.sync()
    died_in_a_sync(image)
    heir = Image(fd, witness_fd, image.shared_fd)
    heir.sync()
    image.close()
    heir.close()


@pytest.mark.parametrize(("fate", "syncs"), [("died", 3), ("lives", 2)])
def test_the_witness_is_asked_once_and_only_after_a_death_in_a_sync(
    fate: str, syncs: int, tmp_path: Path
) -> None:
    shim, image = SyncShim.build(tmp_path), tmp_path / "image"
    image.write_bytes(bytes(4096))
    file = shim.watch(image)
    assert _sync_once(shim, image, fate) == [0, 0]
    assert len(file.syncs()) == syncs


def test_an_error_of_either_sync_is_the_image_s(tmp_path: Path) -> None:
    shim, image = SyncShim.build(tmp_path), tmp_path / "image"
    image.write_bytes(bytes(4096))
    file = shim.watch(image)
    file.hold()
    with _syncing(shim, image, "died") as process:
        file.wait_held(1)
        file.release_one()
        file.wait_held(2)  # the witness
        file.fail(errno.EIO, calls=1)
        file.release()
        output, _ = process.communicate(timeout=30)
    assert output.split() == [str(errno.EIO)] * 2
    assert [call.error for call in file.syncs()] == [0, errno.EIO]


def _syncing(shim: SyncShim, image: Path, fate: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SYNC_ONCE, str(image), fate, str(SYNCING)]
    environment = {**os.environ, **shim.environment()}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def _sync_once(shim: SyncShim, image: Path, fate: str) -> list[int]:
    with _syncing(shim, image, fate) as process:
        output, _ = process.communicate(timeout=30)
    return [int(word) for word in output.split()]


def test_a_failure_is_inherited(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    with path.open("r+b") as file:
        image = Image(file.fileno())
        image.sync()
        image.fail(errno.ENOSPC)
        heir = Image(file.fileno(), -1, image.shared_fd)
        with pytest.raises(OSError) as failure:
            heir.sync()
        assert failure.value.errno == errno.ENOSPC
        assert heir.statistics() == image.statistics()
        assert heir.statistics().syncs == 1
        image.close()
        heir.close()


def test_what_is_not_of_this_image_is_refused(tmp_path: Path) -> None:
    paths = [tmp_path / "image", tmp_path / "other"]
    for path in paths:
        path.write_bytes(bytes(4096))
    empty = open_memfd(4096)
    with paths[0].open("r+b") as file, paths[1].open("rb") as other:
        with pytest.raises(OSError) as refusal:
            Image(file.fileno(), other.fileno())
        assert refusal.value.errno == errno.EINVAL
        with pytest.raises(OSError) as refusal:
            Image(file.fileno(), -1, empty)
        assert refusal.value.errno == errno.EPROTO
        image = Image(file.fileno())
        os.pwrite(image.shared_fd, b"\xff", VERSION)
        with pytest.raises(OSError) as refusal:
            Image(file.fileno(), -1, image.shared_fd)
        assert refusal.value.errno == errno.EPROTO
        image.close()
    os.close(empty)
