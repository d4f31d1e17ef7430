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

from tests.bench import mem_look, pmem_side, recording
from tests.bench.figures import Aim, BenchFailed, Findings, Spread, at_rank
from tests.bench.mem_side import process_s
from tests.bench.native import Echo, Pinger, Programs, Vmm, build
from tests.bench.pmem_host import host_syncs
from tests.bench.pmem_report import report_rates
from tests.bench.pmem_run import turns
from tests.bench.pmem_side import BLOCK, BUILT_IN, NAMES, SHMEM, WINDOW, Syncs, make_images
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


def test_over_four_rounds_each_disk_is_once_at_every_place_and_after_others() -> None:
    rounds = [turns(NAMES, number) for number in range(4)]

    assert [sorted(places) for places in zip(*rounds, strict=True)] == [sorted(NAMES)] * 4
    before = {name: {order[order.index(name) - 1] for order in rounds} for name in NAMES}
    assert min(map(len, before.values())) > 1


def test_images_are_written_in_full_and_say_whose_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pmem_side, "SIZE", 2 * MIB)

    images = make_images(tmp_path)

    assert set(NAMES) < set(images)
    assert {path.stat().st_size for path in images.values()} == {2 * MIB}
    assert min(path.stat().st_blocks * BLOCK_SIZE for path in images.values()) >= 2 * MIB
    marks = {path.read_bytes().rstrip(b"\0") for path in images.values()}
    assert len(marks) == len(images) and all(marks)


def test_the_host_syncs_a_clean_file_and_really_dirty_ones(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(PAGE_SIZE))

    with host_syncs(tmp_path) as host:
        host.turn(image, 3)
        changed = [bytes(scratch.mapping).count(1) for scratch in (host.pages, host.folios)]

        assert len(host.clean) == len(host.pages.dirtied) == len(host.folios.dirtied) == 1
        assert all(0 < turn.p50 <= turn.p99 for turn in (*host.clean, *host.pages.dirtied))
        assert all(count in (1, 2, 3) for count in changed)
    assert image.read_bytes() == bytes(PAGE_SIZE)
    assert list(tmp_path.iterdir()) == [image]


def test_rates_are_held_against_both_and_judged_against_the_built_in_device() -> None:
    def syncs(wall_s: float) -> list[Syncs]:
        return [Syncs(100, wall_s, 1, 1, 1)]

    findings = Findings()
    taken = {SHMEM: syncs(0.5), WINDOW: syncs(2), BUILT_IN: syncs(1), BLOCK: syncs(4)}

    report_rates("writes", taken, findings)

    ratios = [(row.ratio.median, row.aim and row.aim.met(row.ratio)) for row in findings.rows]
    assert ratios == [(2, True), (0.5, False), (8, None)]
    assert [row.ours for row in findings.rows] == ["200 /s", "50 /s", "200 /s"]
    assert findings.samples["writes, /s, virtio-blk"] == [25]
