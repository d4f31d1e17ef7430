"""A front end, a session machine and a shell that only notes what it is told to do.

Everything goes in as bytes a front end would send and comes out as bytes it would read. Knows no
ring layout; must not decide anything the machine should.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from vhostd.errors import FrontendError, VhostdError
from vhostd.fds import OwnedFd
from vhostd.handover import vm_record
from vhostd.protocol.features import ProtocolFeature
from vhostd.protocol.framing import Framer
from vhostd.session import actions
from vhostd.session.actions import Action, FileIdentity, Outcome, RingPosition
from vhostd.session.machine import SessionMachine
from vhostd.session.plan import Offer
from vhostd.session.state import SessionState

from tests.fakes import messages
from tests.fakes.messages import Flags, Request, VirtioFeature, WireRegion, u64, vring_state
from tests.protocol.streams import encoded, feed

QUEUES = 3
CONFIG_SIZE = 16
MIB = 1 << 20

OFFERED = (
    VirtioFeature.VERSION_1
    | VirtioFeature.RING_PACKED
    | VirtioFeature.RING_EVENT_IDX
    | VirtioFeature.RING_INDIRECT_DESC
    | 0x3F
)
SPLIT = int(VirtioFeature.VERSION_1 | VirtioFeature.PROTOCOL_FEATURES | 0x21)
PACKED = SPLIT | VirtioFeature.RING_PACKED
WITHOUT_BIT_30 = SPLIT & ~int(VirtioFeature.PROTOCOL_FEATURES)

# Guest RAM as a PC has it: the VMM maps both halves somewhere else, not in this order.
LOW = WireRegion(0, 64 * MIB, 0x7F00_0000_0000, 0)
HIGH = WireRegion(1 << 32, 64 * MIB, 0x7E00_0000_0000, 64 * MIB)

NO_SLOTS = ProtocolFeature.CONFIGURE_MEM_SLOTS | ProtocolFeature.GPA_ADDRESSES


@dataclass
class Conversation:
    """One connection; every method sends a message and returns the acknowledgement or reply."""

    offer: Offer = field(default_factory=lambda: Offer(OFFERED, QUEUES, CONFIG_SIZE))
    performed: list[Action] = field(default_factory=list)
    position: RingPosition = field(default_factory=RingPosition)  # of rings that stop
    taken: bool = True  # chains were, from rings that stop
    refuse_next: VhostdError | None = None
    refusal: VhostdError | None = None  # of the latest message

    def __post_init__(self) -> None:
        """Start with nothing said."""
        self.machine = SessionMachine(self.offer)
        self._framer = Framer()

    @property
    def state(self) -> SessionState:
        """What the machine holds."""
        return self.machine.state

    def take(self) -> list[Action]:
        """What was performed since the last call."""
        performed, self.performed = self.performed, []
        return performed

    def succeed(self) -> None:
        """A successor goes on from what was recorded."""
        record = vm_record.encode_device(vm_record.DeviceRecord({}, self.state))
        self.machine = SessionMachine(self.offer, vm_record.decode_device(record).session)

    # -- bytes -----------------------------------------------------------------------------------

    def send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0x1
    ) -> bytes | None:
        """Send one message; return the payload of what came back, None when nothing did."""
        owned = [OwnedFd(fd) for fd in fds]
        (message,) = feed(self._framer, encoded(request, payload, flags), owned)
        step = self.machine.on_message(message)
        self.refusal = step.refusal
        try:
            outcomes = [self._perform(action) for action in step.actions]
        except VhostdError as error:
            self.refusal = error
            reply = self.machine.refuse(step)
        else:
            reply = self.machine.commit(step, outcomes)
        if reply is None:
            return None
        number, reply_flags, size = messages.unpack_header(reply.data[:12])
        assert (number, reply_flags) == (request, 0x5)
        assert size == len(reply.data) - 12
        return reply.data[12:]

    def ack(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """Send with need_reply and return the verdict."""
        answer = self.send(request, payload, fds, Flags.VERSION | Flags.NEED_REPLY)
        assert answer is not None, "REPLY_ACK was not negotiated"
        return messages.unpack_u64(answer)

    def ask(self, request: int, payload: bytes = b"") -> int:
        """Send and return the number that is the reply."""
        answer = self.send(request, payload)
        assert answer is not None
        return messages.unpack_u64(answer)

    def _perform(self, action: Action) -> Outcome:
        if self.refuse_next is not None:
            error, self.refuse_next = self.refuse_next, None
            raise error
        self.performed.append(action)
        match action:
            case actions.SetRegions(regions):
                return tuple(FileIdentity(1, 100 + n) for n in range(len(regions)))
            case actions.StopRing():
                return actions.StoppedRing(self.position, self.taken)
            case actions.GetConfig(_offset, size):
                return b"\xc0" * size
        return None

    # -- what a VMM does -------------------------------------------------------------------------

    def negotiate(
        self, features: int = SPLIT, protocol_features: ProtocolFeature | None = None
    ) -> None:
        """Settle features; by default without GPA_ADDRESSES, so that addresses differ."""
        if protocol_features is None:
            protocol_features = self.offer.protocol_features & ~ProtocolFeature.GPA_ADDRESSES
        self.send(Request.SET_PROTOCOL_FEATURES, u64(protocol_features))
        assert self.ack(Request.SET_OWNER) == 0
        assert self.ack(Request.SET_FEATURES, u64(features)) == 0

    def add_memory(self, *regions: WireRegion) -> None:
        """ADD_MEM_REG each."""
        for region in regions:
            assert self.ack(Request.ADD_MEM_REG, messages.memory_slot(region), [memfd()]) == 0

    def set_up(self, index: int, *, size: int = 128, base: int | None = 0, at: int = 0) -> None:
        """NUM, BASE and ADDR of a ring at `at` bytes behind its usual place in HIGH."""
        desc, avail, used = ring_addresses(index, at)
        assert self.ack(Request.SET_VRING_NUM, vring_state(index, size)) == 0
        if base is not None:
            assert self.ack(Request.SET_VRING_BASE, vring_state(index, base)) == 0
        payload = messages.vring_addr(index, desc, avail, used)
        assert self.ack(Request.SET_VRING_ADDR, payload) == 0

    def kick(self, index: int) -> int:
        """SET_VRING_KICK with a fresh eventfd."""
        return self.ack(Request.SET_VRING_KICK, u64(index), [eventfd()])

    def enable(self, index: int, enabled: bool = True) -> int:
        """SET_VRING_ENABLE."""
        return self.ack(Request.SET_VRING_ENABLE, vring_state(index, int(enabled)))

    def stop(self, index: int) -> int:
        """GET_VRING_BASE."""
        answer = self.send(Request.GET_VRING_BASE, vring_state(index, 0))
        assert answer is not None
        told, base = messages.unpack_vring_state(answer)
        assert told == index
        return base

    def start(self, features: int = SPLIT, rings: Sequence[int] = range(QUEUES)) -> None:
        """Negotiate, add memory, start and enable rings."""
        self.negotiate(features)
        self.add_memory(LOW, HIGH)
        for index in rings:
            self.set_up(index, base=None)
            assert self.kick(index) == 0
        for index in rings:
            assert self.enable(index) == 0


def ring_addresses(index: int, at: int = 0) -> tuple[int, int, int]:
    """Frontend addresses of a ring of up to 256 descriptors in HIGH: descriptors, avail, used."""
    start = HIGH.frontend_addr + 0x1_0000 * (index + 1) + at
    return start, start + 0x2000, start + 0x4000


def eventfd() -> int:
    """A fresh one to give away."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def memfd() -> int:
    """A fresh one to give away; its size does not matter to a session."""
    return os.memfd_create("ram", os.MFD_CLOEXEC)


def fatal(conversation: Conversation, request: int, payload: bytes = b"") -> bool:
    """Whether the message ends the connection."""
    try:
        conversation.send(request, payload)
    except FrontendError as error:
        return error.fatal
    return False
