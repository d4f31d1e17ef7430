"""What QEMU 11.1.3's generic vhost-user device really does, where the daemon has to live with it.

Each test holds an observation, the deaths of QEMU included: when one fails, QEMU was repaired, and
a precaution of the daemon may go. The back end is a fake: the daemon never provokes any of this.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import TypeAlias

import pytest
import trio
from vhostd.qmp import QmpClosed

from tests.e2e.waiting import until
from tests.fakes.backend import PROTOCOL_FEATURES, BackEnd, Offer, Seen, listening, shmem_map
from tests.fakes.messages import (
    BackendRequest,
    Flags,
    ProtocolFeature,
    Request,
    VirtioFeature,
    header,
    unpack_u64,
)
from tests.sampling import sampled
from tests.vm.guest import Guest, GuestBootError, GuestCommandError, balloon_device, boot
from tests.vm.stack import Stack

pytestmark = pytest.mark.guest

MIB = 1024 * 1024
DRIVER = ("virtio_balloon",)
QUEUE_COUNT = 5
QUEUE_SIZE = 128
RINGS_IN_USE = (0, 1)  # inflate and deflate: the driver sets up no more without their features
WAYS_TO_STOP = ("stop", "system_reset", "rmmod")
SHMEM_REQUESTS = (BackendRequest.SHMEM_MAP, BackendRequest.SHMEM_UNMAP)
SHMEM = PROTOCOL_FEATURES | ProtocolFeature.SHMEM_MAP

Pair: TypeAlias = tuple[BackEnd, Guest]
Start = Callable[..., AbstractAsyncContextManager[Pair]]
Step: TypeAlias = tuple[Request, bool, tuple[int, ...]]


@pytest.fixture
def start(stack: Stack, tmp_path: Path) -> Start:
    """start(offer, modprobe=...) gives a fake back end and a guest with a balloon on it."""

    @asynccontextmanager
    async def pair(
        offer: Offer | None = None, modprobe: Sequence[str] = DRIVER
    ) -> AsyncIterator[Pair]:
        path = tmp_path / "device.sock"
        async with (
            listening(path, offer) as back,
            boot(stack, memory="256M", devices=balloon_device(path), modprobe=modprobe) as guest,
        ):
            yield back, guest

    return pair


async def death_of(guest: Guest, timeout_s: float = 15) -> int | None:
    """The status QEMU ended with; None if it lives on."""
    with trio.move_on_after(timeout_s):
        return await guest.wait_exit()
    return None


async def answers(guest: Guest, timeout_s: float = 2) -> bool:
    """Whether QEMU's main loop runs: it answers QMP."""
    with trio.move_on_after(timeout_s):
        await guest.qmp.execute("query-status")
        return True
    return False


async def stop_device(guest: Guest, way: str) -> None:
    """Make QEMU stop the device. It may die of it: the caller looks."""
    with suppress(QmpClosed, GuestCommandError):
        if way == "rmmod":
            await guest.run("rmmod virtio_balloon")
        else:
            await guest.qmp.execute(way)


async def start_device(guest: Guest, way: str) -> None:
    """Have the device run again."""
    if way == "stop":
        await guest.qmp.execute("cont")
    elif way == "rmmod":
        await guest.run("modprobe virtio_balloon")
    else:
        await guest.wait_ready()


def at_first_disable(action: Callable[[], None]) -> Callable[[Seen], None]:
    """A hook: act when QEMU stops the device, while it waits for its first answer.

    Nothing that is sent then can be read before the device is stopped: QEMU holds its big lock.
    """
    done = False

    def hook(message: Seen) -> None:
        nonlocal done
        if not done and message.request == Request.SET_VRING_ENABLE and message.ring[1] == 0:
            done = True
            action()

    return hook


def step(message: Seen) -> Step:
    """What can be compared of a message between two starts: addresses and descriptors are not."""
    request = Request(message.request)
    detail: tuple[int, ...] = ()
    if request in (Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ENABLE):
        detail = message.ring
    elif request == Request.GET_VRING_BASE:
        detail = message.ring[:1]
    elif len(message.payload) == 8:
        detail = (message.number,)
    return request, message.need_reply, detail


def steps(back: BackEnd) -> list[Step]:
    """Everything seen, and forget it."""
    taken = [step(message) for message in back.seen]
    back.seen.clear()
    return taken


def expected_start(features: int) -> list[Step]:
    """QEMU's messages when the driver sets DRIVER_OK, but for memory and the config space."""
    expected: list[Step] = [
        (Request.SET_FEATURES, False, (features,)),
        (Request.GET_STATUS, False, ()),
        (Request.SET_STATUS, False, (0x8,)),
    ]
    for ring in RINGS_IN_USE:
        expected += [
            (Request.SET_VRING_NUM, False, (ring, QUEUE_SIZE)),
            (Request.SET_VRING_BASE, False, (ring, 0)),
            (Request.SET_VRING_ADDR, False, ()),
            (Request.SET_VRING_KICK, True, (ring,)),
            (Request.SET_VRING_CALL, True, (ring,)),
        ]
    expected += [(Request.SET_VRING_ENABLE, True, (ring, 1)) for ring in range(QUEUE_COUNT)]
    expected += [(Request.SET_VRING_CALL, True, (ring,)) for ring in range(QUEUE_COUNT)]
    return expected


