"""The benchmark's own parts: recordings keep every page, figures are right, checks do fail."""

from __future__ import annotations

import os
import socket
import struct
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench import mem_look, recording
from tests.bench.figures import Aim, BenchFailed, Spread, at_rank
from tests.bench.mem_side import process_s
from tests.bench.native import Echo, Pinger, Programs, Vmm, build
from tests.fakes.eventfd import new_eventfd
from tests.fakes.memory import BLOCK_SIZE, MIB, PAGE_SIZE, open_memfd


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return build(tmp_path_factory.mktemp("bench"))


@pytest.fixture
def memory_fd() -> Iterator[int]:
    fd = open_memfd(4 * MIB)
    yield fd
    os.close(fd)


def pages_fd(tmp_path: Path, pages: list[int]) -> int:
    path = tmp_path / "pages"
    path.write_bytes(struct.pack(f"={len(pages)}Q", *(page * PAGE_SIZE for page in pages)))
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


@pytest.mark.parametrize("name", recording.names())
def test_a_recording_is_one_gib_of_pages_in_whole_requests(name: str) -> None:
    found = recording.read(name)

    assert found.size == 1 << 30
    assert {len(request) for request in found.requests()} == {recording.PFNS_PER_REQUEST}
    assert found.end <= 2 << 30
    assert "QEMU" in " ".join(found.origin)


def test_a_stored_recording_is_read_back_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "FOLDER", tmp_path)
    pfns = array("Q", [9, 8, 7, 6, 500, 2, 4, 10, 11, 3000, 100_000, 99_999])

    recording.write(tmp_path / f"x{recording.SUFFIX}", ["here", "QEMU"], pfns)

    assert list(recording.read("x").pfns) == list(pfns)
    assert recording.read("x").origin == ("here", "QEMU")


def test_a_recording_that_names_a_page_twice_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "FOLDER", tmp_path)
    recording.write(tmp_path / f"x{recording.SUFFIX}", [], [5, 6, 5])

    with pytest.raises(ValueError, match="a page twice"):
        recording.read("x")


@pytest.mark.parametrize("letter", ["b", "w"])
def test_discarding_either_way_takes_the_listed_pages_out_of_the_file(
    programs: Programs, memory_fd: int, tmp_path: Path, letter: str
) -> None:
    fd = pages_fd(tmp_path, [7, 3, 4, 900])
    with Vmm(programs, memory_fd, fd) as vmm:
        vmm.ask("p")
        assert vmm.ask("c") == [0]
        assert os.fstat(memory_fd).st_blocks * BLOCK_SIZE == 4 * PAGE_SIZE

        wall_ns, _cpu_ns = vmm.ask(letter)

        assert vmm.ask("c") == [4]
        assert wall_ns > 0
    os.close(fd)
    assert os.fstat(memory_fd).st_blocks == 0


def test_an_echo_answers_every_kick(programs: Programs) -> None:
    kick_fd, call_fd = new_eventfd(), new_eventfd()
    with Echo.on_eventfds(programs, kick_fd, call_fd):
        times = Pinger(programs).eventfd_rounds(kick_fd, call_fd, 50)

    assert len(times) == 50
    assert min(times) > 0
    os.close(kick_fd)
    os.close(call_fd)


def test_a_wrong_answer_on_a_socket_fails(programs: Programs) -> None:
    ours, theirs = socket.socketpair()
    with ours, Echo.on_socket(programs, theirs.fileno(), 40):
        theirs.close()
        with pytest.raises(BenchFailed, match="EPROTO"):
            Pinger(programs).socket_rounds(ours.fileno(), bytes(40), b"x" * 40, 1)


def test_figures_are_ratios_of_pairs_with_interpolated_ranks() -> None:
    assert at_rank([4, 1, 3, 2, 5], 0.5) == 3
    assert at_rank([0, 10], 0.9) == 9
    assert Spread.of_ratios([6, 2, 12], [2, 1, 3]) == Spread(3, 2.2, 3.8, 3)
    assert Aim(3, at_least=True).met(Spread(3, 1, 4, 10))
    assert not Aim(2, at_least=False).met(Spread(2.1, 1, 4, 10))


@pytest.mark.parametrize("name", mem_look.PLUGGED)
def test_looks_at_every_window_go_where_nothing_is_and_are_checked(name: str) -> None:
    with mem_look.window(mem_look.PLUGGED[name]) as window:
        resident = window.mapping.resident_size
        assert resident == len(mem_look.PLUGGED[name]) * PAGE_SIZE

        mem_look.check(window)

        assert window.mapping.resident_size == resident
        window.put_page(mem_look.BLOCKS - 3)
        with pytest.raises(BenchFailed, match="blocks that have none"):
            mem_look.check(window)


def test_the_processor_time_of_a_process_is_what_its_own_clock_says() -> None:
    before = time.process_time()
    found = process_s(os.getpid())
    assert before <= found <= time.process_time()
