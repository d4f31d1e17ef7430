"""A channel whose process was killed in the middle of a request: what the successor makes of it."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from vhostd.fds import OwnedFd
from vhostd.protocol.requests import BackendRequest
from vhostd.protocol.wire import ShmemMapping
from vhostd.transport.backend_channel import WITHDRAWN, BackendChannel, ChannelClosed

from tests.fakes import messages
from tests.fakes.messages import u64
from tests.transport.sockets import no_leak

NEED_REPLY = 0x9
REPLY = 0x5
CHANGE = messages.header(BackendRequest.CONFIG_CHANGE_MSG, NEED_REPLY, 0)
MAPPING = ShmemMapping(0, 0, 0, 4096, 1).pack()
MAP = messages.header(BackendRequest.SHMEM_MAP, NEED_REPLY, len(MAPPING)) + MAPPING


@asynccontextmanager
async def left(
    data: bytes, sent: int, *, hung_up: bool = False
) -> AsyncIterator[tuple[BackendChannel, socket.socket]]:
    """A channel of which `data` was to be sent, and `sent` bytes are on record; and its VMM."""
    with no_leak():
        ours, vmm = socket.socketpair()
        vmm.setblocking(False)
        if hung_up:
            ours.shutdown(socket.SHUT_RDWR)
        outbox = OwnedFd(os.memfd_create("outbox"))
        os.write(outbox.fileno(), CHANGE + data)
        os.lseek(outbox.fileno(), len(CHANGE) + sent, os.SEEK_SET)
        channel = BackendChannel.resume(OwnedFd(ours.detach()), outbox, reply_ack=True)
        try:
            yield channel, vmm
        finally:
            channel.close()
            vmm.close()


async def receive(vmm: socket.socket, size: int) -> bytes:
    """So many bytes."""
    data = b""
    with trio.fail_after(5):
        while len(data) < size:
            await trio.lowlevel.wait_readable(vmm)
            data += vmm.recv(size - len(data))
    return data


async def change(channel: BackendChannel, vmm: socket.socket, before: bytes = b"") -> None:
    """The next request goes out whole behind what came before, and is answered."""
    async with trio.open_nursery() as nursery:
        verdicts: list[int | None] = []

        async def request() -> None:
            verdicts.append(await channel.request(BackendRequest.CONFIG_CHANGE_MSG))

        nursery.start_soon(request)
        assert await receive(vmm, len(before)) == before
        assert await receive_all(vmm, CHANGE) == CHANGE
        vmm.send(messages.header(BackendRequest.CONFIG_CHANGE_MSG, REPLY, 8) + u64(0))
    assert verdicts == [0]


async def receive_all(vmm: socket.socket, expected: bytes) -> bytes:
    """A request comes in two, the rest once its first byte was read."""
    return await receive(vmm, 1) + await receive(vmm, len(expected) - 1)


async def test_a_request_of_which_nothing_went_out_is_forgotten() -> None:
    async with left(CHANGE, 0) as (channel, vmm):
        await change(channel, vmm)


@pytest.mark.parametrize("sent", [1, 5, len(CHANGE) - 1])
async def test_the_rest_of_one_that_is_under_way_follows(sent: int) -> None:
    """An older release held back the last byte only."""
    async with left(CHANGE, sent) as (channel, vmm):
        await change(channel, vmm, CHANGE[sent:])


async def test_one_that_carries_a_descriptor_is_taken_for_begun() -> None:
    """Its first byte leaves no trace; a VMM that has it alone would stand still for good."""
    async with left(MAP, 0) as (channel, vmm):
        await change(channel, vmm, MAP[1:])


async def test_one_whose_first_byte_is_on_record_goes_on() -> None:
    async with left(MAP, 1) as (channel, vmm):
        await change(channel, vmm, MAP[1:])


@pytest.mark.parametrize("data", [CHANGE, MAP], ids=["change", "map"])
@pytest.mark.parametrize("written", [False, True])
async def test_a_stop_withdraws_one_that_is_under_way(data: bytes, written: bool) -> None:
    """written: the predecessor died in the middle of the same."""
    refused = messages.header(data[0] | WITHDRAWN, 0x1, 0)
    left_behind = refused + data[len(refused) :] if written else data
    async with left(left_behind, 1) as (channel, vmm):
        channel.on_stopping()
        await change(channel, vmm, refused[1:])


async def test_a_stop_costs_the_channel_where_an_older_release_sent_too_much() -> None:
    async with left(CHANGE, len(CHANGE) - 1) as (channel, vmm):
        os.write(channel.fileno(), CHANGE[:-1])
        channel.on_stopping()
        assert channel.closed
        assert await receive(vmm, len(CHANGE) - 1) == CHANGE[:-1]


@pytest.mark.parametrize("data", [b"", CHANGE, MAP], ids=["nothing", "change", "map"])
@pytest.mark.parametrize("held_back", [0, 1, 5])
async def test_one_that_was_hung_up_is_closed_and_nothing_else_is(
    data: bytes, held_back: int
) -> None:
    async with left(data, max(0, len(data) - held_back), hung_up=True) as (channel, _vmm):
        assert channel.closed
        channel.on_stopping()
        with pytest.raises(ChannelClosed):
            await channel.request(BackendRequest.CONFIG_CHANGE_MSG)


async def test_a_stop_after_the_vmm_has_hung_up_costs_the_channel_alone() -> None:
    async with left(CHANGE, len(CHANGE) - 1) as (channel, vmm):
        vmm.close()
        channel.on_stopping()
        assert channel.closed
