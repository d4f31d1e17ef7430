"""H7, H12, H20, H21, H23, H32, H49: what concerns whole connections rather than one input."""

from __future__ import annotations

import resource
import threading
import time
from pathlib import Path

import pytest

from tests.fakes import handshake, messages
from tests.fakes.balloon import BalloonDriver, BalloonQueue
from tests.fakes.channel import ConnectionLost
from tests.fakes.frontend import FrontEnd
from tests.fakes.machine import Machine, Setup
from tests.fakes.memory import PAGE_SIZE, open_memfd
from tests.fakes.messages import (
    Flags,
    ProtocolFeature,
    Request,
    VirtioFeature,
    WireRegion,
    u64,
    vring_state,
)
from tests.fakes.program import Program
from tests.hostile.attack import closing, fds_for, refused, serves
from tests.hostile.attacks_framing import SPARE, shapes
from tests.hostile.conftest import OFFER_ALL, PROGRAM
from tests.hostile.oracle import GROWTH_MAX_SIZE, Oracle

MESSAGES_IN_ONE_WRITE = 10_000
SLOW_PAYLOAD_S = 1.5
SPARE_FDS = 1  # left to the program at its descriptor limit


def test_second_connection_is_closed_and_the_first_lives(oracle: Oracle) -> None:
    """H32."""
    path = oracle.program.socket_path
    with Machine.boot(path) as machine:
        for _ in range(3):
            with FrontEnd.connect(path) as second:
                assert second.wait_closed()
        serves(BalloonDriver(machine))
    oracle.unharmed()


def test_half_a_message_stops_nobody_else(oracle: Oracle) -> None:
    """H7: while a payload is missing, new connections are answered and the queues run."""
    path = oracle.program.socket_path
    with Machine.boot(path) as machine:
        front, guest = machine.front, BalloonDriver(machine)
        whole = messages.header(Request.SET_STATUS, Flags.VERSION | Flags.NEED_REPLY, 8) + u64(8)
        for cut in (1, 11, 12, 13, 19):
            front.raw(whole[:cut])
            assert front.silent(SLOW_PAYLOAD_S / 5)
            serves(guest)
            with FrontEnd.connect(path) as second:
                assert second.wait_closed()
            front.raw(whole[cut:])
            assert front.receive_ack(Request.SET_STATUS) == 0
    oracle.unharmed()


def test_ten_thousand_messages_in_one_write_are_answered_in_order(oracle: Oracle) -> None:
    """H12."""
    asked = [
        Request.GET_FEATURES if n % 3 else Request.GET_PROTOCOL_FEATURES
        for n in range(MESSAGES_IN_ONE_WRITE)
    ]
    data = b"".join(messages.header(request, Flags.VERSION, 0) for request in asked)
    with Machine.boot(oracle.program.socket_path) as machine:
        front = machine.front
        front.timeout_s = 60.0
        writer = threading.Thread(target=front.raw, args=(data,))
        writer.start()
        for request in asked:
            front.receive_reply(request)
        writer.join()
        serves(BalloonDriver(machine))
    oracle.unharmed()


def test_descriptor_limit_refuses_a_message_and_not_the_service(tmp_path: Path) -> None:
    """H20: in a program of its own, for the limit is the whole process's."""
    program = Program.start(PROGRAM, tmp_path, OFFER_ALL)
    try:
        with Machine.boot(program.socket_path) as machine:
            guest = BalloonDriver(machine)
            serves(guest)
            old = resource.prlimit(program.pid, resource.RLIMIT_NOFILE)
            full = max(program.fds()) + SPARE_FDS
            resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (full, old[1]))
            with closing(open_memfd(1 << 20)) as (fd,):
                for _ in range(16):
                    refused(guest, Request.SET_VRING_CALL, u64(0), [fd] * 32)
                serves(guest)
                with FrontEnd.connect(program.socket_path) as second:
                    second.timeout_s = 1.0
                    serves(guest)
                resource.prlimit(program.pid, resource.RLIMIT_NOFILE, old)
                assert machine.front.add_mem_reg(SPARE, fd) == 0
            serves(guest)
        with Machine.boot(program.socket_path) as machine:
            serves(BalloonDriver(machine))
        assert "Traceback" not in program.log(), program.log()
    finally:
        program.kill()


