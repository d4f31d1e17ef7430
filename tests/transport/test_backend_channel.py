"""H104 and H29: requests to a VMM that answers, does not answer, or answers nonsense."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing
from vhostd.errors import FrontendError
from vhostd.fds import OwnedFd
from vhostd.protocol.requests import BackendRequest
from vhostd.protocol.wire import ShmemMapping
from vhostd.transport.backend_channel import (
    UNANSWERED_MAX,
    WITHDRAWN,
    BackendChannel,
    ChannelClosed,
    NotAsked,
)

from tests.fakes import messages
from tests.fakes.messages import u64
from tests.protocol.streams import Watched
from tests.transport.sockets import link, no_leak

CONFIG_CHANGE = BackendRequest.CONFIG_CHANGE_MSG
SHMEM_MAP = BackendRequest.SHMEM_MAP
REPLY = 0x5

REQUEST = messages.header(CONFIG_CHANGE, 0x9, 0)


class Vmm:
    """The VMM's end of the channel, which reads all that comes."""

    def __init__(self, end: socket.socket) -> None:
        self.send = end.send
        self.end = end
        self.fds: list[int] = []
        self._received = b""
        self._more = trio.Event()
        end.setblocking(False)

    async def read(self) -> None:
        """Read until the other side hangs up."""
        while True:
            await trio.lowlevel.wait_readable(self.end)
            try:
                data, fds, _flags, _address = socket.recv_fds(self.end, 100, 4)
            except ConnectionResetError:
                return  # it hung up before it had read all we sent
            if not data:
                return
            self._received += data
            self._more.set()
            self.fds += fds

    async def take(self, size: int) -> bytes:
        """Wait for as many bytes, and return them."""
        with trio.fail_after(5):
            while len(self._received) < size:
                self._more = trio.Event()
                await self._more.wait()
        taken, self._received = self._received[:size], self._received[size:]
        return taken

    @property
    def untaken(self) -> bytes:
        """What came and was not taken."""
        return self._received


Pair = tuple[BackendChannel, Vmm]
SilentPair = tuple[BackendChannel, socket.socket]


def channel_over(ours: socket.socket, reply_ack: bool) -> BackendChannel:
    with open("/dev/null") as connection:  # noqa: PTH123 - any descriptor that is not ours
        fd = OwnedFd(ours.detach())
        return BackendChannel.adopt(fd, reply_ack=reply_ack, connection_fd=connection.fileno())


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """A channel with acknowledgements, and a VMM that reads."""
    ours, theirs = socket.socketpair()
    channel = channel_over(ours, reply_ack=True)
    vmm = Vmm(theirs)
    with theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vmm.read)
            yield channel, vmm
            channel.close()


@pytest.fixture
async def unread() -> AsyncIterator[SilentPair]:
    """A channel with acknowledgements, and a socket that nobody reads by itself."""
    ours, theirs = socket.socketpair()
    channel = channel_over(ours, reply_ack=True)
    theirs.settimeout(5)
    with theirs:
        yield channel, theirs
    channel.close()


def answer(request: int, verdict: int = 0, flags: int = REPLY) -> bytes:
    return messages.header(request, flags, 8) + u64(verdict)


