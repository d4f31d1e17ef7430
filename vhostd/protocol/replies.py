"""What goes back for a message: its own reply, an acknowledgement, or nothing.

Knows the REPLY_ACK rule. Must not know what a message did.
"""

from __future__ import annotations

from dataclasses import dataclass

from vhostd.fds import OwnedFd
from vhostd.protocol.features import ProtocolFeature
from vhostd.protocol.framing import Message
from vhostd.protocol.requests import Request
from vhostd.protocol.wire import HEADER, U64, HeaderFlag


@dataclass(frozen=True, slots=True)
class Reply:
    """One message back: all its bytes, and the descriptors that ride with the first of them."""

    data: bytes
    fds: tuple[OwnedFd, ...] = ()


def reply(message: Message, payload: bytes, fds: tuple[OwnedFd, ...] = ()) -> Reply:
    """A reply with this payload. QEMU insists on exactly these two flags."""
    flags = HeaderFlag.VERSION | HeaderFlag.REPLY
    return Reply(HEADER.pack(message.request, flags, len(payload)) + payload, fds)


def accept(message: Message, acked: ProtocolFeature, payload: bytes = b"") -> Reply | None:
    """Say yes in the way the message calls for; None when it calls for nothing.

    Args:
        message: what is answered; its rule tells how.
        acked: protocol features in force when it arrived; those it acknowledges count as well.
        payload: of the message's own reply; ignored for a message that has none.
    """
    rule = message.rule
    if rule is not None and rule.reply is not None and not _acknowledged_instead(message, acked):
        return reply(message, payload)
    return _acknowledge(message, acked, 0)


def refuse(message: Message, acked: ProtocolFeature) -> Reply | None:
    """Say no in the way the message calls for; None when it calls for nothing.

    A message with a reply of its own always gets one: a VMM that waits in vain stands still.
    """
    rule = message.rule
    if rule is not None and rule.reply is not None:
        return reply(message, rule.reply.refusal(message.payload))
    return _acknowledge(message, acked, 1)


def _acknowledge(message: Message, acked: ProtocolFeature, verdict: int) -> Reply | None:
    if message.needs_reply and ProtocolFeature.REPLY_ACK in acked | _acked_by(message):
        return reply(message, U64(verdict).pack())
    return None


def _acked_by(message: Message) -> ProtocolFeature:
    """Features that the message itself acknowledges: whoever asks with it for a verdict waits.

    Linux' virtio_uml and rust-vmm's front end do so; libvhost-user and DPDK answer them.
    """
    if message.request != Request.SET_PROTOCOL_FEATURES or len(message.payload) not in U64.SIZES:
        return ProtocolFeature(0)
    return ProtocolFeature(U64.parse(message.payload).value)


def _acknowledged_instead(message: Message, acked: ProtocolFeature) -> bool:
    """SET_LOG_BASE's own reply is empty, so that one asked for a verdict gets the verdict."""
    return (
        message.request == Request.SET_LOG_BASE
        and message.needs_reply
        and ProtocolFeature.REPLY_ACK in acked
    )
