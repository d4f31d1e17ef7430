"""H98 to H101: a guest and an operator that try a memory device's patience."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest

from tests.fakes.machine import Setup
from tests.fakes.mem import BLOCK_SIZE, BlockState, MemAnswer, MemRequest
from tests.fakes.memory import PAGE_SIZE
from tests.fakes.messages import Status
from tests.fakes.program import wait_until
from tests.hostile.attacks_mem import ATTACKS, MemAttack, hit, prepare, strike
from tests.hostile.mem_machine import (
    PROMPT_S,
    REQUESTED_BLOCKS,
    RINGS,
    SETUPS,
    MemHost,
    MemOracle,
    check_holes,
    cut_holes,
    resize,
    serves,
    setups,
)
from tests.hostile.mem_worker import Worker
from tests.hostile.oracle import GROWTH_MAX_SIZE

WARM_UP = 16
SEEN_MAX_S = 5.0  # from a write to an unplugged block to its report
HUGE_BLOCKS = 1 << 16  # one more than a request can name
CHANGES = 800
STEPS_MAX = 2000
NACKS_MAX = 3
STOPS = 20
STOPS_IN_A_PLUG = 6
MOMENTS = 200
REPEAT_TIME_MAX_S = 1800


def label(attack: MemAttack) -> str:
    """Return the test id."""
    return f"H98-{attack.name}"


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemOracle]:
    """A program that reports violations, and its idle state."""
    host = MemHost(tmp_path_factory.mktemp("mem"))
    try:
        yield MemOracle(host)
    finally:
        host.kill()


@pytest.fixture
def host(oracle: MemOracle) -> Iterator[MemHost]:
    """The same program; it is unharmed after the test."""
    yield oracle.host
    oracle.unharmed()


@pytest.fixture
def preallocating(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemHost]:
    """A program that fills blocks before they may be used."""
    host = MemHost(tmp_path_factory.mktemp("prealloc"), "--prealloc")
    try:
        yield host
    finally:
        host.kill()


# -- H98 -----------------------------------------------------------------------------------------


@setups(SETUPS)
@pytest.mark.parametrize("attack", ATTACKS, ids=label)
def test_program_is_unharmed_by(attack: MemAttack, setup: Setup, host: MemHost) -> None:
    with host.boot(setup) as guest:
        prepare(guest)
        strike(attack, guest)


@pytest.mark.long  # every day: test_growth.py
@pytest.mark.timeout(REPEAT_TIME_MAX_S)
@setups(SETUPS[::3])
@pytest.mark.parametrize("attack", ATTACKS, ids=label)
def test_program_does_not_grow_from(
    attack: MemAttack, setup: Setup, host: MemHost, repeats: int
) -> None:
    program = host.program
    with host.boot(setup) as guest:
        prepare(guest)
        for _ in range(WARM_UP):
            strike(attack, guest)
        before = program.resident_size(), len(program.fds()), len(program.maps())
        for _ in range(repeats):
            hit(attack, guest)
        after = program.resident_size(), len(program.fds()), len(program.maps())
        strike(attack, guest)
    grown_size, grown_fds, grown_maps = (
        now - then for now, then in zip(after, before, strict=True)
    )
    assert grown_size < GROWTH_MAX_SIZE
    assert grown_fds <= 1, "descriptors pile up within a connection"
    assert grown_maps < repeats // 2, "mappings pile up within a connection"


@setups(RINGS)
def test_plugging_beyond_what_is_requested_is_told_no_and_then_to_wait(
    setup: Setup, host: MemHost
) -> None:
    """Linux would ask again at once and for ever after NACK."""
    with host.boot(setup) as guest:
        assert guest.plug(0, REQUESTED_BLOCKS) is MemAnswer.ACK
        for _ in range(NACKS_MAX):
            guest.take_config_changes()
            assert guest.plug(REQUESTED_BLOCKS) is MemAnswer.NACK
            guest.wait_config_change()  # it may not know what is requested
        assert guest.plug(REQUESTED_BLOCKS) is MemAnswer.BUSY
        guest.wait_config_change(PROMPT_S)  # Linux would try again after a minute only
        assert [guest.plug(REQUESTED_BLOCKS) for _ in range(5)] == [MemAnswer.BUSY] * 5
        assert guest.take_config_changes() == 0
        host.resize(REQUESTED_BLOCKS + 1)
        assert guest.plug(REQUESTED_BLOCKS) is MemAnswer.ACK
        assert guest.config().plugged_size == (REQUESTED_BLOCKS + 1) * BLOCK_SIZE


@setups(RINGS)
def test_state_of_as_many_blocks_as_a_request_can_name(
    setup: Setup, tmp_path_factory: pytest.TempPathFactory
) -> None:
    host = MemHost(tmp_path_factory.mktemp("huge"), size=HUGE_BLOCKS * BLOCK_SIZE)
    try:
        with host.boot(setup, HUGE_BLOCKS) as guest:
            most = HUGE_BLOCKS - 1
            assert guest.state(0, most) is BlockState.UNPLUGGED
            assert guest.plug(0, most) is MemAnswer.ACK
            assert guest.state(0, most) is BlockState.PLUGGED
            assert guest.unplug(most - 1) is MemAnswer.ACK
            asked = [(MemRequest.STATE, first, most) for first in (0, 1)] * 32
            posted = guest.post_all(asked)
            guest.queue.wait_used(len(posted), PROMPT_S)
            mixed = (MemAnswer.ACK, BlockState.MIXED)
            assert [guest.read_answer(one) for one in posted] == [mixed] * len(posted)
            assert guest.unplug(0, most - 1) is MemAnswer.ACK
            assert guest.state(0, most) is BlockState.UNPLUGGED
            assert guest.config().plugged_size == 0
        MemOracle(host).unharmed()
    finally:
        host.kill()


@setups(RINGS)
def test_all_is_unplugged_while_a_block_is_being_filled(
    setup: Setup, preallocating: MemHost
) -> None:
    with preallocating.boot(setup) as guest:
        posted = guest.post_all(
            [
                (MemRequest.PLUG, 0, REQUESTED_BLOCKS),
                (MemRequest.UNPLUG_ALL, 0, 0),
                (MemRequest.STATE, 0, REQUESTED_BLOCKS),
                (MemRequest.PLUG, 0, 1),
            ]
        )
        guest.queue.wait_used(len(posted))
        answers = [guest.read_answer(one) for one in posted]
        assert [answer for answer, _ in answers] == [MemAnswer.ACK] * len(posted)
        assert answers[2][1] is BlockState.UNPLUGGED
        assert wait_until(lambda: preallocating.status()["discarding"] == 0, PROMPT_S)
        assert guest.window.blocks() == BLOCK_SIZE, "not filled, or not given back"


# -- H99 -----------------------------------------------------------------------------------------


def sees(host: MemHost, blocks: list[list[int]], size: int) -> bool:
    """Whether the status names just these offending blocks, and so many bytes in them."""
    status = host.status()
    return (status["violating_blocks"], status["violating_size"]) == (blocks, size)


@setups(RINGS)
def test_memory_in_unplugged_blocks_is_reported(setup: Setup, host: MemHost) -> None:
    with host.boot(setup) as guest:
        before = host.status()["violations"]
        assert guest.plug(0, 8) is MemAnswer.ACK
        guest.fill(0, 8, 0xA5)
        for block, page in ((8, 0), (9, 511), (100, 7), (100, 8)):
            guest.window.write(guest.address_of(block) + page * PAGE_SIZE, b"\1")
        guest.window.read(guest.address_of(255), 1)  # a read takes a page as well
        assert wait_until(
            lambda: sees(host, [[8, 2], [100, 1], [255, 1]], 5 * PAGE_SIZE), SEEN_MAX_S
        ), host.status()
        assert host.status()["violations"] == before + 4
        guest.window.write(guest.address_of(200), b"\1")
        now = [[8, 2], [100, 1], [200, 1], [255, 1]]
        assert wait_until(lambda: sees(host, now, 6 * PAGE_SIZE), SEEN_MAX_S), host.status()
        # What is known is not counted again, and what is only reported is left alone.
        assert host.status()["violations"] == before + 5
        assert [guest.pages(block) for block in (8, 9, 100, 200, 255)] == [1, 1, 2, 1, 1]
        assert guest.filled(0, 8, 0xA5)


@setups(RINGS)
def test_a_plugged_block_is_never_reported(setup: Setup, host: MemHost) -> None:
    """Blocks come and go and are used while looks are taken; one canary shows that they were."""
    with host.boot(setup) as guest:
        before = host.status()["violations"]
        assert guest.plug(16, 8) is MemAnswer.ACK
        guest.fill(16, 8, 0x22)
        canaries = (254, 255)
        for seen, canary in enumerate(canaries):
            guest.window.write(guest.address_of(canary), b"\1")
            expected = [[canaries[0], seen + 1]]
            done = False
            while not done:
                done = sees(host, expected, (seen + 1) * PAGE_SIZE)
                for block in range(4):
                    assert guest.plug(block * 2, 2) is MemAnswer.ACK
                    guest.fill(block * 2, 2, 0x11)
                    assert guest.unplug(block * 2, 2) is MemAnswer.ACK
        assert host.status()["violations"] == before + len(canaries)


def test_a_block_offends_no_more_once_it_is_plugged(host: MemHost) -> None:
    with host.boot() as guest:
        guest.window.write(guest.address_of(3), b"\1")
        assert wait_until(lambda: sees(host, [[3, 1]], PAGE_SIZE), SEEN_MAX_S)
        assert guest.plug(3) is MemAnswer.ACK
        assert host.status()["violating_blocks"] == []
        assert wait_until(lambda: sees(host, [], 0), SEEN_MAX_S)


def test_memory_in_unplugged_blocks_is_taken_away(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    host = MemHost(tmp_path_factory.mktemp("discard"), "--on-violation=discard")
    try:
        with host.boot() as guest:
            assert guest.plug(0, 4) is MemAnswer.ACK
            guest.fill(0, 4, 0xA5)
            for turn in (1, 2):
                guest.fill(4, 2, 0x66)
                guest.fill(255, 1, 0x66)
                assert wait_until(lambda: guest.pages(4, 2) == guest.pages(255) == 0, SEEN_MAX_S), (
                    host.status()
                )
                assert guest.window.blocks() == 4 * BLOCK_SIZE
                assert host.status()["violations"] == 3 * turn
            assert guest.filled(0, 4, 0xA5)
            serves(guest)
        MemOracle(host).unharmed()
    finally:
        host.kill()


# -- H100 ----------------------------------------------------------------------------------------


@setups(RINGS)
def test_requested_size_changes_without_pause_while_the_driver_works(
    setup: Setup, host: MemHost
) -> None:
    failures: list[BaseException] = []

    def change() -> None:
        choose = random.Random(100)
        try:
            with host.control() as client:
                for _ in range(CHANGES):
                    resize(client, choose.randrange(65))
                resize(client, REQUESTED_BLOCKS)
        except BaseException as error:
            failures.append(error)
            raise

    with host.boot(setup) as guest:
        before = host.status()["violations"]
        worker = Worker(guest, seed=int(setup.packed))
        operator = threading.Thread(target=change)
        operator.start()
        while operator.is_alive():
            worker.step()
        operator.join()
        assert not failures, failures
        steps = 0
        while not worker.step():
            steps += 1
            assert steps < STEPS_MAX, "what is requested is never reached"
        assert worker.answers <= {MemAnswer.ACK, MemAnswer.NACK, MemAnswer.BUSY}
        assert worker.config_changes > 0
        assert len(worker.plugged) == REQUESTED_BLOCKS
        for block in range(guest.config().usable_size // BLOCK_SIZE):
            expected = BlockState.PLUGGED if block in worker.plugged else BlockState.UNPLUGGED
            assert guest.state(block) is expected
        for block in worker.plugged:
            worker.check(block)
        status = host.status()
        assert (status["plugged"], status["requested"]) == (REQUESTED_BLOCKS * BLOCK_SIZE,) * 2
        assert (status["reached"], status["violations"]) == (True, before)
        assert wait_until(lambda: host.status()["discarding"] == 0, PROMPT_S)
        assert guest.window.blocks() == REQUESTED_BLOCKS * PAGE_SIZE


# -- H101 ----------------------------------------------------------------------------------------


@setups(SETUPS)
def test_unplugged_memory_goes_and_plugged_memory_stays(setup: Setup, host: MemHost) -> None:
    with host.boot(setup) as guest:
        cut_holes(guest)
        check_holes(guest, host)


@setups(SETUPS)
def test_a_stop_and_a_start_keep_all_blocks(setup: Setup, host: MemHost) -> None:
    """What stop, cont and a pause for migration do: rings go on from their bases."""
    with host.boot(setup) as guest:
        cut_holes(guest)
        for _ in range(STOPS):
            guest.machine.stop()
            guest.machine.start(with_memory=False)
            assert guest.state(7) is BlockState.PLUGGED
        check_holes(guest, host)
        serves(guest)


@setups(SETUPS)
@pytest.mark.parametrize("resets", [False, True], ids=["new_rings", "device_reset"])
def test_a_new_driver_finds_all_blocks(setup: Setup, resets: bool, host: MemHost) -> None:
    """An unbound driver may have left its memory in use; kexec's new one unplugs it by itself."""
    with host.boot(setup) as guest:
        cut_holes(guest)
        for _ in range(3):
            if resets:
                guest.machine.stop()
                assert guest.machine.front.set_status(0) == 0
                guest.queue.reset()
                guest.machine.bases = None
                assert guest.machine.front.set_status(Status.ACKNOWLEDGE | Status.DRIVER) == 0
                guest.machine.start(with_memory=False)
            else:
                guest.machine.restart_afresh()
            check_holes(guest, host)
        assert guest.unplug_all() is MemAnswer.ACK
        assert wait_until(lambda: host.status()["discarding"] == 0, PROMPT_S)
        assert guest.window.blocks() == 0