def expected_stop() -> list[Step]:
    """QEMU's messages when the device stops, for whatever reason."""
    return [
        *((Request.SET_VRING_ENABLE, True, (ring, 0)) for ring in range(QUEUE_COUNT)),
        *((Request.GET_VRING_BASE, False, (ring,)) for ring in RINGS_IN_USE),
    ]


# -- what QEMU says, and when ------------------------------------------------------------------


async def test_realize_asks_and_acknowledges_in_this_order(start: Start) -> None:
    async with start(modprobe=()) as (back, _):
        assert steps(back) == [
            (Request.GET_FEATURES, False, ()),
            (Request.GET_PROTOCOL_FEATURES, False, ()),
            (Request.SET_PROTOCOL_FEATURES, False, (int(PROTOCOL_FEATURES),)),
            (Request.GET_QUEUE_NUM, False, ()),
            (Request.GET_MAX_MEM_SLOTS, False, ()),
            (Request.SET_BACKEND_REQ_FD, True, ()),
            (Request.SET_OWNER, False, ()),
            (Request.GET_FEATURES, False, ()),
            *(
                (request, True, (ring,))
                for ring in range(QUEUE_COUNT)
                for request in (Request.SET_VRING_CALL, Request.SET_VRING_ERR)
            ),
        ]


async def test_start_and_stop_come_in_this_order_and_reset_looks_like_stop(start: Start) -> None:
    """RESET_DEVICE is acknowledged and never sent; DRIVER_OK and status 0 never arrive."""
    async with start(modprobe=()) as (back, guest):
        back.seen.clear()
        await guest.run("modprobe virtio_balloon")
        first = steps(back)
        restart = expected_start(int(VirtioFeature.PROTOCOL_FEATURES | VirtioFeature.VERSION_1))
        probe = [*restart, (Request.GET_CONFIG, False, ())]
        # Memory is sent once, between the status and the rings.
        assert first == [*probe[:3], (Request.ADD_MEM_REG, True, ()), *probe[3:]]

        await guest.qmp.execute("stop")
        assert steps(back) == expected_stop()
        await guest.qmp.execute("cont")
        assert steps(back) == restart

        await guest.system_reset()
        assert steps(back) == expected_stop()
        await guest.run("modprobe virtio_balloon")
        assert steps(back) == probe

        await guest.run("rmmod virtio_balloon")
        assert steps(back) == [(Request.SET_CONFIG, True, ()), *expected_stop()]
        await guest.run("modprobe virtio_balloon")
        assert steps(back) == probe

        await guest.reboot()
        assert steps(back) == expected_stop()


async def test_without_protocol_features_qemu_refuses_the_device(start: Start) -> None:
    with pytest.raises(GuestBootError, match="memory slots limit"):
        async with start(Offer(features=int(VirtioFeature.VERSION_1))):
            pytest.fail("it started")


# -- what freezes QEMU -------------------------------------------------------------------------


async def test_an_answer_that_does_not_come_freezes_qemu_until_it_does(start: Start) -> None:
    async with start() as (back, guest):
        back.unanswered.add(Request.GET_VRING_BASE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.qmp.execute, "stop")
            await back.wait_for(Request.GET_VRING_BASE)
            assert not await answers(guest, timeout_s=3)
            back.answer_late()
        assert await answers(guest)
        await guest.qmp.execute("cont")
        await guest.run("true")


# -- what kills QEMU ---------------------------------------------------------------------------


async def test_a_config_change_before_the_driver_started_kills_qemu(start: Start) -> None:
    async with start(modprobe=()) as (back, guest):
        back.send(BackendRequest.CONFIG_CHANGE_MSG)
        assert await death_of(guest) == -signal.SIGSEGV


@sampled("way", WAYS_TO_STOP, every_day=["stop"])
async def test_a_config_change_after_the_device_stopped_kills_qemu(way: str, start: Start) -> None:
    async with start() as (back, guest):
        await stop_device(guest, way)
        await back.wait_for(Request.GET_VRING_BASE, len(RINGS_IN_USE))
        back.send(BackendRequest.CONFIG_CHANGE_MSG)
        assert await death_of(guest) == -signal.SIGSEGV


@sampled("way", WAYS_TO_STOP, every_day=["system_reset"])
async def test_a_config_change_unread_when_the_device_stops_kills_qemu(
    way: str, start: Start
) -> None:
    """Sent while the device was started, and yet: QEMU reads it when the device is stopped."""
    async with start() as (back, guest):
        back.before_answer = at_first_disable(lambda: back.send(BackendRequest.CONFIG_CHANGE_MSG))
        await stop_device(guest, way)
        assert await death_of(guest) == -signal.SIGSEGV


async def test_closing_the_channel_takes_back_no_unread_config_change(start: Start) -> None:
    async with start() as (back, guest):

        def send_and_close() -> None:
            back.send(BackendRequest.CONFIG_CHANGE_MSG)
            back.close()

        back.before_answer = at_first_disable(send_and_close)
        await stop_device(guest, "stop")
        assert await death_of(guest) == -signal.SIGSEGV


