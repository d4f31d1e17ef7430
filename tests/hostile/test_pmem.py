"""H102, H103, H66: a guest that sends nonsense, and disks that hang or fail."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakes.frontend import FrontEnd
from tests.fakes.machine import Setup
from tests.fakes.messages import Request
from tests.fakes.program import wait_until
from tests.fakes.sync_shim import SyncShim, WatchedFile
from tests.hostile.attacks_pmem import ATTACKS, PmemAttack, strike
from tests.hostile.oracle import GROWTH_MAX_SIZE
from tests.hostile.pmem_machine import (
    DONE,
    FAILED,
    IMAGE_SIZE,
    PROMPT_S,
    RESPONSE_SIZE,
    RINGS,
    SETUPS,
    VM_PATH,
    PmemHost,
    PmemOracle,
    memory_folder,
    serves,
    setups,
)

WARM_UP = 16
REPEAT_TIME_MAX_S = 1800
STOP_MAX_S = 5.0  # from GET_VRING_BASE to its answer, whatever the disk does


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PmemOracle]:
    """A program and its idle state."""
    folder = tmp_path_factory.mktemp("pmem")
    with memory_folder() as fast:
        host = PmemHost(folder, fast / "image")
        try:
            yield PmemOracle(host)
        finally:
            host.kill()


@pytest.fixture
def host(oracle: PmemOracle) -> Iterator[PmemHost]:
    """The same program; it is unharmed after the test."""
    yield oracle.host
    oracle.unharmed()


@dataclass
class Disk:
    """A program whose image's syncs are in the test's hands; it lives on unless it is ended."""

    host: PmemHost
    file: WatchedFile
    ended: bool = False


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> SyncShim:
    """What takes syncs into its hands."""
    return SyncShim.build(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def disk(shim: SyncShim, tmp_path: Path) -> Iterator[Disk]:
    """A program of its own for each test; it lives at the end, and has said nothing bad."""
    shim.forget()
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(IMAGE_SIZE)
    with shim.preloaded():
        host = PmemHost(tmp_path, image)
    disk = Disk(host, shim.watch(image))
    try:
        yield disk
        assert disk.ended or host.program.alive(), host.program.log()
        assert "Traceback" not in host.program.log(), host.program.log()
    finally:
        disk.file.release()
        host.kill()


# -- H102, H103 ----------------------------------------------------------------------------------


def label(attack: PmemAttack) -> str:
    """Return the test id."""
    return f"H102-{attack.name}"


@setups(SETUPS)
@pytest.mark.parametrize("attack", ATTACKS, ids=label)
def test_program_is_unharmed_by(attack: PmemAttack, setup: Setup, host: PmemHost) -> None:
    before = host.image.read_bytes()
    with host.boot(setup) as guest:
        strike(attack, guest)
        assert guest.told_nothing()
    assert host.image.read_bytes() == before


@pytest.mark.long  # every day: test_growth.py
@pytest.mark.timeout(REPEAT_TIME_MAX_S)
@setups(SETUPS[::3])
@pytest.mark.parametrize("attack", ATTACKS, ids=label)
def test_program_does_not_grow_from(
    attack: PmemAttack, setup: Setup, host: PmemHost, repeats: int
) -> None:
    program = host.program
    with host.boot(setup) as guest:
        for _ in range(WARM_UP):
            strike(attack, guest)
        before = program.resident_size(), len(program.fds()), len(program.maps())
        for _ in range(repeats):
            strike(attack, guest)
        after = program.resident_size(), len(program.fds()), len(program.maps())
    grown_size, grown_fds, grown_maps = (
        now - then for now, then in zip(after, before, strict=True)
    )
    assert grown_size < GROWTH_MAX_SIZE
    assert grown_fds <= 1, "descriptors pile up within a connection"
    assert grown_maps < repeats // 2, "mappings pile up within a connection"


def test_what_was_wrong_is_counted(host: PmemHost) -> None:
    before = host.status()
    with host.boot() as guest:
        assert guest.exchange([b"\1\0\0\0"]) == (RESPONSE_SIZE, FAILED)
        guest.exchange(rooms=(2,))
        serves(guest)
        after = host.status()
    grown = [after[key] - before[key] for key in ("flushes", "flush_errors", "malformed")]
    assert grown == [2, 1, 2]
    assert host.status().items() >= {"flushes": after["flushes"], "failed": None}.items()


@setups(RINGS)
def test_a_thousand_flushes_take_few_syncs(setup: Setup, disk: Disk) -> None:
    with disk.host.boot(setup) as guest:
        serves(guest)
        disk.file.hold()
        posted = [guest.post(now=False) for _ in range(guest.most_at_once)]
        guest.queue.publish()
        guest.queue.notify()
        disk.file.wait_held(2)
        disk.file.release()
        guest.await_all(posted, DONE)
        assert len(disk.file.syncs()) == 2
        rounds = 1000 // guest.most_at_once
        for _ in range(rounds):
            published_ns = time.monotonic_ns()
            guest.flush_many(guest.most_at_once)
            assert disk.file.covered(published_ns, time.monotonic_ns())
        assert len(disk.file.syncs()) <= 2 + 2 * rounds


@setups(RINGS)
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_failed_sync_is_never_retried_into_success(error: int, setup: Setup, disk: Disk) -> None:
    """Not by the next flush, not by a driver that starts again, not by another VMM."""
    host = disk.host
    with host.boot(setup) as guest:
        serves(guest)
        disk.file.fail(error, 1)
        for _ in range(3):
            assert guest.exchange() == (RESPONSE_SIZE, FAILED)
        assert host.shows(flush_errors=3, mapped=True)
        assert host.status()["failed"].startswith("sync: ")
        guest.machine.restart_afresh()
        assert guest.exchange() == (RESPONSE_SIZE, FAILED)
    with host.boot(setup) as guest:
        assert guest.exchange() == (RESPONSE_SIZE, FAILED)
        assert [call.error for call in disk.file.syncs()] == [0, error]
        host.clear()
        serves(guest)
        assert host.shows(failed=None, flush_errors=5)
    # One is of clearing: the second open file must forget the error, too.
    assert [call.error for call in disk.file.syncs()] == [0, error, 0, 0]


# -- H66 -----------------------------------------------------------------------------------------


@setups(SETUPS)
def test_the_vmm_stops_and_starts_the_device_while_a_sync_hangs(setup: Setup, disk: Disk) -> None:
    """QEMU stands still for as long as GET_VRING_BASE has no answer."""
    with disk.host.boot(setup) as guest:
        machine = guest.machine
        disk.file.hold()
        posted = [guest.post(now=False) for _ in range(3)]
        guest.queue.publish()
        guest.queue.notify()
        disk.file.wait_held()
        for _ in range(3):
            began_s = time.monotonic()
            bases = machine.stop()
            assert time.monotonic() - began_s < STOP_MAX_S
            assert bases == [guest.queue.start_base()]
            assert machine.front.get_config(0, 16) == bytes(16)
            machine.start(with_memory=False)
            assert guest.told_nothing()
        assert len(disk.file.syncs()) == 1
        assert guest.queue.collect() == []
        disk.file.release()
        guest.await_all(posted, DONE)
        serves(guest)
        assert disk.host.status()["flushes"] == 4


def test_all_else_goes_on_while_a_sync_hangs(disk: Disk) -> None:
    """Messages, a new memory table, the operator's looks."""
    with disk.host.boot() as guest:
        disk.file.hold()
        posted = guest.post()
        disk.file.wait_held()
        began_s = time.monotonic()
        for _ in range(20):
            guest.machine.front.get_features()
            guest.machine.front.get_config(0, 16)
            guest.send_table(image=False)
            guest.send_table()
        assert disk.host.status()["mapped"]
        assert time.monotonic() - began_s < PROMPT_S / 2
        assert len(disk.file.syncs()) == 1
        disk.file.release()
        guest.await_all([posted], DONE)


