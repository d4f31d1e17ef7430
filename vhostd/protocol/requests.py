"""Every vhost-user message there is, and RULES: the one table of what each may look like.

Knows sizes, descriptor counts, the protocol feature a message belongs to and what answers it.
Must not know what a message does. Source: QEMU docs/interop/vhost-user.rst, 11.1.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from struct import pack
from typing import Final

from vhostd.protocol import wire
from vhostd.protocol.features import ProtocolFeature


class Request(IntEnum):
    """Front end to back end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44


class BackendRequest(IntEnum):
    """Back end to front end, on the socket of SET_BACKEND_REQ_FD."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


_NOTHING: Final = ProtocolFeature(0)


@dataclass(frozen=True, slots=True)
class AlwaysReplied:
    """The message has a reply of its own, whatever need_reply says.

    Attributes:
        shape: what the reply looks like.
        refusal: request payload (whatever its size) to the reply payload that says "no". A front
            end waits for it with its main loop standing still, so even a malformed request has one.
    """

    shape: type[wire.Shape]
    refusal: Callable[[bytes], bytes]


@dataclass(frozen=True, slots=True)
class Rule:
    """What one message may look like.

    Attributes:
        shape: its payload.
        fds_min: descriptors without which it means nothing.
        fds_max: more than this is refused, except that a message with 0 ignores what it is sent.
        needs: protocol feature that must have been acknowledged; 0 = none.
        reply: its own reply, or None: acknowledged with a u64 if asked.
    """

    shape: type[wire.Shape] = wire.Empty
    fds_min: int = 0
    fds_max: int = 0
    needs: ProtocolFeature = _NOTHING
    reply: AlwaysReplied | None = None


def _always(shape: type[wire.Shape], refusal: bytes) -> AlwaysReplied:
    return AlwaysReplied(shape, lambda _payload: refusal)


def _u64(refusal: int) -> AlwaysReplied:
    return _always(wire.U64, wire.U64(refusal).pack())


def _refused_vring_base(payload: bytes) -> bytes:
    index, _num = wire.VringState.LAYOUT.unpack(payload[:8].ljust(8, b"\0"))
    return wire.VringState(index, 0).pack()


def _refused_config(payload: bytes) -> bytes:
    """Size 0 is the spec's error mark; offset and flags are the request's."""
    offset, _size, flags = wire.ConfigSpace.LAYOUT.unpack(payload[:12].ljust(12, b"\0"))
    return wire.ConfigSpace.LAYOUT.pack(offset, 0, flags)


def _refused_inflight(payload: bytes) -> bytes:
    """A buffer of size 0 and no descriptor: nothing is tracked. C front ends want 24 bytes."""
    return bytes(len(payload) if len(payload) in wire.Inflight.SIZES else wire.Inflight.SIZES[-1])


_QUERY: Final = _u64(refusal=0)  # no feature, no queue, no slot, no status
_VERDICT: Final = _u64(refusal=1)
_F = ProtocolFeature

RULES: Final[dict[Request, Rule]] = {
    Request.GET_FEATURES: Rule(reply=_QUERY),
    Request.SET_FEATURES: Rule(wire.U64),
    Request.SET_OWNER: Rule(),
    Request.RESET_OWNER: Rule(),
    Request.SET_MEM_TABLE: Rule(wire.MemoryTable, 1, wire.MEMORY_TABLE_REGIONS_MAX),
    # Without the feature the payload would be an address in the VMM, useless to another process.
    # The reply has no payload (QEMU reads one message and looks at its number only).
    Request.SET_LOG_BASE: Rule(
        wire.Log, 1, 1, _F.LOG_SHMFD, _always(wire.Empty, wire.U64(1).pack())
    ),
    Request.SET_LOG_FD: Rule(fds_min=1, fds_max=1),
    Request.SET_VRING_NUM: Rule(wire.VringState),
    Request.SET_VRING_ADDR: Rule(wire.VringAddr),
    Request.SET_VRING_BASE: Rule(wire.VringState),
    Request.GET_VRING_BASE: Rule(
        wire.VringState, reply=AlwaysReplied(wire.VringState, _refused_vring_base)
    ),
    Request.SET_VRING_KICK: Rule(wire.VringFile, 0, 1),
    Request.SET_VRING_CALL: Rule(wire.VringFile, 0, 1),
    Request.SET_VRING_ERR: Rule(wire.VringFile, 0, 1),
    Request.GET_PROTOCOL_FEATURES: Rule(reply=_QUERY),
    Request.SET_PROTOCOL_FEATURES: Rule(wire.U64),
    Request.GET_QUEUE_NUM: Rule(needs=_F.MQ, reply=_QUERY),
    Request.SET_VRING_ENABLE: Rule(wire.VringState),
    Request.SEND_RARP: Rule(wire.U64, needs=_F.RARP),
    Request.NET_SET_MTU: Rule(wire.U64, needs=_F.MTU),
    Request.SET_BACKEND_REQ_FD: Rule(fds_min=1, fds_max=1, needs=_F.BACKEND_REQ),
    Request.IOTLB_MSG: Rule(wire.Iotlb, reply=_VERDICT),
    Request.SET_VRING_ENDIAN: Rule(wire.VringState, needs=_F.CROSS_ENDIAN),
    Request.GET_CONFIG: Rule(
        wire.ConfigSpace, needs=_F.CONFIG, reply=AlwaysReplied(wire.ConfigSpace, _refused_config)
    ),
    Request.SET_CONFIG: Rule(wire.ConfigSpace, needs=_F.CONFIG),
    # The description's layout is the crypto device's; a negative session id says no.
    Request.CREATE_CRYPTO_SESSION: Rule(
        wire.Opaque, needs=_F.CRYPTO_SESSION, reply=_always(wire.Opaque, pack("=q", -1))
    ),
    Request.CLOSE_CRYPTO_SESSION: Rule(wire.U64, needs=_F.CRYPTO_SESSION),
    Request.POSTCOPY_ADVISE: Rule(needs=_F.PAGEFAULT, reply=_always(wire.Empty, b"")),
    Request.POSTCOPY_LISTEN: Rule(needs=_F.PAGEFAULT),
    Request.POSTCOPY_END: Rule(needs=_F.PAGEFAULT, reply=_VERDICT),
    Request.GET_INFLIGHT_FD: Rule(
        wire.Inflight,
        needs=_F.INFLIGHT_SHMFD,
        reply=AlwaysReplied(wire.Inflight, _refused_inflight),
    ),
    Request.SET_INFLIGHT_FD: Rule(wire.Inflight, 1, 1, _F.INFLIGHT_SHMFD),
    Request.GPU_SET_SOCKET: Rule(fds_min=1, fds_max=1),
    Request.RESET_DEVICE: Rule(needs=_F.RESET_DEVICE),
    Request.VRING_KICK: Rule(wire.VringState, needs=_F.INBAND_NOTIFICATIONS),
    Request.GET_MAX_MEM_SLOTS: Rule(needs=_F.CONFIGURE_MEM_SLOTS, reply=_QUERY),
    Request.ADD_MEM_REG: Rule(wire.MemorySlot, 1, 1, _F.CONFIGURE_MEM_SLOTS),
    # Old front ends send a descriptor along, which the spec says to close.
    Request.REM_MEM_REG: Rule(wire.MemorySlot, 0, 1, _F.CONFIGURE_MEM_SLOTS),
    Request.SET_STATUS: Rule(wire.U64, needs=_F.STATUS),
    Request.GET_STATUS: Rule(needs=_F.STATUS, reply=_QUERY),
    Request.GET_SHARED_OBJECT: Rule(
        wire.SharedObject, needs=_F.SHARED_OBJECT, reply=_always(wire.Empty, b"")
    ),
    # Bits 0-7: error; bit 8: no descriptor comes back.
    Request.SET_DEVICE_STATE_FD: Rule(wire.DeviceState, 1, 1, _F.DEVICE_STATE, _u64(0x101)),
    Request.CHECK_DEVICE_STATE: Rule(needs=_F.DEVICE_STATE, reply=_VERDICT),
    Request.GET_SHMEM_CONFIG: Rule(
        needs=_F.SHMEM_MAP, reply=_always(wire.ShmemConfig, wire.ShmemConfig().pack())
    ),
}

BACKEND_RULES: Final[dict[BackendRequest, Rule]] = {
    BackendRequest.IOTLB_MSG: Rule(wire.Iotlb),
    BackendRequest.CONFIG_CHANGE_MSG: Rule(needs=_F.CONFIG),
    BackendRequest.VRING_HOST_NOTIFIER_MSG: Rule(wire.VringArea, 0, 1, _F.HOST_NOTIFIER),
    BackendRequest.VRING_CALL: Rule(wire.VringState, needs=_F.INBAND_NOTIFICATIONS),
    BackendRequest.VRING_ERR: Rule(wire.VringState, needs=_F.INBAND_NOTIFICATIONS),
    BackendRequest.SHARED_OBJECT_ADD: Rule(wire.SharedObject, needs=_F.SHARED_OBJECT),
    BackendRequest.SHARED_OBJECT_REMOVE: Rule(wire.SharedObject, needs=_F.SHARED_OBJECT),
    BackendRequest.SHARED_OBJECT_LOOKUP: Rule(
        wire.SharedObject, needs=_F.SHARED_OBJECT, reply=_VERDICT
    ),
    BackendRequest.SHMEM_MAP: Rule(wire.ShmemMapping, 1, 1, _F.SHMEM_MAP | _F.BACKEND_SEND_FD),
    BackendRequest.SHMEM_UNMAP: Rule(wire.ShmemMapping, needs=_F.SHMEM_MAP),
}


def request_name(number: int) -> str:
    """The spec's name of a front-end message, or "request N" for what is none."""
    return Request(number).name if number in RULES else f"request {number}"
