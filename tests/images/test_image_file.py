"""Images on the host: what is opened, what is refused and in which words, and how one is made."""

from __future__ import annotations

import os
import resource
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from vhostd.fds import OwnedFd
from vhostd.images.image_file import (
    PMEM_ALIGNMENT,
    ImageUnusable,
    create_image,
    look_at,
    open_image,
)
from vhostd.units import MiB

from tests.transport.sockets import link, no_leak

SIZE = 4 * MiB
BLOCK_SIZE = 512  # of st_blocks
ROOT = os.geteuid() == 0
REFUSED_AS_ROOT = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--") if ROOT else ()
SHOW_REFUSAL = """
import sys
from pathlib import Path
from vhostd.images.image_file import ImageUnusable, open_image
try:
    open_image(Path(sys.argv[1]), 4 << 20, readonly=sys.argv[2] == "readonly")
except ImageUnusable as error:
    print(error)
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk0.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def refused(path: Path, size: int = SIZE, *, readonly: bool = False) -> str:
    """The one line that says why it can't be had; nothing stays open."""
    with no_leak(), pytest.raises(ImageUnusable) as caught:
        open_image(path, size, readonly=readonly)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    return text.removeprefix(f"{path}: ")


def run(*command: str) -> str:
    """What a program of the host prints; the test is skipped where it may not."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{command[0]} does not work here: {done.stderr.strip()}")
    return done.stdout.strip()


# -- opened ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("readonly", [False, True])
def test_an_image_is_opened_as_it_is_to_be_used(image: Path, readonly: bool) -> None:
    with no_leak(), closing(open_image(image, SIZE, readonly=readonly)) as opened:
        status, file = image.stat(), opened.file
        assert opened.identity == (status.st_dev, status.st_ino)
        assert (opened.path, opened.file_size, opened.locked) == (image, SIZE, True)
        assert not os.get_inheritable(file.fileno())
        if readonly:
            with pytest.raises(OSError):
                os.pwrite(file.fileno(), b"x", 0)
        else:
            assert os.pwrite(file.fileno(), b"x", SIZE - 1) == 1
    assert image.stat().st_size == SIZE


def test_an_image_may_be_larger_than_its_device(image: Path) -> None:
    with closing(open_image(image, SIZE // 2, readonly=False)) as opened:
        assert opened.file_size == SIZE


def test_a_link_leads_to_its_image(image: Path, tmp_path: Path) -> None:
    path = tmp_path / "link.img"
    path.symlink_to(image)
    with closing(open_image(path, SIZE, readonly=False)) as opened:
        assert link(opened.file.fileno()) == str(image)
        assert opened.identity[1] == image.stat().st_ino


def test_a_block_device_is_an_image(image: Path) -> None:
    if not ROOT:
        pytest.skip("only root makes block devices")
    path = Path(run("losetup", "--find", "--show", str(image)))
    try:
        with closing(open_image(path, SIZE, readonly=False)) as opened:
            state = look_at(opened.file)
            assert (state.file_size, state.allocated, state.free) == (SIZE, SIZE, None)
            assert not state.removed
            refused(path)
        assert f"has {SIZE} bytes" in refused(path, SIZE + PMEM_ALIGNMENT)
    finally:
        subprocess.run(["losetup", "--detach", str(path)], check=True)


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dangling", [False, True])
def test_a_missing_image_comes_with_the_command_that_makes_it(
    tmp_path: Path, dangling: bool
) -> None:
    path = tmp_path / "disk0.img"
    if dangling:
        path.symlink_to(tmp_path / "nowhere")
    expected = f"is not there; make it with: vhostctl pmem create {path} {SIZE}"
    assert refused(path) == expected
    assert refused(path, readonly=True) == expected


def test_an_image_too_short_comes_with_the_command_that_enlarges_it(image: Path) -> None:
    os.truncate(image, SIZE - 1)
    text = refused(image)
    assert f"has {SIZE - 1} bytes, the device is to have {SIZE}" in text
    assert f"truncate -s {SIZE} {image}" in text
    run("truncate", "-s", str(SIZE), str(image))
    open_image(image, SIZE, readonly=False).close()


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [Path.mkdir, make_fifo, make_socket, make_device])
@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.timeout(20)
def test_what_is_no_file_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], None], readonly: bool
) -> None:
    """A pipe nobody writes to would be waited for."""
    path = tmp_path / "thing"
    make(path)
    text = refused(path, readonly=readonly)
    assert text == "is neither a file nor a block device" or text.startswith(
        "can't be opened to be"
    )


def test_a_file_that_may_not_be_written_is_refused_with_the_reason(tmp_path: Path) -> None:
    """A program that runs can be read."""
    path = tmp_path / "program"
    path.write_bytes(Path("/bin/sleep").resolve().read_bytes())
    path.chmod(0o700)
    with subprocess.Popen([path, "100"]) as process:
        try:
            text = refused(path, PMEM_ALIGNMENT)
            assert text == "can't be opened to be written: Text file busy"
            assert "the device is to have" in refused(path, PMEM_ALIGNMENT, readonly=True)
        finally:
            process.kill()


@pytest.mark.parametrize(("readonly", "what"), [("readonly", "read"), ("writable", "written")])
def test_a_file_out_of_reach_is_refused_with_the_reason(
    image: Path, readonly: str, what: str
) -> None:
    image.chmod(0)
    command = [*REFUSED_AS_ROOT, sys.executable, "-c", SHOW_REFUSAL, str(image), readonly]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{image}: can't be opened to be {what}: Permission denied\n"


# -- looked at -------------------------------------------------------------------------------------


def test_what_becomes_of_an_open_image_is_seen(image: Path) -> None:
    with closing(open_image(image, SIZE, readonly=False)) as opened:
        file = opened.file
        state = look_at(file)
        assert (state.file_size, state.allocated, state.removed) == (SIZE, 0, False)
        filesystem = os.statvfs(image)
        assert state.free is not None
        assert 0 < state.free <= filesystem.f_blocks * filesystem.f_frsize
        os.pwrite(file.fileno(), bytes(MiB), 0)
        assert look_at(file).allocated == MiB
        os.truncate(image, SIZE // 2)
        assert look_at(file).file_size == SIZE // 2
        other = image.with_name("other.img")
        other.hardlink_to(image)
        image.unlink()
        assert not look_at(file).removed, "it has another name"
        other.unlink()
        state = look_at(file)
        assert (state.removed, state.file_size) == (True, SIZE // 2)


# -- made ------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new.img"


def not_made(path: Path, size: int, *, preallocate: bool = False) -> str:
    """Why it can't be made; nothing of it is left, open or on disk."""
    before = path.is_symlink() or path.exists()
    with no_leak(), pytest.raises(ImageUnusable) as caught:
        create_image(path, size, preallocate=preallocate)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    assert (path.is_symlink() or path.exists()) is before
    return text.removeprefix(f"{path}: ")


