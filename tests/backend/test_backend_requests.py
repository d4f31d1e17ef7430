"""What the VMM reads on the back-end channel, and when: never a byte while the device is stopped.

QEMU 11.1 crashes on a request that comes too early or too late, so the bytes are what counts.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
import trio
import trio.testing
from vhostd.backend.backend_requests import BackendRequests
from vhostd.backend.journal import Journal
from vhostd.fds import OwnedFd
from vhostd.log import RateLimiter
from vhostd.protocol.wire import ShmemMapping
from vhostd.transport.backend_channel import BackendChannel

from tests.fakes import messages
from tests.fakes.messages import BackendRequest, u64
from tests.transport.sockets import link

CONFIG_CHANGE = messages.header(BackendRequest.CONFIG_CHANGE_MSG, 0x9, 0)
MAPPING = ShmemMapping(0, 0, 0, 2 << 20, ShmemMapping.WRITABLE).pack()
LARGER = ShmemMapping(0, 0, 0, 4 << 20, 0).pack()
MAP = messages.header(BackendRequest.SHMEM_MAP, 0x9, 40)
REPLY = 0x5
QUIET_S = 0.002  # shorter than what lies between two looks at whether the VMM has read


class Vmm:
    """The other end of a channel, and what it read."""

    def __init__(self, requests: BackendRequests, *, full: bool) -> None:
        """Give the back end a new channel; full: without room for a request."""
        ours, self.end = socket.socketpair()
        self.end.setblocking(False)
        if full:
            fill(ours)
        self._received = b""
        self.fds: list[OwnedFd] = []
        with open("/dev/null") as connection:  # noqa: PTH123 - any descriptor that is not ours
            channel = BackendChannel.adopt(
                OwnedFd(ours.detach()), reply_ack=True, connection_fd=connection.fileno()
            )
        requests.use(channel)

    async def take(self, size: int) -> bytes:
        """Read so many bytes."""
        with trio.fail_after(5):
            while len(self._received) < size:
                await trio.lowlevel.wait_readable(self.end)
                data, fds, _flags, _address = socket.recv_fds(
                    self.end, size - len(self._received), 4
                )
                assert data, "the channel was closed"
                self._received += data
                self.fds += map(OwnedFd, fds)
        taken, self._received = self._received, b""
        return taken

    async def is_silent(self) -> bool:
        """No byte is there once everybody has done what they can."""
        await trio.testing.wait_all_tasks_blocked(QUIET_S)
        try:
            self.end.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False

    async def is_closed(self) -> bool:
        """Nothing but the end is there to be read."""
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(self.end)
        try:
            return self.end.recv(1) == b""
        except ConnectionResetError:
            return True  # it had not read all we sent

    def drain(self) -> bytes:
        """Read all that is there."""
        data = b""
        with suppress(BlockingIOError):
            while True:
                data += self.end.recv(1 << 20)
        return data

    async def answer(self, request: int, verdict: int = 0) -> None:
        """Acknowledge a request, and wait until that was heard."""
        self.end.send(messages.header(request, REPLY, 8) + u64(verdict))
        await trio.testing.wait_all_tasks_blocked(QUIET_S)


def fill(end: socket.socket) -> None:
    """Write zeroes until there is no room."""
    end.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            end.send(bytes(4096))


class Asked:
    """Requests that run, an image, and the verdicts on its mapping."""

    def __init__(self) -> None:
        limiter = RateLimiter(trio.current_time)
        self.requests = BackendRequests(Journal("web", limiter, lambda vm, event, fields: None))
        self.image = OwnedFd(os.memfd_create("disk0"))
        self.verdicts: list[int | None] = []
        self._vmms: list[Vmm] = []

    def connect(self, *, full: bool = False) -> Vmm:
        """A VMM's end of a new channel."""
        vmm = Vmm(self.requests, full=full)
        self._vmms.append(vmm)
        return vmm

    def close(self) -> None:
        self.requests.use(None)
        self.image.close()
        for vmm in self._vmms:
            vmm.end.close()

    def want_mapping(self, payload: bytes = MAPPING) -> None:
        self.requests.want_mapping(payload, self.image, self.verdicts.append)


@pytest.fixture
async def asked() -> AsyncIterator[Asked]:
    asked = Asked()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(asked.requests.run)
        yield asked
        nursery.cancel_scope.cancel()
    asked.close()


# -- the gate --------------------------------------------------------------------------------------


async def test_nothing_is_sent_before_the_device_is_started(asked: Asked) -> None:
    vmm = asked.connect()
    asked.requests.want_config_change()
    asked.want_mapping()
    assert await vmm.is_silent()

    asked.requests.open()

    assert await vmm.take(52) == MAP + MAPPING


