"""The QEMU options and the libvirt XML that give a VM its vhostd devices.

Text only; must not know a daemon or a running VM.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias
from xml.sax.saxutils import quoteattr

Device: TypeAlias = Mapping[str, Any]
"""As verbs.DeviceDescription."""

DEVICE_MODEL: Final = "vhost-user-test-device-pci"
"""QEMU 11.1's generic vhost-user device; older releases call it vhost-user-device-pci."""
_NAMESPACE: Final = "http://libvirt.org/schemas/domain/qemu/1.0"


def device_options(devices: Sequence[Device]) -> list[str]:
    """-chardev and -device for each device."""
    options: list[str] = []
    for device in devices:
        name = device["id"]
        options += ["-chardev", f"socket,id={name},path={_value(device['path'])}"]
        options += [
            "-device",
            f"{DEVICE_MODEL},chardev={name},virtio-id={device['virtio_id']}"
            f",num_vqs={device['queue_count']},config_size={device['config_size']}"
            f",vq_size={device['queue_size']}",
        ]
    return options


def memory_options(memory: str) -> list[str]:
    """Guest RAM as a shared memory file, which vhostd needs to punch holes in."""
    return [
        *("-machine", "q35,memory-backend=ram0", "-m", memory),
        *("-object", f"memory-backend-memfd,id=ram0,size={memory},share=on"),
    ]


def command_line(options: Sequence[str]) -> str:
    """Options for a shell, on one line, so that pasting it works as well as $(vhostctl …)."""
    return shlex.join(options)


def libvirt_xml(devices: Sequence[Device]) -> str:
    """Two elements for a <domain>: its memory is shared, and QEMU gets extra options.

    libvirt has no element for a generic vhost-user device.
    """
    arguments = "\n".join(
        f"  <qemu:arg value={quoteattr(option)}/>" for option in device_options(devices)
    )
    return (
        "<memoryBacking>\n"
        "  <source type='memfd'/>\n"
        "  <access mode='shared'/>\n"
        "</memoryBacking>\n"
        f"<qemu:commandline xmlns:qemu='{_NAMESPACE}'>\n{arguments}\n</qemu:commandline>"
    )


def _value(text: str) -> str:
    """QEMU ends an option's value at a comma, unless there are two."""
    return text.replace(",", ",,")
