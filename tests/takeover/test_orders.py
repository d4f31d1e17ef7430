"""Messages that a VMM sent while no daemon was there to read them."""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.fakes import messages
from tests.fakes.balloon import BalloonConfig, BalloonQueue
from tests.fakes.eventfd import new_eventfd
from tests.fakes.handshake import accepted
from tests.fakes.messages import VRING_NO_FD, Flags, Request, header, u64, unpack_u64
from tests.native.rig import wait_until
from tests.takeover.balloon_scene import BALLOON, BalloonVm
from tests.takeover.chain_scenes import StatisticsScene
from tests.takeover.kept import Kept

pytestmark = pytest.mark.timeout(120)

ASKING = Flags.VERSION | Flags.NEED_REPLY
INFLATE, DEFLATE = BalloonQueue.INFLATE, BalloonQueue.DEFLATE


@contextmanager
def connected(kept: Kept) -> Iterator[BalloonVm]:
    """A balloon at work."""
    vm = BalloonVm(kept)
    try:
        vm.works()
        yield vm
    finally:
        vm.close()


def verdicts(vm: BalloonVm, *requests: Request) -> None:
    """Read the replies to requests in this order; each says yes."""
    for request in requests:
        assert vm.front.receive_ack(request) == 0, request.name


async def test_a_descriptor_belongs_to_the_message_it_came_with(tmp_path: Path) -> None:
    async with Kept.start(tmp_path, BALLOON) as kept:
        with connected(kept) as vm:
            queue, front = vm.ring, vm.front
            for _ in range(3):
                os.close(queue.kick_fd)
                queue.kick_fd = new_eventfd()
                queue.calls()
                with kept.dead():
                    front.send(Request.SET_VRING_CALL, u64(VRING_NO_FD | INFLATE), (), ASKING)
                    front.send(Request.SET_VRING_KICK, u64(INFLATE), [queue.kick_fd], ASKING)
                    front.send(Request.GET_FEATURES, b"", (), ASKING)
                verdicts(vm, Request.SET_VRING_CALL, Request.SET_VRING_KICK)
                features = front.receive_reply(Request.GET_FEATURES).payload
                assert unpack_u64(features) == vm.machine.offer.features
                queue.calls()  # what the guest may have been told of before is told again
                vm.driver.send(INFLATE, bytes(4))
                queue.wait_used(interrupts=False)
                assert queue.calls() == 0, "it was to be called no more"
                accepted(front.set_vring_call(INFLATE, queue.call_fd), "SET_VRING_CALL")
                vm.works()


async def test_descriptors_of_many_messages_keep_apart(tmp_path: Path) -> None:
    async with Kept.start(tmp_path, BALLOON) as kept:
        with connected(kept) as vm:
            queues = [vm.machine.queues[index] for index in (INFLATE, DEFLATE)]
            for queue in queues:
                for fd in (queue.kick_fd, queue.call_fd, queue.err_fd):
                    os.close(fd)
                queue.kick_fd, queue.call_fd, queue.err_fd = (new_eventfd() for _ in range(3))
            sent = [
                (request, u64(index), fd)
                for index, queue in zip((INFLATE, DEFLATE), queues, strict=True)
                for request, fd in (
                    (Request.SET_VRING_ERR, queue.err_fd),
                    (Request.SET_VRING_CALL, queue.call_fd),
                    (Request.SET_VRING_KICK, queue.kick_fd),
                )
            ]
            with kept.dead():
                for request, payload, fd in sent:
                    vm.front.send(request, payload, [fd], ASKING)
            verdicts(vm, *(request for request, _, _ in sent))
            vm.works()


async def test_messages_of_both_readers_keep_their_order(tmp_path: Path) -> None:
    """GET_CONFIG and SET_CONFIG are the native worker's, all others are Python's."""
    async with Kept.start(tmp_path, BALLOON) as kept:
        with connected(kept) as vm:
            front = vm.front
            with kept.dead():
                for actual in (5, 6):
                    config = BalloonConfig(0, actual, 0, 0).pack()
                    front.send(Request.SET_CONFIG, messages.config(0, config), (), ASKING)
                    front.send(Request.GET_QUEUE_NUM)
                    front.send(Request.GET_CONFIG, messages.config(0, bytes(16)))
                    front.send(Request.SET_VRING_CALL, u64(INFLATE), [vm.ring.call_fd], ASKING)
            for actual in (5, 6):
                verdicts(vm, Request.SET_CONFIG)
                assert unpack_u64(front.receive_reply(Request.GET_QUEUE_NUM).payload) == 5
                content = messages.unpack_config(front.receive_reply(Request.GET_CONFIG).payload)[3]
                assert BalloonConfig.unpack(content).actual == actual
                verdicts(vm, Request.SET_VRING_CALL)
            vm.works()


async def test_chains_made_available_meanwhile_are_served_once(tmp_path: Path) -> None:
    async with Kept.start(tmp_path, BALLOON) as kept:
        with connected(kept) as vm:
            with kept.dead():
                token = vm.driver.send(INFLATE, bytes(4))
                vm.front.send(Request.GET_QUEUE_NUM)
            (used,) = vm.ring.wait_used()
            assert used.token == token
            assert unpack_u64(vm.front.receive_reply(Request.GET_QUEUE_NUM).payload) == 5
            vm.works()


async def test_a_message_that_is_half_there_is_read_once_it_is_whole(tmp_path: Path) -> None:
    payload = u64(INFLATE)
    data = header(Request.SET_VRING_CALL, ASKING, len(payload)) + payload
    async with Kept.start(tmp_path, BALLOON) as kept:
        with connected(kept) as vm:
            for size in (1, 12, 19):
                with kept.dead():
                    vm.front.raw(data[:size], [vm.ring.call_fd])
                vm.front.raw(data[size:])
                verdicts(vm, Request.SET_VRING_CALL)
                vm.works()


def unread(vm: BalloonVm) -> int:
    """Bytes we sent that nobody took out of the socket yet."""
    data = fcntl.ioctl(vm.front, termios.TIOCOUTQ, bytes(4))
    return int(struct.unpack("i", data)[0])


async def test_half_a_message_that_was_read_is_not_lost(tmp_path: Path) -> None:
    payload = u64(INFLATE)
    data = header(Request.SET_VRING_CALL, ASKING, len(payload)) + payload
    async with Kept.start(tmp_path, BALLOON) as kept:
        with connected(kept) as vm:
            vm.front.timeout_s = 5
            # A daemon that only ever looks at halves leaves it there; either is right.
            vm.front.raw(data[:14], [vm.ring.call_fd])
            with suppress(TimeoutError):
                wait_until(lambda: unread(vm) == 0, 2)
            kept.die()
            vm.front.raw(data[14:])
            verdicts(vm, Request.SET_VRING_CALL)
            vm.works()


async def test_statistics_do_not_become_new_by_a_death(tmp_path: Path) -> None:
    scene = StatisticsScene()
    async with Kept.start(tmp_path, BALLOON) as kept:
        scene.open(kept)
        try:
            before = kept.status()["balloon"]
            kept.die()
            scene.check()
            after = kept.status()["balloon"]
        finally:
            scene.close()
        for key in ("stats", "stats_updates", "stats_received_s"):
            assert after[key] == before[key], key
