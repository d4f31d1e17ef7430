"""What real front ends send, each with its own habits, and that a guest under each is served.

The conversations are those of the sources named. QEMU's own is in tests/fakes/handshake.py, and the
real QEMU and the real User Mode Linux are in tests/e2e.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest

from tests.fakes import handshake, messages
from tests.fakes.balloon import BalloonDriver, BalloonQueue, pack_pfns
from tests.fakes.eventfd import wait_readable
from tests.fakes.frontend import FrontEnd
from tests.fakes.handshake import accepted
from tests.fakes.machine import Machine, Setup
from tests.fakes.memory import MIB, PAGE_SIZE, GuestMemory
from tests.fakes.messages import Flags, ProtocolFeature, Request, VirtioFeature, WireRegion, u64
from tests.fakes.program import Program, wait_until

NEED_REPLY = Flags.VERSION | Flags.NEED_REPLY
FIRST_ADDR = 24 * MIB
PAGES = 8


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A balloon."""
    started = Program.start("vhostd-balloon", tmp_path_factory.mktemp("front"), ())
    yield started
    started.kill()


class Vmm:
    """A guest with five queues under a front end that is told what to say."""

    def __init__(self, front: FrontEnd) -> None:
        self.front = front
        self.memory = GuestMemory.flat()
        setup = Setup()
        self.queues = [setup.make_queue(self.memory) for _ in range(setup.queue_count)]
        offer = handshake.Offer(0, ProtocolFeature(0), setup.queue_count, 8, b"")
        self._machine = Machine(front, setup, self.memory, self.queues, offer)
        self.balloon = BalloonDriver(self._machine)
        self.offered = 0

    def close(self) -> None:
        """Hang up."""
        self._machine.close()

    def acked(self) -> int:
        """Virtio features this guest takes."""
        return self._machine.setup.wanted_features(self.offered)

    def regions(self) -> tuple[WireRegion, ...]:
        """The memory table, ring addresses in the front end's own space."""
        return self.memory.wire_regions(guest_addresses=False)

    def protocol(self, wanted: ProtocolFeature, *, need_reply: bool = False) -> None:
        """Agree on these of the protocol features offered; need_reply: and wait for the verdict."""
        chosen = ProtocolFeature(self.front.get_protocol_features() & wanted)
        payload = u64(chosen)
        if need_reply:
            accepted(self.front.ack(Request.SET_PROTOCOL_FEATURES, payload), "protocol features")
        else:
            self.front.send(Request.SET_PROTOCOL_FEATURES, payload)
        self.front.protocol_features = chosen

    def address(self, index: int, *, log: int = 0) -> None:
        """SET_VRING_ADDR."""
        parts, where = self.queues[index].parts, self.memory.frontend_addr
        verdict = self.front.set_vring_addr(
            index, where(parts.desc), where(parts.avail), where(parts.used), log=log
        )
        accepted(verdict, "SET_VRING_ADDR")

    def call_by_socket(self, index: int) -> None:
        """SET_VRING_CALL with a socket of which the guest reads 8 bytes a call."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        os.close(self.queues[index].call_fd)
        self.queues[index].call_fd = ours.detach()
        with theirs:
            accepted(self.front.set_vring_call(index, theirs.fileno()), "SET_VRING_CALL")

    def is_served(self) -> None:
        """The guest inflates its balloon: the pages go, and the call comes."""
        self.memory.touch(FIRST_ADDR, PAGES * PAGE_SIZE)
        first = FIRST_ADDR // PAGE_SIZE
        assert self.balloon.inflate(range(first, first + PAGES)).written == 0
        assert self.memory.pages_present(FIRST_ADDR, PAGES) == 0


def virtio_uml(vmm: Vmm) -> None:
    """Linux' arch/um/drivers/virtio_uml.c, 5.10 to 6.x."""
    front, wanted = vmm.front, ProtocolFeature(0)
    wanted |= ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIG | ProtocolFeature.REPLY_ACK
    front.send(Request.SET_OWNER)
    vmm.offered = front.get_features()
    vmm.protocol(wanted, need_reply=True)
    accepted(front.set_backend_req_fd(), "SET_BACKEND_REQ_FD")
    accepted(front.set_features(vmm.acked()), "SET_FEATURES")
    for end in (4, 8):  # it reads from the beginning to the field's end
        front.get_config(0, end)
    (region,) = vmm.regions()
    room = WireRegion(0, 0, 0, 0)  # its struct has room for two
    table = messages.memory_table([region, room], count=1)
    assert len(table) == 72
    accepted(front.ack(Request.SET_MEM_TABLE, table, [vmm.memory.fd]), "SET_MEM_TABLE")
    for index, queue in enumerate(vmm.queues):
        vmm.call_by_socket(index)
        accepted(front.set_vring_num(index, queue.size), "SET_VRING_NUM")
        accepted(front.set_vring_base(index, 0), "SET_VRING_BASE")
        vmm.address(index, log=2**64 - 1)
    for index, queue in enumerate(vmm.queues):
        accepted(front.set_vring_kick(index, queue.kick_fd), "SET_VRING_KICK")
        accepted(front.set_vring_enable(index, True), "SET_VRING_ENABLE")


