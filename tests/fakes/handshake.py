"""What QEMU 11.1.3's generic vhost-user device says, in its order: realize, start, stop.

Knows the order of messages and which of them QEMU wants acknowledged; knows no device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.fakes.driver import Queue
from tests.fakes.frontend import FrontEnd, Refused
from tests.fakes.memory import GuestMemory
from tests.fakes.messages import (
    QEMU_GENERIC_DEVICE_ACKS,
    ProtocolFeature,
    Request,
    Status,
    VirtioFeature,
)

# The requests QEMU 11.1.3 was seen to send with need_reply; set FrontEnd.acknowledged to this to
# be as trusting as QEMU is. By default every setter is acknowledged, so that tests see refusals.
QEMU_ACKNOWLEDGED = frozenset(
    {
        Request.SET_VRING_KICK,
        Request.SET_VRING_CALL,
        Request.SET_VRING_ERR,
        Request.SET_VRING_ENABLE,
        Request.SET_BACKEND_REQ_FD,
        Request.ADD_MEM_REG,
        Request.SET_MEM_TABLE,
    }
)


@dataclass(frozen=True, slots=True)
class Offer:
    """What the back end said at realize."""

    features: int
    protocol_features: ProtocolFeature
    queue_count: int
    memory_slots: int
    config: bytes


def accepted(verdict: int, what: str) -> None:
    """Insist on an acknowledgement of 0.

    Raises:
        Refused: the back end said no.
    """
    if verdict != 0:
        raise Refused(f"{what}: {verdict}")


def realize(
    front: FrontEnd,
    queues: Sequence[Queue] = (),
    *,
    protocol_features: int = QEMU_GENERIC_DEVICE_ACKS,
    config_size: int = 16,
    own: bool = True,
) -> Offer:
    """Do what QEMU does when the device is created.

    protocol_features limits what is acked; own=False leaves SET_OWNER out, which came before.
    """
    offered = front.get_features()
    offered_protocol = ProtocolFeature(0)
    queue_count, slots = len(queues), 8
    if offered & VirtioFeature.PROTOCOL_FEATURES:
        offered_protocol = front.get_protocol_features()
        acked = ProtocolFeature(offered_protocol & protocol_features)
        front.set_protocol_features(acked)
        if ProtocolFeature.MQ in acked:
            queue_count = front.get_queue_num()
        if ProtocolFeature.CONFIGURE_MEM_SLOTS in acked:
            slots = front.get_max_mem_slots()
        if ProtocolFeature.BACKEND_REQ in acked:
            accepted(front.set_backend_req_fd(), "SET_BACKEND_REQ_FD")
    if own:
        accepted(front.set_owner(), "SET_OWNER")
    front.get_features()
    for index, queue in enumerate(queues):
        accepted(front.set_vring_call(index, queue.call_fd), "SET_VRING_CALL")
        accepted(front.set_vring_err(index, queue.err_fd), "SET_VRING_ERR")
    content = b""
    if ProtocolFeature.CONFIG in front.protocol_features:
        content = front.get_config(0, config_size)
    return Offer(offered, offered_protocol, queue_count, slots, content)


def send_memory(front: FrontEnd, memory: GuestMemory) -> None:
    """Tell the back end of all guest RAM, by slots or by table as negotiated."""
    guest_addresses = ProtocolFeature.GPA_ADDRESSES in front.protocol_features
    regions = memory.wire_regions(guest_addresses=guest_addresses)
    if ProtocolFeature.CONFIGURE_MEM_SLOTS in front.protocol_features:
        for region in regions:
            accepted(front.add_mem_reg(region, memory.fd), "ADD_MEM_REG")
    else:
        verdict = front.set_mem_table(regions, [memory.fd] * len(regions))
        accepted(verdict, "SET_MEM_TABLE")


def ring_address(front: FrontEnd, memory: GuestMemory, guest_addr: int) -> int:
    """Return the address by which SET_VRING_ADDR must name guest_addr."""
    if ProtocolFeature.GPA_ADDRESSES in front.protocol_features:
        return guest_addr
    return memory.frontend_addr(guest_addr)


def set_up_ring(
    front: FrontEnd, memory: GuestMemory, index: int, queue: Queue, base: int | None = None
) -> None:
    """Send NUM, BASE, ADDR, KICK and CALL of one ring; base None = the ring starts afresh."""
    parts = queue.parts
    start = queue.start_base() if base is None else base
    accepted(front.set_vring_num(index, queue.size), "SET_VRING_NUM")
    accepted(front.set_vring_base(index, start), "SET_VRING_BASE")
    desc, avail, used = (
        ring_address(front, memory, part) for part in (parts.desc, parts.avail, parts.used)
    )
    accepted(front.set_vring_addr(index, desc, avail, used), "SET_VRING_ADDR")
    accepted(front.set_vring_kick(index, queue.kick_fd), "SET_VRING_KICK")
    accepted(front.set_vring_call(index, queue.call_fd), "SET_VRING_CALL")


def start(
    front: FrontEnd,
    memory: GuestMemory,
    queues: Sequence[Queue | None],
    features: int,
    *,
    bases: Sequence[int | None] | None = None,
    with_memory: bool = True,
    config_size: int = 16,
) -> None:
    """Do what QEMU does at DRIVER_OK; a queue that is None was not set up by the guest.

    with_memory=False is every start but the first: the table stays with the back end.
    """
    accepted(front.set_features(features), "SET_FEATURES")
    if ProtocolFeature.STATUS in front.protocol_features:
        front.get_status()
        accepted(front.set_status(Status.FEATURES_OK), "SET_STATUS")
    if with_memory:
        send_memory(front, memory)
    used = [(index, queue) for index, queue in enumerate(queues) if queue is not None]
    for index, queue in used:
        set_up_ring(front, memory, index, queue, None if bases is None else bases[index])
    for index, _ in used:
        accepted(front.set_vring_enable(index, True), "SET_VRING_ENABLE")
    for index, queue in used:
        accepted(front.set_vring_call(index, queue.call_fd), "SET_VRING_CALL")
    if ProtocolFeature.CONFIG in front.protocol_features:
        front.get_config(0, config_size)


def stop(front: FrontEnd, queues: Sequence[Queue | None]) -> list[int | None]:
    """Do what QEMU does at stop, cont's other half and system_reset; return the ring bases."""
    used = [index for index, queue in enumerate(queues) if queue is not None]
    for index in used:
        accepted(front.set_vring_enable(index, False), "SET_VRING_ENABLE")
    bases: list[int | None] = [None] * len(queues)
    for index in used:
        bases[index] = front.get_vring_base(index)
    return bases