async def test_without_reply_ack_nothing_is_asked_for_or_waited_for() -> None:
    ours, theirs = socket.socketpair()
    channel = channel_over(ours, reply_ack=False)
    vmm = Vmm(theirs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(vmm.read)

        assert await channel.request(CONFIG_CHANGE) is None

        assert await vmm.take(12) == messages.header(CONFIG_CHANGE, 0x1, 0)
        channel.close()
    theirs.close()


@pytest.mark.parametrize("verdict", [0, 1, (1 << 64) - 1])
async def test_the_verdict_comes_back(pair: Pair, verdict: int) -> None:
    channel, vmm = pair
    vmm.send(answer(CONFIG_CHANGE, verdict))

    assert await channel.request(CONFIG_CHANGE) == verdict

    assert await vmm.take(12) == REQUEST
    assert not vmm.untaken
    assert not channel.closed


async def test_a_mapping_goes_out_with_its_file(pair: Pair) -> None:
    channel, vmm = pair
    with no_leak(), OwnedFd(os.memfd_create("image")) as image:
        vmm.send(answer(SHMEM_MAP))
        mapping = ShmemMapping(0, 0, 0, 4096, ShmemMapping.WRITABLE)

        assert await channel.request(SHMEM_MAP, mapping.pack(), [image]) == 0

        assert await vmm.take(52) == messages.header(SHMEM_MAP, 0x9, 40) + mapping.pack()
        (fd,) = vmm.fds
        assert link(fd) == link(image.fileno())
        os.close(fd)


@pytest.mark.parametrize(
    "nonsense",
    [
        answer(SHMEM_MAP),
        answer(0),
        answer(CONFIG_CHANGE, flags=0x1),
        answer(CONFIG_CHANGE, flags=0xD),
        messages.header(CONFIG_CHANGE, REPLY, 0),
        messages.header(CONFIG_CHANGE, REPLY, 4) + bytes(4),
        messages.header(CONFIG_CHANGE, REPLY, 0xFFFF_FFFF),
        b"\xff" * 64,
    ],
)
async def test_a_wrong_answer_closes_this_channel(pair: Pair, nonsense: bytes) -> None:
    """H104."""
    channel, vmm = pair
    vmm.send(nonsense)

    with pytest.raises(ChannelClosed):
        await channel.request(CONFIG_CHANGE)

    assert channel.closed
    with pytest.raises(ChannelClosed):
        await channel.request(CONFIG_CHANGE)


@pytest.mark.parametrize("sent", [b"", answer(CONFIG_CHANGE)[:5], answer(CONFIG_CHANGE)[:15]])
async def test_a_vmm_that_hangs_up_closes_this_channel(pair: Pair, sent: bytes) -> None:
    channel, vmm = pair
    vmm.send(sent)
    vmm.end.shutdown(socket.SHUT_WR)

    with pytest.raises(ChannelClosed):
        await channel.request(CONFIG_CHANGE)


async def test_an_answer_in_single_bytes_is_an_answer(pair: Pair) -> None:
    channel, vmm = pair
    verdicts: list[int | None] = []

    async def ask() -> None:
        verdicts.append(await channel.request(CONFIG_CHANGE))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        for byte in answer(CONFIG_CHANGE, 7):
            await trio.testing.wait_all_tasks_blocked(0.001)
            vmm.send(bytes([byte]))
    assert verdicts == [7]


@pytest.mark.parametrize("early", [0, 1, 12, 19])
async def test_a_late_answer_is_not_taken_for_the_next_requests(pair: Pair, early: int) -> None:
    """H104: a VMM busy with a stop answers when it is done; the channel must not be lost by it."""
    channel, vmm = pair
    late = answer(CONFIG_CHANGE, 1)
    vmm.send(late[:early])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.request, CONFIG_CHANGE)
        await vmm.take(12)
        await trio.testing.wait_all_tasks_blocked(0.001)
        nursery.cancel_scope.cancel()

    vmm.send(late[early:] + answer(CONFIG_CHANGE, 2))

    assert await channel.request(CONFIG_CHANGE) == 2


async def test_a_vmm_that_never_answers_is_given_up(pair: Pair) -> None:
    """H104: without end, neither its socket buffer nor our list may fill."""
    channel, vmm = pair
    for _ in range(UNANSWERED_MAX):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.request, CONFIG_CHANGE)
            assert await vmm.take(12) == REQUEST
            nursery.cancel_scope.cancel()
    assert not channel.closed

    with pytest.raises(ChannelClosed, match="unanswered"):
        await channel.request(CONFIG_CHANGE)


async def test_requests_take_turns(pair: Pair) -> None:
    channel, vmm = pair
    verdicts: list[int | None] = []

    async def ask() -> None:
        verdicts.append(await channel.request(CONFIG_CHANGE))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
        for verdict in range(3):
            assert await vmm.take(12) == REQUEST
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not vmm.untaken
            vmm.send(answer(CONFIG_CHANGE, verdict))
    assert verdicts == [0, 1, 2]


async def test_descriptors_in_an_answer_are_closed(pair: Pair) -> None:
    channel, vmm = pair
    file = Watched()
    socket.send_fds(vmm.end, [answer(CONFIG_CHANGE)], [file.fd.fileno()])
    file.fd.close()
    await channel.request(CONFIG_CHANGE)
    assert file.closed


async def test_closing_wakes_who_asks(pair: Pair) -> None:
    """H29: a new channel replaces the old one under a request."""
    channel, vmm = pair
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(ChannelClosed):
                await channel.request(CONFIG_CHANGE)

        nursery.start_soon(ask)
        await vmm.take(12)
        channel.close()


