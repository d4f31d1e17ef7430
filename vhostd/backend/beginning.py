"""A device goes on where it was: what its predecessor recorded, else what outlived the host.

Must not know what a device's state means.
"""

from __future__ import annotations

from vhostd.backend.journal import Journal
from vhostd.backend.keeping import VmKeeping
from vhostd.backend.left import VmLeft
from vhostd.devices.base import Device
from vhostd.handover.state_memfd import StateDamaged
from vhostd.log import LogEvent


def begin(
    name: str, device: Device, left: VmLeft | None, keeping: VmKeeping, journal: Journal
) -> None:
    """Have a device go on where it was, as far as anybody can know.

    Raises:
        ValueError: a predecessor's record is not this device's, or not whole.
    """
    if left is not None and (saved := left.device(name)) is not None:
        device.load(saved)
        _begin_large(name, device, left, keeping)
        return
    lasting = keeping.lasting
    if lasting is None or (lasted := lasting.of(name)) is None:
        return
    try:
        device.recall(lasted)
    except ValueError as error:
        journal.log.error(
            LogEvent.STATE_SET_ASIDE,
            device=name,
            error=str(error),
            consequence="the device begins as it is configured",
        )


def _begin_large(name: str, device: Device, left: VmLeft, keeping: VmKeeping) -> None:
    try:
        memfd = left.large_state(keeping.vm_name, name)
        content = None if memfd is None else memfd.read()
    except StateDamaged as error:
        raise ValueError(str(error)) from error
    if memfd is None or content is None or device.large_state is None:
        return
    device.large_state.load_content(content)
    keeping.adopt_large(name, memfd)