def test_a_sync_that_fails_after_its_vmm_has_gone_is_remembered(disk: Disk) -> None:
    """The pages it could not write count as clean: the next VMM must not be told they are safe."""
    host = disk.host
    with host.boot() as guest:
        disk.file.fail(errno.EIO, 1)
        disk.file.hold()
        guest.post()
        disk.file.wait_held()
    with FrontEnd.connect(host.program.socket_path) as early:
        early.send(Request.GET_FEATURES)
        disk.file.release()  # before that it is not served, and not turned away at once either
        early.receive_reply(Request.GET_FEATURES)
    assert host.shows(failed="sync: Input/output error")
    with host.boot() as guest:
        assert guest.exchange() == (RESPONSE_SIZE, FAILED)
        host.clear()
        serves(guest)


def test_a_vmm_is_turned_away_while_the_last_one_s_sync_hangs(disk: Disk) -> None:
    """It is not kept waiting for ever, and what comes of that sync is remembered all the same."""
    host = disk.host
    with host.boot() as guest:
        disk.file.fail(errno.EIO, 1)
        disk.file.hold()
        guest.post()
        disk.file.wait_held()
    with FrontEnd.connect(host.program.socket_path) as early:
        assert early.wait_closed(PROMPT_S)
    assert host.stands("another program")
    disk.file.release()
    assert host.shows(failed="sync: Input/output error")
    with host.boot() as guest:
        assert guest.exchange() == (RESPONSE_SIZE, FAILED)
        host.clear()
        serves(guest)


def test_vmms_that_come_and_go_during_a_sync_are_served_after_it(disk: Disk) -> None:
    host = disk.host
    for turn in range(10):
        before = len(disk.file.syncs())
        with host.boot() as guest:
            disk.file.hold()
            guest.post()
            disk.file.wait_held(before + 1)
        disk.file.release()
        with host.boot() as guest:
            serves(guest)
        assert len(disk.file.syncs()) == before + 2, turn
    assert host.status()["flush_errors"] == 0


def test_an_operator_s_flush_outlives_the_vmm(disk: Disk) -> None:
    """What it works on is not taken away under it; the next VMM waits for it as for any other."""
    host = disk.host
    answers: list[int] = []

    def flush() -> None:
        with host.control() as client:
            answers.append(client.post(f"{VM_PATH}/flush", json={}).status_code)

    with host.boot() as guest:
        serves(guest)
        disk.file.hold()
        operator = threading.Thread(target=flush)
        operator.start()
        disk.file.wait_held(2)
    with FrontEnd.connect(host.program.socket_path) as early:
        early.send(Request.GET_FEATURES)
        disk.file.release()
        early.receive_reply(Request.GET_FEATURES)
    operator.join()
    assert answers == [200]
    assert len(disk.file.syncs()) == 2


def test_vmms_that_hang_up_at_once_harm_nothing(host: PmemHost) -> None:
    """The image is being looked at when they go."""
    for turn in range(100):
        with host.realize() as guest:
            if turn % 3:
                guest.machine.front.get_features()
    for _ in range(100):
        FrontEnd.connect(host.program.socket_path).close()


def test_the_program_ends_when_its_last_sync_does(disk: Disk) -> None:
    program = disk.host.program
    with disk.host.boot() as guest:
        disk.file.hold()
        guest.post()
        disk.file.wait_held()
        disk.ended = True
        program.process.terminate()
        assert guest.machine.front.wait_closed(PROMPT_S)
        disk.file.release()
        assert wait_until(lambda: not program.alive(), PROMPT_S)
        assert program.process.returncode == 0