def early_payload(request: Request) -> bytes:
    """Return a payload of the right shape for a message nobody prepared."""
    shaped = {
        Request.SET_MEM_TABLE: messages.memory_table([SPARE]),
        Request.SET_LOG_BASE: messages.log(1 << 20, 0),
        Request.GET_CONFIG: messages.config(0, bytes(16)),
        Request.SET_CONFIG: messages.config(0, bytes(16)),
        Request.SET_VRING_ADDR: messages.vring_addr(0, 0, 0, 0),
        Request.ADD_MEM_REG: messages.memory_slot(SPARE),
        Request.REM_MEM_REG: messages.memory_slot(SPARE),
        Request.GET_INFLIGHT_FD: messages.inflight(0, 0, 5, 128),
        Request.SET_INFLIGHT_FD: messages.inflight(1 << 20, 0, 5, 128),
        Request.SET_DEVICE_STATE_FD: messages.device_state(0, 0),
        Request.IOTLB_MSG: bytes(32),
        Request.GET_SHARED_OBJECT: bytes(16),
    }
    states = {
        Request.SET_VRING_NUM,
        Request.SET_VRING_BASE,
        Request.GET_VRING_BASE,
        Request.SET_VRING_ENABLE,
        Request.SET_VRING_ENDIAN,
        Request.VRING_KICK,
    }
    numbers = {
        Request.SET_FEATURES,
        Request.SET_PROTOCOL_FEATURES,
        Request.SET_VRING_KICK,
        Request.SET_VRING_CALL,
        Request.SET_VRING_ERR,
        Request.SET_STATUS,
        Request.SEND_RARP,
        Request.NET_SET_MTU,
        Request.CLOSE_CRYPTO_SESSION,
    }
    if request in states:
        return vring_state(0, 1)
    return u64(0) if request in numbers else shaped.get(request, b"")


@pytest.mark.parametrize("request_number", Request, ids=lambda request: request.name.lower())
def test_first_message_of_all_may_be(request_number: Request, oracle: Oracle) -> None:
    """H21: any message before ownership and features; a legal start works afterwards."""
    with FrontEnd.connect(oracle.program.socket_path) as front:
        with fds_for(request_number) as fds:
            front.send(request_number, early_payload(request_number), fds)
        front.send(Request.GET_FEATURES)
        answers = [front.receive()]
        if answers[0].request != Request.GET_FEATURES or request_number == Request.GET_FEATURES:
            answers.append(front.receive())
        assert [answer.request for answer in answers][-1] == Request.GET_FEATURES
        for answer in answers:
            answer.close_fds()
        with Machine.realize_on(front, own=request_number != Request.SET_OWNER) as machine:
            machine.start()
            serves(BalloonDriver(machine))
    oracle.unharmed()


def test_every_message_at_once_before_anything_else(oracle: Oracle) -> None:
    """H21: all of them in a row, then the end; twice from the back."""
    for order in (list(Request), list(reversed(Request))):
        with FrontEnd.connect(oracle.program.socket_path) as front:
            try:
                for request in order:
                    with fds_for(request) as fds:
                        front.send(request, early_payload(request), fds)
            except ConnectionLost:
                continue
    oracle.unharmed()


def test_rings_are_enabled_from_the_start_without_protocol_features(oracle: Oracle) -> None:
    """H23: bit 30 is not taken: KICK starts the ring, no ENABLE comes."""
    with Machine.realize(oracle.program.socket_path) as machine:
        front = machine.front
        bare = machine.features & ~VirtioFeature.PROTOCOL_FEATURES
        assert front.set_features(bare) == 0
        handshake.send_memory(front, machine.memory)
        for index, queue in enumerate(machine.queues):
            handshake.set_up_ring(front, machine.memory, index, queue)
        serves(BalloonDriver(machine))
        serves(BalloonDriver(machine), BalloonQueue.REPORT)
    oracle.unharmed()