def test_a_new_image_is_sparse_all_zero_and_can_be_served(path: Path) -> None:
    with no_leak():
        create_image(path, 64 * MiB)
    status = path.stat()
    assert (status.st_size, status.st_blocks) == (64 * MiB, 0)
    assert stat.S_IMODE(status.st_mode) & 0o007 == 0, "a guest's disk is not for everybody"
    assert not any(path.read_bytes()[:: 1 << 12])
    open_image(path, 64 * MiB, readonly=False).close()


def test_a_preallocated_image_has_its_room_already(path: Path) -> None:
    create_image(path, 8 * MiB, preallocate=True)
    assert path.stat().st_blocks * BLOCK_SIZE >= 8 * MiB
    assert path.stat().st_size == 8 * MiB


@pytest.mark.parametrize(
    ("size", "below", "above"),
    [
        (0, 0, 2 * MiB),
        (1, 0, 2 * MiB),
        (3 * MiB, 2 * MiB, 4 * MiB),
        (4 * MiB + 1, 4 * MiB, 6 * MiB),
    ],
)
def test_a_size_no_guest_can_map_comes_with_the_next_ones(
    path: Path, size: int, below: int, above: int
) -> None:
    text = not_made(path, size)
    assert f"{size} bytes are no multiple of 2 MiB" in text
    neighbours = f"{below} and {above}" if below else f"is {above}"
    assert text.endswith(neighbours), text


@pytest.mark.parametrize("size", [1 << 63, (1 << 64) - PMEM_ALIGNMENT, (1 << 63) - PMEM_ALIGNMENT])
def test_a_size_no_file_can_have_is_refused(path: Path, size: int) -> None:
    assert f"can't be made {size} bytes large" in not_made(path, size)


def test_what_exists_is_not_touched(image: Path, tmp_path: Path) -> None:
    image.write_bytes(b"precious")
    assert not_made(image, SIZE) == "can't be made: File exists"
    assert image.read_bytes() == b"precious"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert not_made(tmp_path / "link", SIZE) == "can't be made: File exists"
    assert not_made(tmp_path, SIZE) == "can't be made: File exists"


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    assert not_made(tmp_path / "no" / "new.img", SIZE) == "can't be made: No such file or directory"


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_without_leave_for_so_large_a_file_nothing_is_left_of_it(path: Path) -> None:
    with file_size_limit(2 * MiB):
        assert not_made(path, SIZE) == f"can't be made {SIZE} bytes large: File too large"
        create_image(path, 2 * MiB)


def test_without_room_nothing_is_left_of_it(tmp_path: Path) -> None:
    if not ROOT:
        pytest.skip("only root mounts a small file system")
    run("mount", "-t", "tmpfs", "-o", "size=4m", "none", str(tmp_path))
    try:
        path = tmp_path / "new.img"
        create_image(path, 64 * MiB)
        path.unlink()
        text = not_made(path, 64 * MiB, preallocate=True)
        assert text == f"can't be made {64 * MiB} bytes large: No space left on device"
        create_image(path, 4 * MiB - PMEM_ALIGNMENT, preallocate=True)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_it_is_durable_before_it_is_said_to_be_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the file with its size, then the name that leads to it."""
    synced: list[tuple[int, int, int]] = []
    really = os.fsync

    def fsync(fd: int) -> None:
        really(fd)
        status = os.fstat(fd)
        synced.append((status.st_ino, status.st_size, status.st_blocks * BLOCK_SIZE))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.chdir(path.parent)
    create_image(Path(path.name), SIZE, preallocate=True)
    (inode, size, allocated), (folder, *_) = synced
    assert (inode, folder) == (path.stat().st_ino, path.parent.stat().st_ino)
    assert size == SIZE and allocated >= SIZE


def test_a_descriptor_shortage_is_said_and_leaves_nothing(path: Path, image: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = OwnedFd(os.open("/dev/null", os.O_RDONLY))
    lowest = spare.fileno()
    spare.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        with pytest.raises(ImageUnusable, match="Too many open files"):
            create_image(path, SIZE)
        with pytest.raises(ImageUnusable, match="Too many open files"):
            open_image(image, SIZE, readonly=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not path.exists()