@sampled("request_number", SHMEM_REQUESTS, every_day=[BackendRequest.SHMEM_MAP])
async def test_a_shared_memory_request_before_the_driver_started_kills_qemu(
    request_number: BackendRequest, start: Start
) -> None:
    offer = Offer(protocol_features=int(SHMEM), shmem_sizes=(MIB,))
    async with start(offer, modprobe=()) as (back, guest):
        fd = os.memfd_create("shmem")
        os.truncate(fd, MIB)
        fds = [fd] if request_number == BackendRequest.SHMEM_MAP else []
        back.send(request_number, shmem_map(0, 0, 0, MIB, writable=True), fds)
        os.close(fd)
        assert await death_of(guest) == -signal.SIGSEGV


async def test_shared_memory_of_no_power_of_two_aborts_qemu(start: Start) -> None:
    offer = Offer(protocol_features=int(SHMEM), shmem_sizes=(MIB,) * 3)
    with pytest.raises(GuestBootError, match=rf"ended with {-signal.SIGABRT}\b"):
        async with start(offer):
            pytest.fail("it started")


async def test_a_back_end_that_hangs_up_aborts_qemu_at_the_next_reset(start: Start) -> None:
    async with start() as (back, guest):
        back.hang_up()
        await guest.run("true")
        assert await answers(guest)
        # Not at the reset itself: when the next kernel's driver starts the device.
        with suppress(GuestBootError):
            await guest.system_reset()
        assert await death_of(guest) == -signal.SIGABRT


# -- how a config change can be sent and QEMU live ---------------------------------------------


def announce_config_change(back: BackEnd) -> None:
    """Send a config change's header only, which promises 8 bytes more."""
    flags = Flags.VERSION | Flags.NEED_REPLY
    back.send_bytes(header(BackendRequest.CONFIG_CHANGE_MSG, flags, 8))


async def read_by_qemu(back: BackEnd) -> None:
    """Wait until QEMU has read all that was sent to it: the kernel tells nobody."""

    async def unread() -> bool:
        return back.unread()

    await until(unread, lambda left: not left, 10, "all read by QEMU")


@sampled("way", ["stop", "rmmod"], every_day=["stop"])
async def test_between_header_and_payload_of_a_config_change_qemu_stops_no_device(
    way: str, start: Start
) -> None:
    """With the header read, QEMU sits in the handler and holds its lock: the rest is safe."""
    async with start() as (back, guest):
        announce_config_change(back)
        await read_by_qemu(back)
        back.seen.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop_device, guest, way)
            assert not await answers(guest, timeout_s=1)
            assert back.seen == []
            back.send_bytes(bytes(8))
            answer = await back.next_answer()
            assert unpack_u64(answer.payload) == 0
        await back.wait_for(Request.GET_VRING_BASE, len(RINGS_IN_USE))
        if way == "stop":
            await guest.qmp.execute("cont")
            # The guest was told: it reads the config space.
            await back.wait_for(Request.GET_CONFIG)
        assert await answers(guest)


@sampled("way", WAYS_TO_STOP, every_day=["rmmod"])
async def test_a_request_of_which_qemu_read_one_byte_can_become_an_unknown_one(
    way: str, start: Start
) -> None:
    """Sent while the device runs, read when it is stopped, with a descriptor and without."""
    withdrawn = [
        header(number | 0x100, Flags.VERSION, 0)
        for number in (BackendRequest.CONFIG_CHANGE_MSG, BackendRequest.SHMEM_MAP)
    ]
    async with start() as (back, guest):
        fd = os.memfd_create("shmem")
        with_fd, held_back = [[], [fd]], 0

        def begin() -> None:
            back.send_bytes(withdrawn[held_back][:1], with_fd[held_back])

        for held_back in range(2):
            back.before_answer = at_first_disable(begin)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stop_device, guest, way)
                await back.wait_for(Request.GET_VRING_BASE, len(RINGS_IN_USE))
                await read_by_qemu(back)
                back.send_bytes(withdrawn[held_back][1:])
            assert await answers(guest)
            back.before_answer = None
            await start_device(guest, way)
            back.seen.clear()
        os.close(fd)
        back.send(BackendRequest.CONFIG_CHANGE_MSG)
        await back.wait_for(Request.GET_CONFIG)
        assert await answers(guest)


@sampled("request_number", [0, 4, 99], every_day=[99])
async def test_an_unknown_request_unread_when_the_device_stops_is_only_refused(
    request_number: int, start: Start
) -> None:
    async with start() as (back, guest):
        refused = header(request_number, Flags.VERSION | Flags.NEED_REPLY, 0)
        back.before_answer = at_first_disable(lambda: back.send_bytes(refused))
        await guest.qmp.execute("stop")
        assert unpack_u64((await back.next_answer()).payload) != 0
        await guest.qmp.execute("cont")
        back.send(BackendRequest.CONFIG_CHANGE_MSG)
        await back.wait_for(Request.GET_CONFIG, count=2)