def rust_vmm(vmm: Vmm, *, eager: bool = False) -> None:
    """rust-vmm's vhost crate as cloud-hypervisor uses it; eager: need_reply from the first on."""
    front, wanted = vmm.front, ProtocolFeature(0)
    wanted |= ProtocolFeature.MQ | ProtocolFeature.CONFIG | ProtocolFeature.REPLY_ACK
    wanted |= ProtocolFeature.CONFIGURE_MEM_SLOTS | ProtocolFeature.LOG_SHMFD
    flags = NEED_REPLY if eager else Flags.VERSION
    front.send(Request.SET_OWNER, flags=flags)  # and waits for no answer: nothing is agreed on
    front.send(Request.GET_FEATURES, flags=flags)
    vmm.offered = messages.unpack_u64(front.receive_reply(Request.GET_FEATURES).payload)
    vmm.protocol(wanted, need_reply=eager)
    front.get_queue_num()
    front.get_config(0, 16)
    accepted(front.set_features(vmm.acked()), "SET_FEATURES")
    accepted(front.set_mem_table(vmm.regions(), [vmm.memory.fd]), "SET_MEM_TABLE")
    for index, queue in enumerate(vmm.queues):
        accepted(front.set_vring_num(index, queue.size), "SET_VRING_NUM")
        vmm.address(index)
        accepted(front.set_vring_base(index, 0), "SET_VRING_BASE")
        accepted(front.set_vring_call(index, queue.call_fd), "SET_VRING_CALL")
        accepted(front.set_vring_kick(index, queue.kick_fd), "SET_VRING_KICK")
    for index in range(len(vmm.queues)):
        accepted(front.set_vring_enable(index, True), "SET_VRING_ENABLE")


def rust_vmm_eager(vmm: Vmm) -> None:
    """rust-vmm's set_hdr_flags(NEED_REPLY) before anything was agreed on."""
    rust_vmm(vmm, eager=True)


def features_twice(vmm: Vmm) -> None:
    """SET_FEATURES with bit 30 before the protocol features and again with all (crosvm)."""
    front, wanted = vmm.front, ProtocolFeature.CONFIG | ProtocolFeature.REPLY_ACK
    front.send(Request.SET_OWNER)
    vmm.offered = front.get_features()
    front.send(Request.SET_FEATURES, u64(VirtioFeature.PROTOCOL_FEATURES))
    vmm.protocol(ProtocolFeature(wanted))
    accepted(front.set_features(vmm.acked()), "SET_FEATURES")
    accepted(front.set_mem_table(vmm.regions(), [vmm.memory.fd]), "SET_MEM_TABLE")
    for index, queue in enumerate(vmm.queues):
        handshake.set_up_ring(front, vmm.memory, index, queue)
        accepted(front.set_vring_enable(index, True), "SET_VRING_ENABLE")


