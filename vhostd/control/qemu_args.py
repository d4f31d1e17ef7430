"""The QEMU options and the libvirt XML that give a VM its vhostd devices.

Text only; must not know a daemon or a running VM.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias
from xml.sax.saxutils import quoteattr

from vhostd.errors import ConfigError
from vhostd.units import GiB, KiB, MiB, align_up

Device: TypeAlias = Mapping[str, Any]
"""As verbs.DeviceDescription."""

DEVICE_MODEL: Final = "vhost-user-test-device-pci"
"""QEMU 11.1's generic vhost-user device; older releases call it vhost-user-device-pci."""
_NAMESPACE: Final = "http://libvirt.org/schemas/domain/qemu/1.0"

_Q35_LOW_MEMORY_MAX: Final = 0xB000_0000
_Q35_LOW_MEMORY_SPLIT: Final = 0x8000_0000
"""How q35 lays RAM out: all of it below 4 GiB, or this much (QEMU's hw/i386/pc_q35.c)."""

_FIRST_WINDOW_SLOT: Final = 0x1E
_FUNCTIONS: Final = range(1, 8)
"""A PCI slot without function 0 is never looked at, so the guest sees no device in the others."""


def device_options(devices: Sequence[Device]) -> list[str]:
    """-chardev and -device for each device, after the windows they need."""
    options: list[str] = []
    for number, device in enumerate(device for device in devices if device["window"]):
        options += _window_options(device, number)
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


def _window_options(device: Device, number: int) -> list[str]:
    window, name = device["window"], f"{device['id']}-window"
    slot, function = divmod(number, len(_FUNCTIONS))
    address = f"{_FIRST_WINDOW_SLOT - slot:x}.{_FUNCTIONS[function]}"
    backend = f"memory-backend-memfd,id={name},size={window['size']},share=on"
    if window["file"] is not None:
        backend = (
            f"memory-backend-file,id={name},size={window['size']},share=on"
            f",mem-path={_value(window['file'])}{',readonly=on' * window['readonly']}"
        )
    return [
        *("-object", backend),
        "-device",
        f"virtio-pmem-pci,id={name}-device,memdev={name},memaddr={window['address']:#x}"
        f",addr={address}",
    ]


def hotplug_base(memory: int) -> int:
    """Where the hot-pluggable range of a q35 machine with so much RAM begins; bytes."""
    above = 0 if memory <= _Q35_LOW_MEMORY_MAX else memory - _Q35_LOW_MEMORY_SPLIT
    return align_up(4 * GiB + above, GiB)


def memory_options(memory: int, devices: Sequence[Device] = ()) -> list[str]:
    """Guest RAM as a shared memory file, which vhostd needs to punch holes in.

    Args:
        memory: bytes, whole MiB.

    Raises:
        ConfigError: a window lies below the range that QEMU has for it.
    """
    windows = [device["window"] for device in devices if device["window"]]
    size = _qemu_size(memory)
    ram = f"memory-backend-memfd,id=ram0,size={size},share=on"
    if not windows:
        return ["-machine", "q35,memory-backend=ram0", "-m", size, "-object", ram]
    nodes = max(window["node"] for window in windows) + 1
    numa = [f"node,nodeid={node}" for node in range(1, nodes)]
    machine = "q35,memory-backend=ram0"
    if numa:
        machine, numa = "q35", ["node,nodeid=0,memdev=ram0", *numa]
    return [
        *("-machine", machine),
        *("-m", f"{size},maxmem={_qemu_size(max_memory(memory, windows))},slots=1"),
        *("-object", ram),
        *(option for node in numa for option in ("-numa", node)),
    ]


def max_memory(memory: int, windows: Sequence[Mapping[str, int]]) -> int:
    """The maxmem that makes room for these windows; bytes.

    Raises:
        ConfigError: a window lies below the range that QEMU has for it.
    """
    base = hotplug_base(memory)
    for window in windows:
        if window["address"] < base:
            raise ConfigError(
                f"window_address {window['address']:#x} is below {base:#x}, where QEMU's range for"
                f" windows begins in a guest of {_qemu_size(memory)}; set it to that or more"
            )
    end = max(window["address"] + window["size"] for window in windows)
    return memory + align_up(end - base, GiB)


def command_line(options: Sequence[str]) -> str:
    """Options for a shell, on one line, so that pasting it works as well as $(vhostctl …)."""
    return shlex.join(options)


def libvirt_xml(memory: int, devices: Sequence[Device]) -> str:
    """Elements for a <domain>: its memory is shared, and QEMU gets extra options.

    libvirt has no element for a generic vhost-user device.

    Raises:
        ConfigError: see max_memory().
    """
    windows = [device["window"] for device in devices if device["window"]]
    room = ""
    if windows:
        most = max_memory(memory, windows) // KiB
        room = f"<maxMemory slots='1' unit='KiB'>{most}</maxMemory>\n"
    arguments = "\n".join(
        f"  <qemu:arg value={quoteattr(option)}/>" for option in device_options(devices)
    )
    return (
        f"{room}<memoryBacking>\n"
        "  <source type='memfd'/>\n"
        "  <access mode='shared'/>\n"
        "</memoryBacking>\n"
        f"<qemu:commandline xmlns:qemu='{_NAMESPACE}'>\n{arguments}\n</qemu:commandline>"
    )


def _qemu_size(size: int) -> str:
    return f"{size // GiB}G" if size % GiB == 0 else f"{size // MiB}M"


def _value(text: str) -> str:
    """QEMU ends an option's value at a comma, unless there are two."""
    return text.replace(",", ",,")
