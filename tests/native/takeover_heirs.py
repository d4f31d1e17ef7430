"""Processes that serve a guest until they are killed, each the successor of the one before.

    python -m tests.native.takeover_heirs CONTROL_FD

Forked, not executed anew, from one that has imported everything and nothing else: a take-over costs
milliseconds. Each adopts what the estate names, and serves it. Must not know what the guest does.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import select
import signal
import socket
import struct
import sys
from dataclasses import dataclass

from vhostd._native import (
    BalloonFlag,
    Device,
    Event,
    Handler,
    Image,
    Mapping,
    Region,
    RingSetup,
    Worker,
)

WORKER_NAME = "heir"
SUCCEED = b"s"
PR_SET_PDEATHSIG = 1
MESSAGE_SIZE_MAX = 4096
HEADER = struct.Struct("<III")  # request, flags, size of what follows
REPLY = 4
FD = struct.Struct("@i")
LENGTH = struct.Struct("<I")
PID = struct.Struct("<i")


@dataclass(frozen=True)
class Estate:
    """What is kept for the next one; descriptors are inherited under these numbers."""

    memory_fd: int
    regions: tuple[tuple[int, int, int], ...]  # guest address, size, file offset
    shared_fd: int
    reply_fd: int
    given_up_fd: int
    config_writable: bytes
    rings: tuple[RingSetup, ...]
    ready_fd: int  # an eventfd, raised once everything is served
    socket_fd: int = -1
    image_fds: tuple[int, int, int] | None = None  # file, witness, shared

    def fds(self) -> list[int]:
        """All of them."""
        found = [self.memory_fd, self.shared_fd, self.reply_fd, self.given_up_fd, self.ready_fd]
        for ring in self.rings:
            found += [ring.kick_fd, ring.call_fd, ring.err_fd]
        found += self.image_fds or ()
        return [fd for fd in [*found, self.socket_fd] if fd >= 0]


def answer_to(data: bytes) -> bytes:
    """What a control chain, or a message's payload, is answered with."""
    return data[::-1]


def answer_message(device: Device, connection: socket.socket) -> None:
    """Answer the message at the head of a socket, which the worker left to us, and hand it back."""
    # Not socket.recv_fds(), which takes flags and does not pass them on.
    data, ancillary, _, _ = connection.recvmsg(
        MESSAGE_SIZE_MAX, socket.CMSG_SPACE(FD.size), socket.MSG_PEEK
    )
    for _, _, content in ancillary:
        os.close(*FD.unpack(content))
    request, flags, size = HEADER.unpack_from(data)
    payload = data[HEADER.size : HEADER.size + size]
    reply = HEADER.pack(request, flags | REPLY, size) + answer_to(payload)
    device.prepare_reply(max(device.reply_numbers) + 1, HEADER.size + size, reply)
    finish_reply(device, connection)
    device.arm_socket()


def finish_reply(device: Device, connection: socket.socket) -> None:
    """See a reply out."""
    while not device.finish_reply():
        wait(connection.fileno(), select.POLLOUT)


def wait(fd: int, events: int) -> None:
    """Wait without a limit."""
    poller = select.poll()
    poller.register(fd, events)
    poller.poll()


class Heir:
    """One life."""

    def __init__(self, estate: Estate) -> None:
        """Take over everything."""
        self.estate = estate
        self.worker = Worker(WORKER_NAME)
        mapping = Mapping(estate.memory_fd, estate.given_up_fd)
        self.device = Device.adopt(
            estate.shared_fd,
            estate.reply_fd,
            len(estate.rings),
            len(estate.config_writable),
            estate.config_writable,
        )
        self.device.balloon_configure(BalloonFlag.MAY_DISCARD)
        self._park()
        self.device.attach(self.worker)
        self.device.set_regions([Region(*region, mapping) for region in estate.regions])
        if estate.image_fds is not None:
            self.device.set_image(Image(*estate.image_fds))
        for index, setup in enumerate(estate.rings):
            self.device.resume_ring(index, setup)
            self.device.enable_ring(index, True)
        self.connection = None
        if estate.socket_fd >= 0:
            self.connection = socket.socket(fileno=os.dup(estate.socket_fd))
            self.device.configure_socket(True, True)
            self.device.set_socket(self.connection.fileno())
        self.worker.unpark()
        if self.connection is not None:
            finish_reply(self.device, self.connection)
            self.device.arm_socket()
        os.eventfd_write(estate.ready_fd, 1)

    def _park(self) -> None:
        self.worker.park()
        while not self.worker.parked:
            wait(self.worker.notify_fd, select.POLLIN)
            os.eventfd_read(self.worker.notify_fd)

    def serve(self) -> None:
        """Answer control chains and messages for ever."""
        while True:
            wait(self.worker.notify_fd, select.POLLIN)
            os.eventfd_read(self.worker.notify_fd)
            events = self.device.take_events()
            if events & Event.SOCKET and self.connection is not None:
                answer_message(self.device, self.connection)
            if events & Event.CHAINS:
                self._answer_chains()

    def _answer_chains(self) -> None:
        for index, setup in enumerate(self.estate.rings):
            if setup.handler is Handler.CONTROL:
                self._answer(index)

    def _answer(self, index: int) -> None:
        while (chain := self.device.take_chain(index)) is not None:
            self.device.complete_chain(index, chain.token, answer_to(chain.data))


def receive(control: socket.socket, size: int) -> bytes:
    """Receive exactly size bytes; none at the end of the stream."""
    data = b""
    while len(data) < size:
        piece = control.recv(size - len(data))
        if not piece:
            return b""
        data += piece
    return data


def found_line(control: socket.socket) -> None:
    """Start a successor for each order, once the one before is gone: others kill it."""
    (length,) = LENGTH.unpack(receive(control, LENGTH.size))
    estate: Estate = pickle.loads(receive(control, length))
    living: int | None = None
    while receive(control, 1) == SUCCEED:
        if living is not None:
            os.waitpid(living, 0)
        living = os.fork()
        if living == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            control.close()
            Heir(estate).serve()
        control.sendall(PID.pack(living))
    if living is not None:
        os.waitpid(living, 0)


if __name__ == "__main__":
    found_line(socket.socket(fileno=int(sys.argv[1])))