@setups(RINGS)
@pytest.mark.parametrize("prealloc", [False, True], ids=["discarding", "filling"])
def test_a_plug_the_stop_catches_is_carried_out_once(
    setup: Setup, prealloc: bool, host: MemHost, preallocating: MemHost
) -> None:
    """It waits for the host when the ring stops, and comes again when the ring goes on."""
    chosen = preallocating if prealloc else host
    with chosen.boot(setup) as guest:
        before = chosen.status()["violations"]
        assert guest.plug(0, REQUESTED_BLOCKS) is MemAnswer.ACK
        for turn in range(STOPS_IN_A_PLUG):
            guest.fill(0, REQUESTED_BLOCKS, turn + 1)
            posted = guest.post_all(
                [(MemRequest.UNPLUG, 0, REQUESTED_BLOCKS), (MemRequest.PLUG, 0, REQUESTED_BLOCKS)]
            )
            guest.machine.stop()
            guest.machine.start(with_memory=False)
            guest.queue.wait_used(len(posted))
            answers = [guest.read_answer(one)[0] for one in posted]
            assert answers == [MemAnswer.ACK] * 2
            assert guest.state(0, REQUESTED_BLOCKS) is BlockState.PLUGGED
            assert guest.config().plugged_size == REQUESTED_BLOCKS * BLOCK_SIZE
            assert guest.filled(0, REQUESTED_BLOCKS, 0)
            assert guest.state(REQUESTED_BLOCKS, 1) is BlockState.UNPLUGGED
            if prealloc:
                assert guest.window.blocks() == REQUESTED_BLOCKS * BLOCK_SIZE
        assert chosen.status()["violations"] == before


@setups(SETUPS)
def test_a_stop_at_any_moment_has_a_request_carried_out_once(setup: Setup, host: MemHost) -> None:
    """None is lost, and none carried out a second time, which would be an ERROR."""
    with host.boot(setup) as guest:
        for turn in range(MOMENTS):
            kind = MemRequest.UNPLUG if turn % 2 else MemRequest.PLUG
            (posted,) = guest.post_all([(kind, turn // 2 % REQUESTED_BLOCKS, 1)])
            for _ in range(turn % 9):
                guest.config()
            guest.machine.stop()
            guest.machine.start(with_memory=False)
            guest.queue.wait_used()
            assert guest.read_answer(posted)[0] is MemAnswer.ACK
            assert guest.config().plugged_size == (1 - turn % 2) * BLOCK_SIZE
