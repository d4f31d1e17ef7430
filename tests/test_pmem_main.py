"""The program vhostd-pmem from outside: options, what it refuses to begin with, and one guest."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from struct import unpack

import pytest
from vhostd.images.image_file import create_image, open_image
from vhostd.units import MiB

from tests.fakes.driver import Buffer
from tests.fakes.machine import Machine, Setup
from tests.fakes.program import Program, executable

PROGRAM = "vhostd-pmem"
SIZE = 64 * MiB
SETUP = Setup(packed=True, queue_count=1)

Finished = subprocess.CompletedProcess[str]


def run(*arguments: str) -> Finished:
    """Run it to its end, which comes at once."""
    return subprocess.run(
        [str(executable(PROGRAM)), *arguments],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk0.img"
    create_image(path, SIZE)
    return path


def options(image: Path, *more: str) -> list[str]:
    """A complete command line; what comes later counts."""
    device = image.with_name("device.sock")
    return [f"--socket-path={device}", f"--file={image}", "--size=64M", *more]


@contextmanager
def serving(image: Path, *more: str) -> Iterator[Program]:
    program = Program.start(PROGRAM, image.parent, [f"--file={image}", "--size=64M", *more])
    try:
        yield program
    finally:
        program.kill()


def flush(machine: Machine) -> bytes:
    """Have the guest flush; what it reads as the result."""
    at = machine.memory.allocate(8)
    machine.memory.write(at, bytes(4) + b"\x55" * 4)
    (queue,) = machine.queues
    queue.add_chain([Buffer(at, 4), Buffer(at + 4, 4, writable=True)])
    queue.kick()
    queue.wait_used()
    return machine.memory.read(at + 4, 4)


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--nonsense",), ("--size=lots", "--socket-path=/nowhere")])
def test_its_capabilities_are_json_whatever_else_is_said(more: tuple[str, ...]) -> None:
    done = run("--print-capabilities", *more)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"type": "pmem", "features": []}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--fd=3"], "either --socket-path=PATH or --fd=NUMBER"),
        (["--size=lots"], "is not a size"),
        (["--mode=nvdimm"], "'nvdimm'"),
        (["--surprise"], "--surprise"),
        (["--size=48M"], "size: 50331648 is no power of two"),
        (["--size=3M"], "size: 3145728 must be a multiple of 2097152"),
        (["--mode=window"], "window_address"),
        (["--mode=window", "--window-address=0x1000"], "window_address: 0x1000"),
        (["--window-address=0x240000000"], "window_address"),
        (["--cold-cache-s=0.5"], "cold_cache_s: 0.5 is out of range"),
        (["--writeback-limit=-1"], "is not a size"),
        (["--readahead=far"], "'far'"),
    ],
)
def test_a_wrong_command_line_is_exit_2_and_says_what(
    image: Path, more: list[str], reason: str
) -> None:
    done = run(*options(image, *more))
    assert (done.returncode, done.stdout) == (2, "")
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert not image.with_name("device.sock").exists()


@pytest.mark.parametrize("missing", ["--socket-path", "--file", "--size"])
def test_what_it_can_t_do_without_is_exit_2(image: Path, missing: str) -> None:
    done = run(*(option for option in options(image) if not option.startswith(missing)))
    assert (done.returncode, done.stdout) == (2, "")
    assert missing in done.stderr


# -- an image that can't be served -----------------------------------------------------------------


def refused(image: Path, *more: str) -> str:
    """The one line with which it ends, having served nobody."""
    done = run(*options(image, *more))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1, done.stderr
    assert not image.with_name("device.sock").exists()
    assert done.stderr.startswith(f"{PROGRAM}: {image}: ")
    return done.stderr.removeprefix(f"{PROGRAM}: {image}: ").strip()


def test_a_missing_image_is_exit_1_with_the_command_that_makes_it(image: Path) -> None:
    image.unlink()
    why = f"is not there; make it with: vhostctl pmem create {image} {SIZE}"
    assert refused(image) == why
    assert refused(image, "--readonly") == why
    assert not image.exists()


def test_an_image_too_short_or_in_use_is_exit_1(image: Path) -> None:
    assert refused(image, "--size=128M").startswith(f"has {SIZE} bytes, the device is to have")
    with closing(open_image(image, SIZE, readonly=False)):
        assert refused(image).startswith("another program ")


def test_the_image_is_looked_at_before_anybody_may_connect(image: Path, tmp_path: Path) -> None:
    image.unlink()
    nowhere = tmp_path / "no" / "device.sock"
    assert refused(image, f"--socket-path={nowhere}").startswith("is not there")


def test_a_socket_that_can_t_be_had_is_exit_2(image: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(image.with_name("device.sock")))
        other.listen()
        done = run(*options(image))
    assert done.returncode == 2
    assert "another process serves this socket" in done.stderr
    assert done.stderr.count("\n") == 1


# -- a guest ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("readonly", [False, True])
def test_a_guest_gets_the_image_and_flushes_it(image: Path, readonly: bool) -> None:
    with serving(image, *(["--readonly"] if readonly else [])) as program:
        with Machine.boot(program.socket_path, SETUP) as machine:
            request = machine.front.next_backend_request()
            (fd,) = request.fds
            assert os.fstat(fd).st_ino == image.stat().st_ino
            assert unpack("=B7xQQQQ", request.payload) == (0, 0, 0, SIZE, int(not readonly))
            access = os.O_RDONLY if readonly else os.O_RDWR
            assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == access
            machine.front.answer_backend_request(request)
            assert flush(machine) == bytes(4)
            request.close_fds()
        assert program.terminate() == 0
        assert not program.socket_path.exists()
    open_image(image, SIZE, readonly=False).close()


def test_the_image_is_found_from_where_it_was_started(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(image.parent)
    with serving(Path(image.name)) as program:
        assert f"/{image.name}" not in program.log()
        with Machine.boot(program.socket_path, SETUP) as machine:
            request = machine.front.next_backend_request()
            assert os.fstat(request.fds[0]).st_ino == image.stat().st_ino
            request.close_fds()


def test_a_vmm_that_is_connected_already_is_served_and_its_end_is_ours(image: Path) -> None:
    """The way of --fd; a VMM that hangs up was all it was there for."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [
                str(executable(PROGRAM)),
                f"--fd={theirs.fileno()}",
                f"--file={image}",
                "--size=64M",
            ],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        try:
            ours.shutdown(socket.SHUT_RDWR)
            assert process.wait(20) == 0
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
