"""A scriptable vhost-user front end: one method a message, and every way to lie.

Setters ask for an acknowledgement once REPLY_ACK has been agreed on and return it (0 = accepted,
else refused); before that they return 0 unasked. Getters return what the reply says. Knows no
ring layout and no device; must not import vhostd.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Container, Sequence
from pathlib import Path

from tests.fakes import messages
from tests.fakes.channel import Channel, Message
from tests.fakes.messages import (
    VRING_NO_FD,
    Flags,
    ProtocolFeature,
    Request,
    WireRegion,
    u64,
    unpack_u64,
)


class Refused(Exception):
    """The back end answered a request with a non-zero acknowledgement."""


class FrontEnd(Channel):
    """The VMM's end of a vhost-user connection."""

    def __init__(self, sock: socket.socket, timeout_s: float = 10.0) -> None:
        """Take ownership of a connected socket."""
        super().__init__(sock, timeout_s)
        self.features = 0
        self.protocol_features = ProtocolFeature(0)
        self.backend_requests: Channel | None = None
        self.acknowledged: Container[int] | None = None  # setters sent with need_reply; None = all

    @classmethod
    def connect(cls, path: Path | str, timeout_s: float = 10.0) -> FrontEnd:
        """Connect to a listening back end."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        # A non-blocking connect fails at once when the backlog is full; this one waits its turn.
        limit = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1_000_000))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        try:
            sock.connect(str(path))
        except OSError:
            sock.close()
            raise
        return cls(sock, timeout_s)

    def close(self) -> None:
        """Hang up, the back-end request channel included."""
        if self.backend_requests is not None:
            self.backend_requests.close()
            self.backend_requests = None
        super().close()

    # -- the two ways to be answered ---------------------------------------------------------

    def ack(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send with need_reply and return the acknowledgement."""
        self.send(request, payload, fds, Flags.VERSION | Flags.NEED_REPLY)
        return self.receive_ack(request)

    def receive_ack(self, request: int) -> int:
        """Read the acknowledgement of a request that was sent with need_reply."""
        reply = self.receive_reply(request)
        assert not reply.fds, "an acknowledgement carries no descriptors"
        return unpack_u64(reply.payload)

    def ask(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        flags: int = Flags.VERSION,
    ) -> Message:
        """Send a request that always has a reply and return the reply."""
        self.send(request, payload, fds, flags)
        return self.receive_reply(request)

    def receive_reply(self, request: int) -> Message:
        """Read a message and insist that it is the reply to request, flags as QEMU insists."""
        reply = self.receive()
        assert reply.request == request, f"answered {reply.request}, asked {request}"
        assert reply.flags == Flags.VERSION | Flags.REPLY, f"reply flags {reply.flags:#x}"
        return reply

    def ask_u64(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Ask for a reply that is one number."""
        return unpack_u64(self.ask(request, payload, fds).payload)

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send with need_reply if that was agreed on and return the acknowledgement, else 0."""
        asks = self.acknowledged is None or request in self.acknowledged
        if ProtocolFeature.REPLY_ACK in self.protocol_features and asks:
            return self.ack(request, payload, fds)
        self.send(request, payload, fds)
        return 0

    # -- features and ownership --------------------------------------------------------------

    def get_features(self) -> int:
        """GET_FEATURES."""
        return self.ask_u64(Request.GET_FEATURES)

    def set_features(self, features: int) -> int:
        """SET_FEATURES."""
        self.features = features
        return self.tell(Request.SET_FEATURES, u64(features))

    def set_owner(self) -> int:
        """SET_OWNER."""
        return self.tell(Request.SET_OWNER)

    def reset_owner(self) -> int:
        """RESET_OWNER."""
        return self.tell(Request.RESET_OWNER)

    def get_protocol_features(self) -> ProtocolFeature:
        """GET_PROTOCOL_FEATURES."""
        return ProtocolFeature(self.ask_u64(Request.GET_PROTOCOL_FEATURES))

    def set_protocol_features(self, features: int) -> int:
        """SET_PROTOCOL_FEATURES; setters ask for acknowledgements from here on if REPLY_ACK."""
        self.send(Request.SET_PROTOCOL_FEATURES, u64(features))
        self.protocol_features = ProtocolFeature(features)
        return 0

    def get_queue_num(self) -> int:
        """GET_QUEUE_NUM."""
        return self.ask_u64(Request.GET_QUEUE_NUM)

    def set_status(self, status: int) -> int:
        """SET_STATUS."""
        return self.tell(Request.SET_STATUS, u64(status))

    def get_status(self) -> int:
        """GET_STATUS."""
        return self.ask_u64(Request.GET_STATUS)

    def reset_device(self) -> int:
        """RESET_DEVICE."""
        return self.tell(Request.RESET_DEVICE)

    # -- memory ------------------------------------------------------------------------------

    def set_mem_table(
        self, regions: Sequence[WireRegion], fds: Sequence[int], count: int | None = None
    ) -> int:
        """SET_MEM_TABLE, one descriptor a region; count lies about how many there are."""
        return self.tell(Request.SET_MEM_TABLE, messages.memory_table(regions, count), fds)

    def get_max_mem_slots(self) -> int:
        """GET_MAX_MEM_SLOTS."""
        return self.ask_u64(Request.GET_MAX_MEM_SLOTS)

    def add_mem_reg(self, region: WireRegion, fd: int) -> int:
        """ADD_MEM_REG."""
        return self.tell(Request.ADD_MEM_REG, messages.memory_slot(region), [fd])

    def rem_mem_reg(self, region: WireRegion, fds: Sequence[int] = ()) -> int:
        """REM_MEM_REG."""
        return self.tell(Request.REM_MEM_REG, messages.memory_slot(region), fds)

    def set_log_base(self, size: int, offset: int, fd: int) -> Message:
        """SET_LOG_BASE; with LOG_SHMFD the back end always replies."""
        return self.ask(Request.SET_LOG_BASE, messages.log(size, offset), [fd])

    def set_log_fd(self, fd: int) -> int:
        """SET_LOG_FD."""
        return self.tell(Request.SET_LOG_FD, b"", [fd])

    # -- rings -------------------------------------------------------------------------------

    def set_vring_num(self, index: int, size: int) -> int:
        """SET_VRING_NUM: the ring's number of descriptors."""
        return self.tell(Request.SET_VRING_NUM, messages.vring_state(index, size))

    def set_vring_addr(
        self, index: int, desc: int, avail: int, used: int, flags: int = 0, log: int = 0
    ) -> int:
        """SET_VRING_ADDR: frontend addresses, guest addresses with GPA_ADDRESSES."""
        payload = messages.vring_addr(index, desc, avail, used, flags, log)
        return self.tell(Request.SET_VRING_ADDR, payload)

    def set_vring_base(self, index: int, base: int) -> int:
        """SET_VRING_BASE; packed rings: used index and wrap above, available below 2^16."""
        return self.tell(Request.SET_VRING_BASE, messages.vring_state(index, base))

    def get_vring_base(self, index: int) -> int:
        """GET_VRING_BASE: stops the ring and returns where it stands."""
        reply = self.ask(Request.GET_VRING_BASE, messages.vring_state(index, 0))
        answered, base = messages.unpack_vring_state(reply.payload)
        assert answered == index, f"GET_VRING_BASE answered ring {answered}, asked {index}"
        return base

    def set_vring_enable(self, index: int, enable: bool) -> int:
        """SET_VRING_ENABLE."""
        return self.tell(Request.SET_VRING_ENABLE, messages.vring_state(index, int(enable)))

    def set_vring_kick(self, index: int, fd: int | None) -> int:
        """SET_VRING_KICK; None = no descriptor."""
        return self._set_vring_fd(Request.SET_VRING_KICK, index, fd)

    def set_vring_call(self, index: int, fd: int | None) -> int:
        """SET_VRING_CALL; None = no descriptor."""
        return self._set_vring_fd(Request.SET_VRING_CALL, index, fd)

    def set_vring_err(self, index: int, fd: int | None) -> int:
        """SET_VRING_ERR; None = no descriptor."""
        return self._set_vring_fd(Request.SET_VRING_ERR, index, fd)

    def vring_kick(self, index: int) -> int:
        """VRING_KICK, the in-band kick."""
        return self.tell(Request.VRING_KICK, messages.vring_state(index, 0))

    def _set_vring_fd(self, request: Request, index: int, fd: int | None) -> int:
        if fd is None:
            return self.tell(request, u64(index | VRING_NO_FD))
        return self.tell(request, u64(index), [fd])

    # -- config space ------------------------------------------------------------------------

    def get_config(self, offset: int = 0, size: int = 16, flags: int = 0) -> bytes:
        """GET_CONFIG.

        Raises:
            Refused: the reply's size field is 0, the specification's error mark.
        """
        reply = self.ask(Request.GET_CONFIG, messages.config(offset, bytes(size), flags))
        _offset, answered, _flags, content = messages.unpack_config(reply.payload)
        if answered == 0:
            raise Refused("GET_CONFIG")
        assert answered == size == len(content), f"{answered} stated, {len(content)} sent"
        return content

    def set_config(self, offset: int, content: bytes, flags: int = 0) -> int:
        """SET_CONFIG."""
        return self.tell(Request.SET_CONFIG, messages.config(offset, content, flags))

    # -- back-end requests -------------------------------------------------------------------

    def set_backend_req_fd(self) -> int:
        """SET_BACKEND_REQ_FD with a fresh socket pair; our end is backend_requests."""
        ours, theirs = socket.socketpair()
        with theirs:
            verdict = self.tell(Request.SET_BACKEND_REQ_FD, b"", [theirs.fileno()])
        if self.backend_requests is not None:
            self.backend_requests.close()
        self.backend_requests = Channel(ours, self.timeout_s)
        return verdict

    def next_backend_request(self, timeout_s: float = 5.0) -> Message:
        """Wait for the back end's next request.

        Raises:
            TimeoutError: none came.
        """
        assert self.backend_requests is not None, "no SET_BACKEND_REQ_FD was sent"
        return self.backend_requests.receive(timeout_s)

    def answer_backend_request(self, message: Message, verdict: int = 0) -> None:
        """Acknowledge a back-end request if it asks for that."""
        assert self.backend_requests is not None, "no SET_BACKEND_REQ_FD was sent"
        if message.flags & Flags.NEED_REPLY:
            self.backend_requests.send(
                message.request, u64(verdict), flags=Flags.VERSION | Flags.REPLY
            )

    # -- in-flight tracking, state transfer, post-copy, shared memory ------------------------

    def get_inflight_fd(self, queue_count: int, queue_size: int) -> Message:
        """GET_INFLIGHT_FD; the reply carries the buffer's descriptor."""
        return self.ask(Request.GET_INFLIGHT_FD, messages.inflight(0, 0, queue_count, queue_size))

    def set_inflight_fd(
        self, mmap_size: int, mmap_offset: int, queue_count: int, queue_size: int, fd: int
    ) -> int:
        """SET_INFLIGHT_FD."""
        payload = messages.inflight(mmap_size, mmap_offset, queue_count, queue_size)
        return self.tell(Request.SET_INFLIGHT_FD, payload, [fd])

    def set_device_state_fd(self, direction: int, phase: int, fd: int) -> Message:
        """SET_DEVICE_STATE_FD: u64 reply, bits 0-7 error, bit 8 = no descriptor came back."""
        return self.ask(Request.SET_DEVICE_STATE_FD, messages.device_state(direction, phase), [fd])

    def check_device_state(self) -> int:
        """CHECK_DEVICE_STATE: 0 = the transfer went well."""
        return self.ask_u64(Request.CHECK_DEVICE_STATE)

    def postcopy_advise(self) -> Message:
        """POSTCOPY_ADVISE; the reply carries a userfaultfd."""
        return self.ask(Request.POSTCOPY_ADVISE)

    def postcopy_listen(self) -> int:
        """POSTCOPY_LISTEN."""
        return self.tell(Request.POSTCOPY_LISTEN)

    def postcopy_end(self) -> int:
        """POSTCOPY_END."""
        return self.ask_u64(Request.POSTCOPY_END)

    def get_shmem_config(self) -> tuple[int, tuple[int, ...]]:
        """GET_SHMEM_CONFIG: region count and 256 sizes."""
        return messages.unpack_shmem_config(self.ask(Request.GET_SHMEM_CONFIG).payload)