async def test_the_order_of_channel_start_and_wish_does_not_matter(asked: Asked) -> None:
    asked.requests.open()
    asked.want_mapping()
    assert not asked.requests.possible
    await trio.testing.wait_all_tasks_blocked(QUIET_S)

    vmm = asked.connect()

    assert asked.requests.possible
    assert await vmm.take(52) == MAP + MAPPING


async def test_nothing_is_sent_between_a_stop_and_the_next_start(asked: Asked) -> None:
    vmm = asked.connect()
    asked.requests.open()
    asked.requests.close()
    asked.requests.want_config_change()
    asked.want_mapping()
    assert await vmm.is_silent()


async def test_a_stop_in_the_same_moment_as_the_wish_sends_nothing(asked: Asked) -> None:
    """No task runs between them: the wish must not be on its way already."""
    vmm = asked.connect()
    asked.requests.open()
    await trio.testing.wait_all_tasks_blocked(QUIET_S)
    asked.want_mapping()
    asked.requests.close()
    assert await vmm.is_silent()
    assert asked.verdicts == []


@pytest.mark.parametrize("stopped", [True, False])
async def test_what_waits_for_room_at_a_stop_is_not_sent_when_there_is_some(
    asked: Asked, stopped: bool
) -> None:
    vmm = asked.connect(full=True)
    asked.requests.open()
    asked.requests.want_config_change()
    await trio.testing.wait_all_tasks_blocked(QUIET_S)
    if stopped:
        asked.requests.close()
    assert not any(vmm.drain())
    await trio.testing.wait_all_tasks_blocked(QUIET_S)
    sent = vmm.drain()
    assert sent == (b"" if stopped else CONFIG_CHANGE[:-1])
    asked.requests.open()
    if stopped:
        assert await vmm.take(12) == CONFIG_CHANGE


# -- the mapping -----------------------------------------------------------------------------------


async def test_a_mapping_goes_before_a_config_change_that_was_wanted_sooner(asked: Asked) -> None:
    vmm = asked.connect()
    asked.requests.want_config_change()
    asked.want_mapping()
    asked.requests.open()
    assert await vmm.take(52) == MAP + MAPPING
    assert await vmm.is_silent(), "one request at a time"
    await vmm.answer(BackendRequest.SHMEM_MAP)
    assert asked.verdicts == [0]
    assert await vmm.take(12) == CONFIG_CHANGE
    await vmm.answer(BackendRequest.CONFIG_CHANGE_MSG)
    assert asked.requests.config_changes == 1


async def test_a_mapping_brings_the_image_itself_and_keeps_ours_open(asked: Asked) -> None:
    vmm = asked.connect()
    asked.requests.open()
    asked.want_mapping()
    await vmm.take(52)
    (fd,) = vmm.fds
    assert link(fd.fileno()) == link(asked.image.fileno())
    await vmm.answer(BackendRequest.SHMEM_MAP)
    fd.close()
    assert not asked.image.closed


@pytest.mark.parametrize("verdict", [0, 1, (1 << 64) - 22])
async def test_the_verdict_is_passed_on_once(asked: Asked, verdict: int) -> None:
    vmm = asked.connect()
    asked.requests.open()
    asked.want_mapping()
    await vmm.take(52)
    assert asked.verdicts == []
    await vmm.answer(BackendRequest.SHMEM_MAP, verdict)
    assert asked.verdicts == [verdict]
    assert await vmm.is_silent(), "a refused mapping is not tried again"


async def test_a_mapping_not_sent_yet_is_forgotten_at_a_stop_and_a_config_change_is_not(
    asked: Asked,
) -> None:
    vmm = asked.connect()
    asked.want_mapping()
    asked.requests.want_config_change()
    asked.requests.close()
    asked.requests.open()
    assert await vmm.take(12) == CONFIG_CHANGE
    await vmm.answer(BackendRequest.CONFIG_CHANGE_MSG)
    assert await vmm.is_silent()
    assert asked.verdicts == []


async def test_of_two_mappings_not_sent_yet_the_later_one_goes(asked: Asked) -> None:
    vmm = asked.connect()
    asked.want_mapping()
    asked.want_mapping(LARGER)
    asked.requests.open()
    assert await vmm.take(52) == MAP + LARGER
    await vmm.answer(BackendRequest.SHMEM_MAP)
    assert await vmm.is_silent()


