"""Feature masks of vhost-user and of virtio's transport. Knows no device's own bits.

To clear bits of a number a peer sent, invert int(mask): inverting a Flags only reaches the bits
it knows, and unknown bits would slip through.
"""

from __future__ import annotations

from typing import Final

from vhostd.flags import Flags


class VirtioFeature(Flags):
    """GET_FEATURES bits that no device defines: virtio 1.3 chapter 6 and vhost-user's two."""

    NOTIFY_ON_EMPTY = 1 << 24
    LOG_ALL = 1 << 26  # VHOST_F_LOG_ALL: mark every write in the dirty log
    ANY_LAYOUT = 1 << 27
    RING_INDIRECT_DESC = 1 << 28
    RING_EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30  # VHOST_USER_F_PROTOCOL_FEATURES
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    NOTIFICATION_DATA = 1 << 38
    RING_RESET = 1 << 40


class ProtocolFeature(Flags):
    """GET_PROTOCOL_FEATURES bits, complete to QEMU 11.1 (vhost-user spec, "Protocol features")."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM_MAP = 1 << 22


BACKEND_VIRTIO_FEATURES: Final = VirtioFeature.PROTOCOL_FEATURES | VirtioFeature.LOG_ALL
"""Offered whatever the device: QEMU fails without the first, migration needs the second."""

BACKEND_PROTOCOL_FEATURES: Final = (
    ProtocolFeature.MQ
    | ProtocolFeature.LOG_SHMFD
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.BACKEND_SEND_FD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
    | ProtocolFeature.GPA_ADDRESSES
)
"""What a device offers unless it says otherwise."""


def protocol_features_for(*, shmem: bool, memory_slots: bool) -> ProtocolFeature:
    """What a device offers.

    Args:
        shmem: it has shared memory regions.
        memory_slots: the memory table may come slot by slot. QEMU 11.1 crashes at a reboot where
            it may and shared memory is mapped.
    """
    features = BACKEND_PROTOCOL_FEATURES
    if shmem:
        features |= ProtocolFeature.SHMEM_MAP
    if not memory_slots:
        features &= ~ProtocolFeature.CONFIGURE_MEM_SLOTS
    return features


def feature_names(features: int, kind: type[VirtioFeature | ProtocolFeature]) -> list[str]:
    """Name the set bits, lowest first, for logs and status; a bit without a name is in hex."""
    names: list[str] = []
    for position in range(features.bit_length()):
        mask = features & (1 << position)
        if mask:
            names.append(kind(mask).name or hex(mask))
    return names
