"""Who may have an image together: us and us, us and QEMU, in both directions."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from struct import pack, unpack

import pytest
from vhostd.fds import OwnedFd
from vhostd.images.image_file import ImageUnusable, OpenImage, open_image
from vhostd.images.locks import ImageInUse, lock_image
from vhostd.units import MiB

from tests.images.qemu import refusal, user_of
from tests.transport.sockets import no_leak

SIZE = 4 * MiB
BYTES = range(90, 220)  # of the file; QEMU's are 100 and 200 and the few that follow
FLOCK = "=hhxxxxqqixxxx"
RACES = 300


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk0.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture
def other(image: Path) -> Iterator[OwnedFd]:
    """The file, opened by somebody else."""
    with OwnedFd(os.open(image, os.O_RDWR | os.O_CLOEXEC)) as file:
        yield file


def locked_bytes(other: OwnedFd) -> set[int]:
    """Bytes that somebody else has locked."""
    found = set()
    for byte in BYTES:
        request = pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        kind, *_ = unpack(FLOCK, fcntl.fcntl(other.fileno(), fcntl.F_OFD_GETLK, request))
        if kind != fcntl.F_UNLCK:
            assert kind == fcntl.F_RDLCK, "QEMU locks nothing exclusively"
            found.add(byte)
    return found


def lock(file: OwnedFd, kind: int, byte: int) -> None:
    """Lock a byte, whoever else has it."""
    request = pack(FLOCK, kind, os.SEEK_SET, byte, 1, 0)
    fcntl.fcntl(file.fileno(), fcntl.F_OFD_SETLK, request)


def opened(image: Path, *, readonly: bool = False) -> OpenImage:
    found = open_image(image, SIZE, readonly=readonly)
    assert found.locked
    return found


def in_use(image: Path, *, readonly: bool = False) -> str:
    """Why it can't be had."""
    with no_leak(), pytest.raises(ImageUnusable) as caught:
        open_image(image, SIZE, readonly=readonly)
    text = str(caught.value)
    assert text.startswith(f"{image}: another program ") and "\n" not in text
    return text


# -- the bytes -------------------------------------------------------------------------------------


def test_a_writer_uses_read_and_write_and_lets_nobody_write_or_resize(
    image: Path, other: OwnedFd
) -> None:
    with opened(image).file:
        assert locked_bytes(other) == {100, 101, 201, 203}
    assert locked_bytes(other) == set()


def test_a_reader_uses_read_and_lets_nobody_write_or_resize(image: Path, other: OwnedFd) -> None:
    with opened(image, readonly=True).file:
        assert locked_bytes(other) == {100, 201, 203}


@pytest.mark.parametrize(
    ("byte", "readonly", "why"),
    [
        (101, True, "another program writes it"),
        (101, False, "another program writes it"),
        (103, True, "another program resizes it"),
        (200, True, "another program does not let it be used (consistent_read)"),
        (201, False, "another program does not let it be used (write)"),
    ],
)
def test_it_is_said_what_another_program_does(
    image: Path, other: OwnedFd, byte: int, readonly: bool, why: str
) -> None:
    lock(other, fcntl.F_RDLCK, byte)
    assert why in in_use(image, readonly=readonly)
    assert locked_bytes(other) == set(), "what was locked before the refusal is let go"
    lock(other, fcntl.F_UNLCK, byte)
    opened(image, readonly=readonly).file.close()


@pytest.mark.parametrize("byte", [100, 102, 104, 202, 203, 204])
def test_what_another_program_does_beside_us_is_its_own_business(
    image: Path, other: OwnedFd, byte: int
) -> None:
    lock(other, fcntl.F_RDLCK, byte)
    opened(image).file.close()


def test_a_program_that_locks_exclusively_has_it_for_itself(image: Path, other: OwnedFd) -> None:
    lock(other, fcntl.F_WRLCK, 100)
    assert "has it for itself" in in_use(image)


# -- us and us -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [(False, False, False), (False, True, False), (True, False, False), (True, True, True)],
    ids=["writers", "writer-reader", "reader-writer", "readers"],
)
def test_only_readers_have_it_together_even_in_one_process(
    image: Path, first: bool, second: bool, together: bool
) -> None:
    with opened(image, readonly=first).file:
        if together:
            opened(image, readonly=second).file.close()
        else:
            in_use(image, readonly=second)
    opened(image, readonly=second).file.close()


def test_a_link_or_another_name_is_the_same_image(image: Path, tmp_path: Path) -> None:
    (tmp_path / "link.img").symlink_to(image)
    (tmp_path / "name.img").hardlink_to(image)
    with opened(image).file:
        in_use(tmp_path / "link.img")
        in_use(tmp_path / "name.img")


def test_a_copy_of_the_descriptor_keeps_it_and_the_last_one_lets_go(image: Path) -> None:
    mine = opened(image).file
    copy = OwnedFd(os.dup(mine.fileno()))
    mine.close()
    in_use(image)
    copy.close()
    opened(image).file.close()


def test_another_process_keeps_it_and_its_death_lets_go(image: Path) -> None:
    """As a VMM does that has mapped it when the daemon dies."""
    mine = opened(image).file
    code = "import sys; print('here', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[mine.fileno()],
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        mine.close()
        in_use(image)
        process.kill()
        process.wait()
    opened(image).file.close()


def test_of_two_that_come_at_once_never_both_get_it(image: Path) -> None:
    together = threading.Barrier(2)
    now, most = 0, 0
    counting = threading.Lock()

    def come() -> None:
        nonlocal now, most
        for _ in range(RACES):
            together.wait()
            with OwnedFd(os.open(image, os.O_RDWR | os.O_CLOEXEC)) as file:
                try:
                    lock_image(file.fileno(), writable=True)
                except ImageInUse:
                    together.wait()
                    continue
                with counting:
                    now += 1
                    most = max(most, now)
                together.wait()  # until then it is kept
                with counting:
                    now -= 1

    others = [threading.Thread(target=come) for _ in range(2)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert most == 1


# -- us and QEMU -----------------------------------------------------------------------------------


def test_qemu_does_not_write_what_we_have(image: Path) -> None:
    with opened(image).file:
        assert 'Failed to get "write" lock' in refusal(image)
    with user_of(image):
        pass


def test_qemu_does_not_read_what_we_write(image: Path) -> None:
    with opened(image).file:
        assert 'Failed to get shared "write" lock' in refusal(image, readonly=True)


def test_qemu_does_not_write_what_we_read(image: Path) -> None:
    with opened(image, readonly=True).file:
        assert 'Failed to get "write" lock' in refusal(image)


def test_we_don_t_have_what_qemu_writes(image: Path) -> None:
    with user_of(image):
        assert "(write)" in in_use(image) or "writes it" in in_use(image)
        assert "another program writes it" in in_use(image, readonly=True)
    opened(image).file.close()


def test_we_don_t_write_what_qemu_reads(image: Path) -> None:
    with user_of(image, readonly=True):
        assert "does not let it be used (write)" in in_use(image)


def test_readers_go_together_whoever_comes_first(image: Path) -> None:
    with (
        user_of(image, readonly=True),
        opened(image, readonly=True).file,
        user_of(image, readonly=True),
    ):
        pass
    with opened(image, readonly=True).file, user_of(image, readonly=True):
        pass


def test_we_don_t_write_beside_a_qemu_that_would_let_us(image: Path) -> None:
    """share-rw is for cluster file systems; a guest's memory is none."""
    with user_of(image, share_rw=True):
        assert "another program writes it" in in_use(image)