@pytest.mark.parametrize("stopped", [True, False])
async def test_a_mapping_that_another_has_replaced_while_it_waited_for_room_is_not_sent(
    asked: Asked, stopped: bool
) -> None:
    vmm = asked.connect(full=True)
    asked.requests.open()
    asked.want_mapping()
    await trio.testing.wait_all_tasks_blocked(QUIET_S)
    if stopped:
        asked.requests.close()
        asked.requests.open()
    asked.want_mapping(LARGER)
    assert not any(vmm.drain())
    assert await vmm.take(52) == MAP + LARGER
    await vmm.answer(BackendRequest.SHMEM_MAP)
    assert asked.verdicts == [0]
    assert await vmm.is_silent()


async def test_a_mapping_that_waits_for_room_is_sent_when_there_is_some(asked: Asked) -> None:
    vmm = asked.connect(full=True)
    asked.requests.open()
    asked.want_mapping()
    await trio.testing.wait_all_tasks_blocked(QUIET_S)
    assert not any(vmm.drain())
    assert await vmm.take(52) == MAP + MAPPING
    await vmm.answer(BackendRequest.SHMEM_MAP)
    assert asked.verdicts == [0]
    assert await vmm.is_silent()


async def test_a_verdict_that_comes_after_the_stop_is_still_one(asked: Asked) -> None:
    """QEMU answers from its handler, which a stop message of before does not interrupt."""
    vmm = asked.connect()
    asked.requests.open()
    asked.want_mapping()
    await vmm.take(52)
    await trio.testing.wait_all_tasks_blocked(QUIET_S)
    asked.requests.close()
    asked.requests.want_config_change()
    await vmm.answer(BackendRequest.SHMEM_MAP)
    assert asked.verdicts == [0]
    assert await vmm.is_silent()


# -- config changes --------------------------------------------------------------------------------


async def test_many_config_changes_are_one_and_one_wanted_meanwhile_is_another(
    asked: Asked,
) -> None:
    vmm = asked.connect()
    for _ in range(1000):
        asked.requests.want_config_change()
    asked.requests.open()
    assert await vmm.take(12) == CONFIG_CHANGE
    for _ in range(1000):
        asked.requests.want_config_change()
    await vmm.answer(BackendRequest.CONFIG_CHANGE_MSG, 1)  # there is nothing to do about a refusal
    assert await vmm.take(12) == CONFIG_CHANGE
    await vmm.answer(BackendRequest.CONFIG_CHANGE_MSG)
    assert await vmm.is_silent()
    assert asked.requests.config_changes == 2


# -- a channel that is lost ------------------------------------------------------------------------


async def test_a_vmm_that_hangs_up_under_a_mapping_gave_no_verdict(asked: Asked) -> None:
    vmm = asked.connect()
    asked.requests.open()
    asked.want_mapping()
    await vmm.take(52)
    vmm.end.close()
    await trio.testing.wait_all_tasks_blocked(QUIET_S)
    assert asked.verdicts == [None]
    assert not asked.requests.possible


async def test_a_vmm_that_answers_nonsense_loses_the_channel_alone(asked: Asked) -> None:
    vmm = asked.connect()
    asked.requests.open()
    asked.want_mapping()
    await vmm.take(52)
    await vmm.answer(BackendRequest.SHMEM_UNMAP)
    assert asked.verdicts == [None]
    assert await vmm.is_closed()

    heir = asked.connect()

    assert await heir.take(12) == CONFIG_CHANGE, "what may have been lost is told again"
    await heir.answer(BackendRequest.CONFIG_CHANGE_MSG)
    asked.want_mapping()
    assert await heir.take(52) == MAP + MAPPING


async def test_a_stop_before_the_vmm_reads_the_mapping_costs_the_channel(asked: Asked) -> None:
    """Whole in its queue, QEMU would read it after the stop, and crash."""
    vmm = asked.connect()
    asked.requests.open()
    asked.want_mapping()
    await trio.testing.wait_all_tasks_blocked(QUIET_S)
    asked.requests.close()
    assert await vmm.take(51) == (MAP + MAPPING)[:-1]
    assert await vmm.is_closed()
    await trio.testing.wait_all_tasks_blocked(10 * QUIET_S)
    assert asked.verdicts == [None]


async def test_a_new_channel_closes_the_old_one_and_takes_what_waits(asked: Asked) -> None:
    """H29."""
    vmm = asked.connect()
    asked.requests.open()
    asked.requests.want_config_change()
    await vmm.take(12)
    heir = asked.connect()
    assert await vmm.is_closed()
    assert await heir.take(12) == CONFIG_CHANGE
