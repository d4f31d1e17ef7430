"""The kinds of device vhostd serves: the only place, beside its own file, a new device edits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vhostd.devices import mem_request, pmem
from vhostd.devices.balloon import BALLOON_DEVICE_ID, CONFIG, QUEUE_COUNT
from vhostd.devices.mem_request import MEM_DEVICE_ID


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """What a VMM's command line must say about a device before it has spoken with us.

    Attributes:
        name: of the configuration's table, and "type" of --print-capabilities.
        virtio_id: device id of the virtio specification.
        queue_size: descriptors a ring; Linux 6.1 refuses a reporting queue of fewer than 32.
    """

    name: str
    virtio_id: int
    queue_count: int
    config_size: int
    queue_size: int


BALLOON: Final = DeviceKind(
    name="balloon",
    virtio_id=BALLOON_DEVICE_ID,
    queue_count=QUEUE_COUNT,
    config_size=CONFIG.size,
    queue_size=128,
)
MEM: Final = DeviceKind(
    name="mem",
    virtio_id=MEM_DEVICE_ID,
    queue_count=mem_request.QUEUE_COUNT,
    config_size=mem_request.CONFIG.size,
    queue_size=128,
)
PMEM: Final = DeviceKind(
    name="pmem",
    virtio_id=pmem.PMEM_DEVICE_ID,
    queue_count=pmem.QUEUE_COUNT,
    config_size=pmem.CONFIG.size,
    queue_size=64,
)
KINDS: Final = {kind.name: kind for kind in (BALLOON, MEM, PMEM)}
