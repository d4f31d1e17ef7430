"""A balloon back end in its smallest honest form, to test the fakes against something.

Walks rings with its own reader, straight from the specification's figures, and shares none of the
driver's code. It trusts the front end completely: that makes it no example for a real back end.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.fakes.channel import Channel, ConnectionLost, Message
from tests.fakes.messages import Flags, ProtocolFeature, Request, VirtioFeature

FEATURES = (
    0b101110
    | VirtioFeature.PROTOCOL_FEATURES
    | VirtioFeature.VERSION_1
    | VirtioFeature.RING_PACKED
    | VirtioFeature.RING_EVENT_IDX
    | VirtioFeature.RING_INDIRECT_DESC
    | VirtioFeature.IN_ORDER
)
PROTOCOL_FEATURES = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.STATUS
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)
PUNCH_HOLE_KEEP_SIZE = 3
libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


@dataclass
class Ring:
    """What the front end said of one ring, and where we stand in it."""

    size: int = 0
    desc: int = 0
    avail: int = 0
    used: int = 0
    base: int = 0
    kick: int = -1
    call: int = -1
    enabled: bool = False
    done: int = 0  # split: used index; packed: chains given back
    chains: list[list[tuple[int, int, bool]]] = field(default_factory=list)


class Loopback(threading.Thread):
    """Serves one connection on a listening socket, then ends."""

    def __init__(self, path: Path) -> None:
        """Listen at path."""
        super().__init__(daemon=True)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(path))
        self.listener.listen(1)
        self.features = 0
        self.regions: list[tuple[int, int, int, int]] = []
        self.memory = mmap.mmap(-1, 4096)
        self.memory_fd = -1
        self.rings = [Ring() for _ in range(5)]
        self.config = bytearray(16)
        self.backend_socket = -1
        self.seen: list[int] = []

    def run(self) -> None:
        """Accept and serve until the front end hangs up."""
        sock, _ = self.listener.accept()
        channel = Channel(sock)
        try:
            while True:
                kicks = {ring.kick: ring for ring in self.rings if ring.kick >= 0}
                poller = select.poll()
                for fd in (channel.fileno(), *kicks):
                    poller.register(fd, select.POLLIN)
                for fd, _events in poller.poll(10_000):
                    if fd == channel.fileno():
                        self.on_message(channel, channel.receive())
                    elif fd in kicks:
                        os.eventfd_read(fd)
                        self.serve(kicks[fd])
        except ConnectionLost:
            pass
        finally:
            channel.close()
            self.listener.close()
            kept = [self.memory_fd, self.backend_socket]
            for fd in kept + [fd for ring in self.rings for fd in (ring.kick, ring.call)]:
                if fd >= 0:
                    os.close(fd)

    # -- messages ----------------------------------------------------------------------------

    def on_message(self, channel: Channel, message: Message) -> None:
        """Do what one message says and answer it."""
        self.seen.append(message.request)
        request, payload = message.request, message.payload
        reply = self.reply_to(message)
        if request in (Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ENABLE):
            index, number = struct.unpack("=2I", payload)
            ring = self.rings[index]
            if request == Request.SET_VRING_NUM:
                ring.size = number
            elif request == Request.SET_VRING_BASE:
                ring.base = number
            else:
                ring.enabled = bool(number)
                if ring.enabled:
                    self.serve(ring)
        elif request == Request.SET_VRING_ADDR:
            index, _flags, desc, used, avail, _log = struct.unpack("=2I4Q", payload)
            ring = self.rings[index]
            ring.desc, ring.avail, ring.used = map(self.from_frontend, (desc, avail, used))
        elif request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL):
            self.on_vring_fd(message)
        elif request == Request.ADD_MEM_REG:
            self.regions.append(struct.unpack("=8x4Q", payload))
            size = os.fstat(message.fds[0]).st_size
            self.memory = mmap.mmap(message.fds[0], size)
            if self.memory_fd >= 0:
                os.close(self.memory_fd)
            self.memory_fd = message.fds[0]
        elif request == Request.SET_CONFIG:
            self.config[:] = payload[12:28]
        elif request == Request.SET_FEATURES:
            (self.features,) = struct.unpack("=Q", payload)
        elif request == Request.SET_BACKEND_REQ_FD:
            self.backend_socket = message.fds[0]
        elif request == Request.SET_VRING_ERR:
            message.close_fds()
        if reply is None and message.flags & Flags.NEED_REPLY:
            reply = struct.pack("=Q", 0)
        if reply is not None:
            channel.send(request, reply, flags=Flags.VERSION | Flags.REPLY)

    def reply_to(self, message: Message) -> bytes | None:
        """Return the payload of a reply that is always sent."""
        numbers: dict[int, int] = {
            Request.GET_FEATURES: FEATURES,
            Request.GET_PROTOCOL_FEATURES: PROTOCOL_FEATURES,
            Request.GET_QUEUE_NUM: 5,
            Request.GET_MAX_MEM_SLOTS: 32,
            Request.GET_STATUS: 0,
        }
        if message.request in numbers:
            return struct.pack("=Q", numbers[message.request])
        if message.request == Request.GET_CONFIG:
            return message.payload[:12] + self.config
        if message.request == Request.GET_VRING_BASE:
            (index, _number) = struct.unpack("=2I", message.payload)
            return struct.pack("=2I", index, self.rings[index].base)
        return None

    def on_vring_fd(self, message: Message) -> None:
        """Keep a kick or call eventfd, close the one before it."""
        ring = self.rings[message.payload[0]]
        fd = message.fds[0]
        if message.request == Request.SET_VRING_KICK:
            old, ring.kick = ring.kick, fd
        else:
            old, ring.call = ring.call, fd
        if old >= 0:
            os.close(old)

    # -- memory ------------------------------------------------------------------------------

    def from_frontend(self, address: int) -> int:
        """Turn a frontend address into a file offset."""
        for _guest, size, frontend, offset in self.regions:
            if frontend <= address < frontend + size:
                return address - frontend + offset
        raise KeyError(hex(address))

    def from_guest(self, address: int) -> int:
        """Turn a guest address into a file offset."""
        for guest, size, _frontend, offset in self.regions:
            if guest <= address < guest + size:
                return address - guest + offset
        raise KeyError(hex(address))

    def punch(self, guest_addr: int, size: int) -> None:
        """Give a range back to the host."""
        offset = self.from_guest(guest_addr)
        assert libc.fallocate(self.memory_fd, PUNCH_HOLE_KEEP_SIZE, offset, size) == 0

    # -- rings -------------------------------------------------------------------------------

    def serve(self, ring: Ring) -> None:
        """Take and give back everything that is available; always call."""
        packed = bool(self.features & VirtioFeature.RING_PACKED)
        for chain in self.packed_chains(ring) if packed else self.split_chains(ring):
            ring.chains.append(chain)
            index = self.rings.index(ring)
            for address, size, _writable in chain:
                if index == 0:
                    at = self.from_guest(address)
                    for (pfn,) in struct.iter_unpack("<I", self.memory[at : at + size]):
                        self.punch(pfn << 12, 4096)
                elif index == 4:
                    self.punch(address, size)
        if ring.call >= 0 and ring.chains:
            os.eventfd_write(ring.call, 1)

    def split_chains(self, ring: Ring) -> Iterator[list[tuple[int, int, bool]]]:
        """Yield available chains of a split ring; each is used when the next is asked for."""
        memory = self.memory
        while True:
            (index,) = struct.unpack_from("<H", memory, ring.avail + 2)
            if index == ring.base:
                event = ring.used + 4 + 8 * ring.size
                struct.pack_into("<H", memory, event, ring.base)
                return
            (head,) = struct.unpack_from("<H", memory, ring.avail + 4 + 2 * (ring.base % ring.size))
            ring.base = (ring.base + 1) % 65536
            yield self.split_walk(ring.desc, head)
            at = ring.used + 4 + 8 * (ring.done % ring.size)
            struct.pack_into("<II", memory, at, head, 0)
            ring.done = (ring.done + 1) % 65536
            struct.pack_into("<H", memory, ring.used + 2, ring.done)

    def split_walk(self, table: int, slot: int) -> list[tuple[int, int, bool]]:
        """Follow next links, into an indirect table where one is named."""
        chain: list[tuple[int, int, bool]] = []
        while True:
            address, size, flags, following = struct.unpack_from(
                "<QIHH", self.memory, table + 16 * slot
            )
            if flags & 4:
                return chain + self.split_walk(self.from_guest(address), 0)
            chain.append((address, size, bool(flags & 2)))
            if not flags & 1:
                return chain
            slot = following

    def packed_chains(self, ring: Ring) -> Iterator[list[tuple[int, int, bool]]]:
        """Yield available chains of a packed ring; each is used when the next is asked for."""
        memory = self.memory
        while True:
            first, wrap = ring.base & 0x7FFF, ring.base >> 15 & 1
            (flags,) = struct.unpack_from("<H", memory, ring.desc + 16 * first + 14)
            if flags >> 7 & 1 != wrap or flags >> 15 & 1 == wrap:
                return
            chain: list[tuple[int, int, bool]] = []
            slot, more, identity = first, True, 0
            count = 0
            while more:
                address, size, identity, flags = struct.unpack_from(
                    "<QIHH", memory, ring.desc + 16 * slot
                )
                if flags & 4:
                    table = self.from_guest(address)
                    for at in range(table, table + size, 16):
                        a, s, _, f = struct.unpack_from("<QIHH", memory, at)
                        chain.append((a, s, bool(f & 2)))
                else:
                    chain.append((address, size, bool(flags & 2)))
                count, slot, more = count + 1, (slot + 1) % ring.size, bool(flags & 1)
            yield chain
            struct.pack_into("<QIH", memory, ring.desc + 16 * first, 0, 0, identity)
            struct.pack_into("<H", memory, ring.desc + 16 * first + 14, 0x8080 if wrap else 0)
            wrapped = first + count >= ring.size
            ring.base = (first + count) % ring.size | (wrap ^ wrapped) << 15
