"""vhost-user messages as bytes: numbers, masks and payload layouts of the front end's side.

Source: QEMU docs/interop/vhost-user.rst as shipped with 11.1.3. Everything is host byte order.
Every function packs what it is told, lies included. Must not know sockets, rings or devices.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag

HEADER_SIZE = 12  # u32 request, u32 flags, u32 payload size


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


WITHDRAWN = 0x100
"""Added to the number of a back end's request that is not to be carried out."""


class Flags(IntFlag):
    """Header flags: the version field holds 1."""

    VERSION = 0x1
    REPLY = 0x4
    NEED_REPLY = 0x8


class ProtocolFeature(IntFlag):
    """GET/SET_PROTOCOL_FEATURES."""

    MQ = 0x1
    LOG_SHMFD = 0x2
    RARP = 0x4
    REPLY_ACK = 0x8
    MTU = 0x10
    BACKEND_REQ = 0x20
    CROSS_ENDIAN = 0x40
    CRYPTO_SESSION = 0x80
    PAGEFAULT = 0x100
    CONFIG = 0x200
    BACKEND_SEND_FD = 0x400
    HOST_NOTIFIER = 0x800
    INFLIGHT_SHMFD = 0x1000
    RESET_DEVICE = 0x2000
    INBAND_NOTIFICATIONS = 0x4000
    CONFIGURE_MEM_SLOTS = 0x8000
    STATUS = 0x1_0000
    XEN_MMAP = 0x2_0000
    SHARED_OBJECT = 0x4_0000
    DEVICE_STATE = 0x8_0000
    GET_VRING_BASE_INFLIGHT = 0x10_0000
    GPA_ADDRESSES = 0x20_0000
    SHMEM_MAP = 0x40_0000


QEMU_GENERIC_DEVICE_ACKS = ProtocolFeature(0x6F_FFFF)  # QEMU 11.1.3 vhost-user-test-device


class VirtioFeature(IntFlag):
    """Device-independent bits of GET/SET_FEATURES, and vhost-user's two own ones."""

    NOTIFY_ON_EMPTY = 1 << 24
    LOG_ALL = 1 << 26  # VHOST_F_LOG_ALL
    RING_INDIRECT_DESC = 1 << 28
    RING_EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30  # VHOST_USER_F_PROTOCOL_FEATURES
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    NOTIFICATION_DATA = 1 << 38
    RING_RESET = 1 << 40


class Status(IntFlag):
    """Virtio device status, as SET_STATUS carries it."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


VRING_NO_FD = 0x100  # SET_VRING_KICK/CALL/ERR: no descriptor comes with it
VRING_F_LOG = 1  # SET_VRING_ADDR flags


@dataclass(frozen=True, slots=True)
class WireRegion:
    """One memory region description, 32 bytes; sizes and offsets in bytes."""

    guest_addr: int
    size: int
    frontend_addr: int
    file_offset: int

    def pack(self) -> bytes:
        """Pack as the specification's "Memory region description"."""
        return struct.pack("=4Q", self.guest_addr, self.size, self.frontend_addr, self.file_offset)

    def but(self, **changes: int) -> WireRegion:
        """Return a copy with some fields changed: how a test lies."""
        return replace(self, **changes)


def header(request: int, flags: int, size: int) -> bytes:
    """Pack a message header."""
    return struct.pack("=3I", request, flags, size)


def unpack_header(data: bytes) -> tuple[int, int, int]:
    """Return request, flags, payload size."""
    request, flags, size = struct.unpack("=3I", data)
    return request, flags, size


def u64(value: int) -> bytes:
    """Pack the payload of most messages."""
    return struct.pack("=Q", value)


def unpack_u64(payload: bytes) -> int:
    """Return the number in an 8-byte payload."""
    (value,) = struct.unpack("=Q", payload)
    return int(value)


def vring_state(index: int, num: int) -> bytes:
    """Pack {u32 index, u32 num}."""
    return struct.pack("=2I", index, num)


def unpack_vring_state(payload: bytes) -> tuple[int, int]:
    """Return index, num."""
    index, num = struct.unpack("=2I", payload)
    return index, num


def vring_addr(index: int, desc: int, avail: int, used: int, flags: int = 0, log: int = 0) -> bytes:
    """Pack {u32 index, u32 flags, u64 descriptor, u64 used, u64 available, u64 log}."""
    return struct.pack("=2I4Q", index, flags, desc, used, avail, log)


def memory_table(regions: Sequence[WireRegion], count: int | None = None) -> bytes:
    """Pack SET_MEM_TABLE; count overrides the number of regions it claims to hold."""
    stated = len(regions) if count is None else count
    return struct.pack("=2I", stated, 0) + b"".join(region.pack() for region in regions)


def memory_slot(region: WireRegion) -> bytes:
    """Pack ADD_MEM_REG and REM_MEM_REG: u64 padding, one region."""
    return struct.pack("=Q", 0) + region.pack()


def log(size: int, offset: int) -> bytes:
    """Pack SET_LOG_BASE."""
    return struct.pack("=2Q", size, offset)


def config(offset: int, content: bytes, flags: int = 0, size: int | None = None) -> bytes:
    """Pack GET_CONFIG or SET_CONFIG; size overrides the stated length of the content."""
    stated = len(content) if size is None else size
    return struct.pack("=3I", offset, stated, flags) + content


def unpack_config(payload: bytes) -> tuple[int, int, int, bytes]:
    """Return offset, size, flags, content of a GET_CONFIG reply."""
    offset, size, flags = struct.unpack("=3I", payload[:12])
    return offset, size, flags, payload[12:]


def inflight(mmap_size: int, mmap_offset: int, queue_count: int, queue_size: int) -> bytes:
    """Pack the 20 bytes of GET_INFLIGHT_FD and SET_INFLIGHT_FD."""
    return struct.pack("=2Q2H", mmap_size, mmap_offset, queue_count, queue_size)


def unpack_inflight(payload: bytes) -> tuple[int, int, int, int]:
    """Return mmap size, mmap offset, queue count, queue size; the C struct's padding is cut off."""
    mmap_size, mmap_offset, queue_count, queue_size = struct.unpack("=2Q2H", payload[:20])
    return mmap_size, mmap_offset, queue_count, queue_size


def device_state(direction: int, phase: int) -> bytes:
    """Pack SET_DEVICE_STATE_FD; direction 0 = save, 1 = load; phase 0 = stopped."""
    return struct.pack("=2I", direction, phase)


def unpack_shmem_config(payload: bytes) -> tuple[int, tuple[int, ...]]:
    """Return the region count and the 256 sizes in bytes of a GET_SHMEM_CONFIG reply."""
    count, _padding, *sizes = struct.unpack("=2I256Q", payload)
    return count, tuple(sizes)
