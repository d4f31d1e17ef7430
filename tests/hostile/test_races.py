"""H45, H52, H82, H87: what needs a second hand at the same time."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from tests.fakes import handshake, messages
from tests.fakes.balloon import BalloonDriver, BalloonQueue, pack_pfns
from tests.fakes.driver import DESCRIPTOR_SIZE, Buffer
from tests.fakes.eventfd import drain, wait_readable
from tests.fakes.machine import Machine, Setup
from tests.fakes.memory import MIB, PAGE_SIZE, open_memfd
from tests.fakes.messages import ProtocolFeature, Request
from tests.hostile.attack import DEADLINE_S, accepted, check_quarantined, closing, serves
from tests.hostile.attacks_framing import SPARE
from tests.hostile.oracle import Oracle

pytestmark = pytest.mark.alone

HAMMER_TIME_S = 2.0
STORM_TIME_S = 1.0
REPLY_TIME_MAX_S = 0.5  # under the storm, on a busy test machine; the promise is 50 ms
LOOK_S = 0.02
RING_SETUPS = [
    Setup(packed=packed, event_idx=True, indirect=indirect)
    for packed in (False, True)
    for indirect in (False, True)
]


@contextlib.contextmanager
def hammering(machine: Machine, ranges: list[tuple[int, int]], seed: int) -> Iterator[None]:
    """Let another process rewrite guest ranges (address, size)."""
    memory = machine.memory
    numbers = [str(n) for address, size in ranges for n in (memory.file_offset(address), size)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.hostile.hammer", str(memory.fd), str(seed), *numbers],
        pass_fds=[memory.fd],
    )
    try:
        yield
        assert process.poll() is None, "the hammer ended by itself"
    finally:
        process.kill()
        process.wait(DEADLINE_S)


@pytest.mark.parametrize("setup", RING_SETUPS, ids=lambda setup: setup.label)
@pytest.mark.parametrize("index", [BalloonQueue.INFLATE, BalloonQueue.STATS, BalloonQueue.REPORT])
def test_ring_rewritten_while_it_is_parsed(
    setup: Setup, index: BalloonQueue, oracle: Oracle
) -> None:
    """H82: whatever is read twice is read differently the second time."""
    with Machine.boot(oracle.program.socket_path, setup) as machine:
        guest = BalloonDriver(machine)
        queue = machine.queues[index]
        ring = (queue.parts.desc, queue.size * DESCRIPTOR_SIZE)
        avail = (queue.parts.avail, 4 + 2 * queue.size if not setup.packed else 4)
        table = (13 * MIB, 64 * DESCRIPTOR_SIZE)
        lists = (12 * MIB, PAGE_SIZE)
        restarts = 0
        with hammering(machine, [ring, avail, table, lists], seed=int(index)):
            begun = time.monotonic()
            # Longer where the hammer got no processor and has not hit yet.
            while time.monotonic() < begun + (HAMMER_TIME_S if restarts else DEADLINE_S):
                queue.kick()
                if wait_readable(queue.err_fd, LOOK_S):
                    drain(queue.err_fd)
                    restarts += 1
                    machine.front.get_vring_base(index)
                    handshake.set_up_ring(machine.front, machine.memory, index, queue)
                    assert machine.front.set_vring_enable(index, True) == 0
                drain(queue.call_fd)
        assert restarts, "the ring was never found broken: the hammer missed"
        machine.restart_ring(index)
        if index is not BalloonQueue.STATS:
            serves(guest, index)
        serves(guest, BalloonQueue.DEFLATE)
    oracle.unharmed()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_memory_file_truncated_under_a_request(packed: bool, oracle: Oracle) -> None:
    """H45: page numbers lie where the file was cut off: a fault of that queue, not our death."""
    with Machine.boot(oracle.program.socket_path, Setup(packed=packed)) as machine:
        guest = BalloonDriver(machine)
        with closing(open_memfd(MIB)) as (fd,):
            slot = messages.memory_slot(SPARE)
            accepted(guest, Request.ADD_MEM_REG, slot, [fd])
            os.truncate(fd, 0)
            queue = guest.queue(BalloonQueue.INFLATE)
            queue.add_chain([Buffer(SPARE.guest_addr, 64)])
            queue.kick()
            check_quarantined(guest, BalloonQueue.INFLATE)
            accepted(guest, Request.REM_MEM_REG, slot)
        machine.restart_ring(BalloonQueue.INFLATE)
        serves(guest)
    oracle.unharmed()


def test_memory_file_truncated_under_a_ring(oracle: Oracle) -> None:
    """H45: the ring itself is gone; the front end can still talk to us."""
    with Machine.boot(oracle.program.socket_path) as machine:
        machine.front.get_vring_base(BalloonQueue.DEFLATE)
        queue = machine.queues[BalloonQueue.DEFLATE]
        with closing(open_memfd(MIB)) as (fd,):
            slot = messages.memory_slot(SPARE)
            guest = BalloonDriver(machine)
            accepted(guest, Request.ADD_MEM_REG, slot, [fd])
            machine.front.set_vring_num(BalloonQueue.DEFLATE, queue.size)
            machine.front.set_vring_base(BalloonQueue.DEFLATE, 0)
            at = SPARE.guest_addr
            machine.front.set_vring_addr(
                BalloonQueue.DEFLATE, at, at + 8 * PAGE_SIZE, at + 16 * PAGE_SIZE
            )
            machine.front.set_vring_kick(BalloonQueue.DEFLATE, queue.kick_fd)
            assert machine.front.set_vring_enable(BalloonQueue.DEFLATE, True) == 0
            serves(guest)
            os.truncate(fd, 0)
            queue.kick()
            assert queue.wait_err(DEADLINE_S)
            serves(guest)
            machine.front.get_vring_base(BalloonQueue.DEFLATE)
            accepted(guest, Request.REM_MEM_REG, slot)
        machine.restart_ring(BalloonQueue.DEFLATE)
        serves(guest, BalloonQueue.DEFLATE)
    oracle.unharmed()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_guest_keeps_inflating_while_the_table_is_replaced(packed: bool, oracle: Oracle) -> None:
    """H52: an equal table again and again under running rings: no chain is lost."""
    base = Setup()
    table_only = base.protocol_features & ~ProtocolFeature.CONFIGURE_MEM_SLOTS
    setup = Setup(packed=packed, protocol_features=table_only)
    with Machine.boot(oracle.program.socket_path, setup) as machine:
        guest = BalloonDriver(machine)
        rounds = 300
        failures: list[BaseException] = []

        def inflate() -> None:
            try:
                for _ in range(rounds):
                    guest.inflate([10240])
            except (AssertionError, TimeoutError) as error:
                failures.append(error)

        thread = threading.Thread(target=inflate)
        thread.start()
        while thread.is_alive():
            handshake.send_memory(machine.front, machine.memory)
        thread.join()
        assert not failures, failures
        serves(guest)
    oracle.unharmed()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_kick_storm_starves_nobody(packed: bool, oracle: Oracle) -> None:
    """H87: one queue is kicked without pause; messages and the other queues are served."""
    with Machine.boot(oracle.program.socket_path, Setup(packed=packed)) as machine:
        guest = BalloonDriver(machine)
        queue = machine.queues[BalloonQueue.DEFLATE]
        over = threading.Event()

        def storm() -> None:
            while not over.is_set():
                for _ in range(100):
                    os.eventfd_write(queue.kick_fd, 1)

        thread = threading.Thread(target=storm)
        thread.start()
        try:
            slowest_s = 0.0
            end = time.monotonic() + STORM_TIME_S
            while time.monotonic() < end:
                start = time.monotonic()
                machine.front.get_config()
                machine.front.get_features()
                slowest_s = max(slowest_s, time.monotonic() - start)
                serves(guest)
        finally:
            over.set()
            thread.join()
        assert slowest_s < REPLY_TIME_MAX_S
        serves(guest, BalloonQueue.DEFLATE)
    oracle.unharmed()


def test_chains_flood_is_served_in_turns(oracle: Oracle) -> None:
    """H87: a full ring of full lists on one queue does not keep a message waiting long."""
    with Machine.boot(oracle.program.socket_path) as machine:
        guest = BalloonDriver(machine)
        content = pack_pfns(10240 + (n * 7) % 4096 for n in range(1024))
        machine.memory.write(12 * MIB, content)
        queue = machine.queues[BalloonQueue.INFLATE]
        for _ in range(queue.size):
            queue.add_chain([Buffer(12 * MIB, len(content))], publish=False)
        queue.publish()
        queue.kick()
        start = time.monotonic()
        machine.front.get_features()
        assert time.monotonic() - start < REPLY_TIME_MAX_S
        queue.wait_used(queue.size, timeout_s=60)
        serves(guest)
    oracle.unharmed()


def test_readable_kick_does_not_spin(oracle: Oracle) -> None:
    """H63: a kick eventfd nobody empties but us, and a ring with nothing in it, cost no core."""
    with Machine.boot(oracle.program.socket_path) as machine:
        for queue in machine.queues:
            queue.kick()
        before_s = oracle.program.cpu_s()
        assert not wait_readable(machine.queues[0].call_fd, STORM_TIME_S)
        assert oracle.program.cpu_s() - before_s < STORM_TIME_S / 2
    oracle.unharmed()
