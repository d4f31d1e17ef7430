"""The VMM's end of a back-end channel, and what asks there. Must not know what is asked for."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

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
        self.requests = BackendRequests("mem0", Journal("web", limiter, self._publish))
        self.events: list[tuple[str, object]] = []
        self.image = OwnedFd(os.memfd_create("disk0"))
        self.verdicts: list[int | None] = []
        self._vmms: list[Vmm] = []

    def _publish(self, vm: str, event: str, fields: object) -> None:
        assert vm == "web"
        self.events.append((event, fields))

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
