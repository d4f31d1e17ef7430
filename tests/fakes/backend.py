"""A scriptable vhost-user back end to put under a real VMM: it records, answers, and misbehaves.

It does no device's work: rings stay untouched. A test reads what the VMM sent, and chooses what
goes back to it, and when. Must not import vhostd, and must not know what VMM is at the other end.
"""

from __future__ import annotations

import array
import os
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from tests.fakes.channel import ConnectionLost, Message
from tests.fakes.messages import (
    HEADER_SIZE,
    BackendRequest,
    Flags,
    ProtocolFeature,
    Request,
    VirtioFeature,
    header,
    u64,
    unpack_header,
    unpack_vring_state,
)

FEATURES = VirtioFeature.PROTOCOL_FEATURES | VirtioFeature.VERSION_1
PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.BACKEND_SEND_FD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
SHMEM_REGIONS_MAX = 256
_FDS_MAX = 253  # SCM_MAX_FD


@dataclass(frozen=True)
class Offer:
    """What the back end answers; sizes in bytes.

    Attributes:
        config: the whole config space. Its length is the device's config_size.
        shmem_sizes: shared memory regions of GET_SHMEM_CONFIG, by number.
    """

    features: int = FEATURES
    protocol_features: int = PROTOCOL_FEATURES
    queue_count: int = 5
    memory_slots: int = 32
    config: bytes = bytes(16)
    shmem_sizes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Seen:
    """One message of the front end as it came; its descriptors are counted and gone."""

    request: int
    flags: int
    payload: bytes
    fd_count: int

    @property
    def need_reply(self) -> bool:
        """Whether an answer is owed because the header says so."""
        return bool(self.flags & Flags.NEED_REPLY)

    @property
    def number(self) -> int:
        """The payload of a message that carries one u64."""
        (value,) = struct.unpack("=Q", self.payload)
        return int(value)

    @property
    def ring(self) -> tuple[int, int]:
        """Index and number, for messages that carry a vring state."""
        return unpack_vring_state(self.payload)


Hook = Callable[[Seen], None]


@dataclass
class BackEnd:
    """Serves one connection. Made by listening().

    Attributes:
        seen: every message so far; a test may clear it.
        unanswered: requests that get no reply, however much one is owed.
        before_answer: called with each message before its answer goes out, so that what it does
            is done while the front end still waits.
        lost: why the connection is over, None while it is up or not yet made.
    """

    offer: Offer
    seen: list[Seen] = field(default_factory=list)
    unanswered: set[int] = field(default_factory=set)
    before_answer: Hook | None = None
    lost: str | None = None
    _changed: trio.Event = field(default_factory=trio.Event)
    _bases: dict[int, int] = field(default_factory=dict)
    _channel: trio.socket.SocketType | None = None

    def requests(self) -> list[int]:
        """The numbers of all messages seen, in order."""
        return [message.request for message in self.seen]

    def of(self, request: Request) -> list[Seen]:
        """The messages of one kind, in order."""
        return [message for message in self.seen if message.request == request]

    async def until(self, holds: Callable[[], bool], timeout_s: float = 30) -> None:
        """Wait until it holds; looked at after every message, and when the connection ends.

        Raises:
            TooSlowError: it did not in time.
        """
        with trio.fail_after(timeout_s):
            while not holds():
                await self._changed.wait()

    async def wait_for(self, request: Request, count: int = 1, timeout_s: float = 30) -> None:
        """Wait until `count` messages of one kind have been seen (since seen was cleared)."""
        await self.until(lambda: len(self.of(request)) >= count, timeout_s)

    def send(
        self,
        request: BackendRequest,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        flags: int = Flags.VERSION,
    ) -> None:
        """Put one message of our own on the front end's back-end channel, at once, as it is.

        Raises:
            AssertionError: the front end has given no channel yet.
        """
        assert self._channel is not None, "the front end has sent no SET_BACKEND_REQ_FD"
        data = header(request, flags, len(payload)) + payload
        stdlib = self._channel._sock if False else self._channel
        del stdlib
        _send_now(self._channel.fileno(), data, fds)

    async def next_answer(self, timeout_s: float = 10) -> Message:
        """The front end's next answer on the back-end channel.

        Raises:
            TooSlowError: none came in time.
            ConnectionLost: the front end closed the channel.
        """
        assert self._channel is not None, "the front end has sent no SET_BACKEND_REQ_FD"
        with trio.fail_after(timeout_s):
            return await _receive(self._channel)
