"""What a device is to a VMM that has just connected. Must not know connections."""

from __future__ import annotations

from vhostd import _native
from vhostd.devices.base import Device
from vhostd.protocol.features import protocol_features_for
from vhostd.session.plan import Offer


def new_native(device: Device) -> _native.Device:
    """The worker's side of a device, with its config bytes.

    Raises:
        OSError: no memory or descriptor for it.
    """
    native = _native.Device(device.queue_count, device.config_size, device.config_writable)
    native.publish_config(0, device.config())
    return native


def offer_of(device: Device, *, memory_slots: bool) -> Offer:
    """What is offered; memory_slots: the memory table may come slot by slot."""
    return Offer(
        device.offered_features,
        device.queue_count,
        device.config_size,
        protocol_features_for(shmem=bool(device.shmem_region_sizes), memory_slots=memory_slots),
        tuple(device.shmem_region_sizes),
    )