def dpdk(vmm: Vmm) -> None:
    """DPDK's drivers/net/virtio/virtio_user: need_reply for memory and status only."""
    front, wanted = vmm.front, ProtocolFeature(0)
    wanted |= ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK | ProtocolFeature.STATUS
    front.acknowledged = {Request.SET_MEM_TABLE, Request.SET_STATUS}
    front.send(Request.SET_OWNER)
    vmm.offered = front.get_features()
    vmm.protocol(wanted)
    front.set_features(vmm.acked())
    accepted(front.set_status(0x0B), "SET_STATUS")
    assert front.get_status() == 0x0B
    for index, queue in enumerate(vmm.queues):  # before the memory
        front.set_vring_call(index, queue.call_fd)
    accepted(front.set_mem_table(vmm.regions(), [vmm.memory.fd]), "SET_MEM_TABLE")
    for index, queue in enumerate(vmm.queues):
        front.set_vring_num(index, queue.size)
        front.set_vring_base(index, 0)
        vmm.address(index)
        front.set_vring_kick(index, queue.kick_fd)
    for index in range(len(vmm.queues)):
        front.set_vring_enable(index, True)
    accepted(front.set_status(0x0F), "SET_STATUS")


def without_protocol_features(vmm: Vmm) -> None:
    """A front end of the first days: without bit 30 a ring is enabled by its kick."""
    front = vmm.front
    front.set_owner()
    vmm.offered = front.get_features() & ~VirtioFeature.PROTOCOL_FEATURES
    front.set_features(vmm.acked())
    front.set_mem_table(vmm.regions(), [vmm.memory.fd])
    for index, queue in enumerate(vmm.queues):
        handshake.set_up_ring(front, vmm.memory, index, queue)


FRONT_ENDS = (virtio_uml, rust_vmm, rust_vmm_eager, features_twice, dpdk, without_protocol_features)


@pytest.mark.parametrize("boot", FRONT_ENDS, ids=lambda boot: boot.__name__)
def test_a_guest_is_served_under(boot: Callable[[Vmm], None], program: Program) -> None:
    vmm = Vmm(FrontEnd.connect(program.socket_path))
    try:
        boot(vmm)
        for _ in range(3):
            vmm.is_served()
    finally:
        vmm.close()


@pytest.mark.parametrize("unoffered", [ProtocolFeature(0), ProtocolFeature.CROSS_ENDIAN])
def test_the_message_that_agrees_on_verdicts_has_one(
    unoffered: ProtocolFeature, program: Program
) -> None:
    """A refusal too: the front end waits for it as long."""
    with FrontEnd.connect(program.socket_path) as front:
        asked = u64(ProtocolFeature.REPLY_ACK | unoffered)
        assert (front.ack(Request.SET_PROTOCOL_FEATURES, asked) != 0) == bool(unoffered)
        front.get_features()


def test_a_call_socket_that_was_hung_up_costs_the_calls_and_nothing_else(program: Program) -> None:
    vmm = Vmm(FrontEnd.connect(program.socket_path))
    try:
        virtio_uml(vmm)
        vmm.is_served()
        inflate = vmm.queues[BalloonQueue.INFLATE]
        with socket.socket(fileno=os.dup(inflate.call_fd)) as end:
            end.shutdown(socket.SHUT_RDWR)
        for _ in range(4):
            vmm.memory.touch(FIRST_ADDR, PAGE_SIZE)
            vmm.balloon.send(BalloonQueue.INFLATE, pack_pfns([FIRST_ADDR // PAGE_SIZE]))
            inflate.wait_used(interrupts=False)
            assert vmm.memory.pages_present(FIRST_ADDR, 1) == 0
        vmm.front.get_features()
    finally:
        vmm.close()


def test_a_call_that_is_sent_after_the_kick_is_not_missed(program: Program) -> None:
    vmm = Vmm(FrontEnd.connect(program.socket_path))
    try:
        rust_vmm(vmm)
        inflate = vmm.queues[BalloonQueue.INFLATE]
        accepted(vmm.front.set_vring_call(BalloonQueue.INFLATE, None), "SET_VRING_CALL")
        vmm.memory.touch(FIRST_ADDR, PAGE_SIZE)
        vmm.balloon.send(BalloonQueue.INFLATE, pack_pfns([FIRST_ADDR // PAGE_SIZE]))
        assert wait_until(lambda: vmm.memory.pages_present(FIRST_ADDR, 1) == 0, 10)
        accepted(vmm.front.set_vring_call(BalloonQueue.INFLATE, inflate.call_fd), "SET_VRING_CALL")
        assert wait_readable(inflate.call_fd, 10)
        inflate.wait_used()
        assert inflate.calls() == 1
    finally:
        vmm.close()