# -- all but the first byte waits until that was read ----------------------------------------------

REFUSED = messages.header(CONFIG_CHANGE | WITHDRAWN, 0x1, 0)


async def test_a_request_is_not_whole_before_the_vmm_reads(unread: SilentPair) -> None:
    """Whole in its queue, QEMU would read it after a stop, and crash."""
    channel, vmm = unread
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.request, CONFIG_CHANGE)
        await trio.sleep(0.05)
        assert vmm.recv(100) == REQUEST[:1]
        await trio.to_thread.run_sync(lambda: vmm.recv_into(bytearray(1), 1, socket.MSG_PEEK))
        assert vmm.recv(100) == REQUEST[1:]
        vmm.send(answer(CONFIG_CHANGE))


@pytest.mark.parametrize("read", [False, True])
async def test_a_stop_withdraws_a_request_that_is_not_whole(unread: SilentPair, read: bool) -> None:
    """A VMM that waits in its handler for the rest is not left waiting either."""
    channel, vmm = unread
    received = b""
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(NotAsked):
                await channel.request(CONFIG_CHANGE)

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        if read:
            received = vmm.recv(100)
        channel.on_stopping()

    while len(received) < len(REFUSED):
        received += vmm.recv(100)
    assert received == REFUSED
    assert REFUSED[0] == REQUEST[0]
    vmm.send(answer(CONFIG_CHANGE, 7))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.request, CONFIG_CHANGE)
        await trio.testing.wait_all_tasks_blocked()
        received = vmm.recv(100)
        await trio.to_thread.run_sync(lambda: vmm.recv_into(bytearray(1), 1, socket.MSG_PEEK))
        assert received + vmm.recv(100) == REQUEST


async def test_a_withdrawn_mapping_brings_no_payload(unread: SilentPair) -> None:
    channel, vmm = unread
    with OwnedFd(os.memfd_create("image")) as image:
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                with pytest.raises(NotAsked):
                    await channel.request(SHMEM_MAP, ShmemMapping(0, 0, 0, 4096, 0).pack(), [image])

            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            channel.on_stopping()
    received, fds, _flags, _address = socket.recv_fds(vmm, 1, 4)
    received += vmm.recv(100)
    assert received == messages.header(SHMEM_MAP | WITHDRAWN, 0x1, 0)
    for fd in fds:
        os.close(fd)


async def test_a_request_given_up_before_it_was_read_costs_the_channel(unread: SilentPair) -> None:
    """Nobody would send its last byte any more."""
    channel, _vmm = unread
    with trio.move_on_after(0.01):
        await channel.request(CONFIG_CHANGE)

    assert channel.closed


async def test_a_request_that_may_not_begin_any_more_sends_nothing(unread: SilentPair) -> None:
    channel, vmm = unread
    with pytest.raises(NotAsked):
        await channel.request(CONFIG_CHANGE, may_begin=lambda: False)

    assert not channel.closed
    vmm.setblocking(False)
    with pytest.raises(BlockingIOError):
        vmm.recv(1)


# -- what is taken for a channel -------------------------------------------------------------------


def refused(fd: int, connection_fd: int = 0) -> None:
    owned = OwnedFd(fd)
    with pytest.raises(FrontendError):
        BackendChannel.adopt(owned, reply_ack=True, connection_fd=connection_fd)
    assert owned.closed


async def test_only_stream_sockets_are_channels() -> None:
    """H18."""
    with no_leak():
        refused(os.memfd_create("x"))
        refused(os.open("/", os.O_PATH))
        refused(os.eventfd(0))
        refused(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach())
        refused(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach())
        for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET):
            refused(end.detach())


async def test_the_connection_itself_is_no_channel(tmp_path: Path) -> None:
    """H19: neither end; a request there would be read as a reply, or hold the connection open."""
    with no_leak():
        ours, theirs = socket.socketpair()
        with ours, theirs:
            refused(os.dup(ours.fileno()), ours.fileno())
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.bind(str(tmp_path / "s"))
            server.listen()
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as vmm:
                vmm.connect(str(tmp_path / "s"))
                connection, _address = server.accept()
                with connection:
                    refused(os.dup(vmm.fileno()), connection.fileno())