def test_front_end_that_negotiates_nothing_is_served(oracle: Oracle) -> None:
    """The protocol of 2014: no protocol features at all, one memory table, features once."""
    setup = Setup(protocol_features=0)
    with Machine.boot(oracle.program.socket_path, setup) as machine:
        guest = BalloonDriver(machine)
        serves(guest)
        serves(guest, BalloonQueue.DEFLATE)
    oracle.unharmed()


def test_slots_beyond_the_promise_are_refused(oracle: Oracle) -> None:
    """H49: one more than GET_MAX_MEM_SLOTS said, each of one page."""
    with Machine.boot(oracle.program.socket_path) as machine:
        guest, front = BalloonDriver(machine), machine.front
        assert ProtocolFeature.CONFIGURE_MEM_SLOTS in front.protocol_features
        spare = machine.offer.memory_slots - len(machine.memory.regions)
        with closing(open_memfd(spare * PAGE_SIZE)) as (fd,):
            regions = []
            for n in range(spare):
                at = (1 << 40) + 2 * n * PAGE_SIZE
                regions.append(WireRegion(at, PAGE_SIZE, at, n * PAGE_SIZE))
                assert front.add_mem_reg(regions[-1], fd) == 0, f"slot {n} of {spare}"
            beyond = WireRegion(1 << 41, PAGE_SIZE, 1 << 41, 0)
            refused(guest, Request.ADD_MEM_REG, messages.memory_slot(beyond), [fd])
            serves(guest)
            for region in regions:
                assert front.rem_mem_reg(region) == 0
        serves(guest)
    oracle.unharmed()


def test_connections_leave_nothing_behind(oracle: Oracle, repeats: int) -> None:
    """Guests come and go, some in the middle of a request."""
    path = oracle.program.socket_path
    for turn in range(16 + repeats // 4):
        if turn == 16:
            before_size = oracle.program.resident_size()
        with Machine.boot(path, Setup(packed=bool(turn & 1))) as machine:
            guest = BalloonDriver(machine)
            guest.give_stats(bytes(10))
            guest.send(BalloonQueue.INFLATE, u64(turn))
    assert oracle.program.resident_size() - before_size < GROWTH_MAX_SIZE
    oracle.unharmed()


def test_connection_that_says_nothing_is_replaced_when_it_goes(oracle: Oracle) -> None:
    """A front end that connects and hangs up at once, many times."""
    for _ in range(100):
        FrontEnd.connect(oracle.program.socket_path).close()
    oracle.unharmed()


def test_front_end_that_never_reads_is_not_waited_for(oracle: Oracle) -> None:
    """Replies pile up until the socket is full; the program waits without a spin or a crash."""
    with Machine.boot(oracle.program.socket_path) as machine:
        machine.front.timeout_s = 0.5
        data = messages.header(Request.GET_FEATURES, Flags.VERSION, 0) * 4096
        with pytest.raises(TimeoutError):
            while True:
                machine.front.raw(data)
        before_s, start = oracle.program.cpu_s(), time.monotonic()
        serves(BalloonDriver(machine))
        assert not machine.front.silent(0.5)
        assert oracle.program.cpu_s() - before_s <= time.monotonic() - start
    oracle.unharmed()


def test_shapes_that_are_refused_are_refused_for_their_length_alone(oracle: Oracle) -> None:
    """The setters' legal payloads used by the framing attacks are accepted where they may be."""
    with Machine.boot(oracle.program.socket_path) as machine:
        legal = shapes(BalloonDriver(machine))
        for request in (Request.SET_VRING_ENABLE, Request.SET_STATUS, Request.SET_CONFIG):
            assert machine.front.ack(request, legal[request]) == 0, request.name
        for request in (Request.SET_VRING_CALL, Request.SET_VRING_ERR):
            with fds_for(request) as fds:
                assert machine.front.ack(request, legal[request], fds) == 0, request.name
    oracle.unharmed()
