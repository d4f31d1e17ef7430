"""virtio-mem on the wire: config space, requests, responses, feature bits.

Source: virtio 1.x, chapter 5.15; include/uapi/linux/virtio_mem.h. Holds no state.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import Final, Self

from vhostd.errors import GuestError
from vhostd.flags import Flags
from vhostd.protocol.features import VirtioFeature

MEM_DEVICE_ID: Final = 24
QUEUE_COUNT: Final = 1

CONFIG: Final = Struct("<QH6xQQQQQ")
"""block_size, node_id, addr, region_size, usable_region_size, plugged_size, requested_size."""
SIZES: Final = Struct("<QQQ")
"""The part that changes: usable_region_size, plugged_size, requested_size."""
SIZES_OFFSET: Final = CONFIG.size - SIZES.size

_REQUEST: Final = Struct("<H6xQH6x")
_RESPONSE: Final = Struct("<H6xH")


class MemFeature(Flags):
    """Device feature bits; VIRTIO_MEM_F_ in Linux."""

    ACPI_PXM = 1 << 0
    UNPLUGGED_INACCESSIBLE = 1 << 1
    PERSISTENT_SUSPEND = 1 << 2


class RequestType(IntEnum):
    """What a driver may ask for; VIRTIO_MEM_REQ_ in Linux."""

    PLUG = 0
    UNPLUG = 1
    UNPLUG_ALL = 2
    STATE = 3


class Answer(IntEnum):
    """What it gets; VIRTIO_MEM_RESP_ in Linux."""

    ACK = 0
    NACK = 1
    BUSY = 2
    ERROR = 3


class BlockState(IntEnum):
    """The answer to STATE; VIRTIO_MEM_STATE_ in Linux."""

    PLUGGED = 0
    UNPLUGGED = 1
    MIXED = 2


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Attributes:
        kind: a RequestType, or another number.
        addr: guest-physical address of the first block.
        nb_blocks: device blocks.
    """

    SIZE = _REQUEST.size

    kind: int
    addr: int
    nb_blocks: int

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read a request; padding and what follows it are ignored.

        Raises:
            GuestError: it is too short.
        """
        if len(data) < _REQUEST.size:
            raise GuestError(f"a virtio-mem request of {len(data)} bytes, not {_REQUEST.size}")
        return cls(*_REQUEST.unpack_from(data))


RESPONSE_SIZE: Final = _RESPONSE.size


def response(answer: Answer, state: BlockState = BlockState.PLUGGED) -> bytes:
    """An answer as the driver reads it; the state counts for STATE only."""
    return _RESPONSE.pack(answer, state)


_TRANSPORT_NAMES: Final = (
    VirtioFeature.RING_INDIRECT_DESC,
    VirtioFeature.RING_EVENT_IDX,
    VirtioFeature.VERSION_1,
    VirtioFeature.RING_PACKED,
    VirtioFeature.IN_ORDER,
)


def mem_feature_names(features: int) -> list[str]:
    """The specification's names in lower case, lowest bit first."""
    return [str(bit.name).lower() for bit in (*MemFeature, *_TRANSPORT_NAMES) if features & bit]
