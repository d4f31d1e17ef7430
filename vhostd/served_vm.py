"""A VM as the control API sees and changes it: one that is served, or one that is left alone.

Knows the control API's view and backend.vm. Must not know HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vhostd.backend.vm import Vm
from vhostd.config import VmConfig
from vhostd.control.interface import DeviceSocket, HintAction, MemoryWindow
from vhostd.devices.base import Refused
from vhostd.devices.registry import BALLOON, MEM, PMEM, DeviceKind


class ServedVm:
    """control.interface.VmView and VmChanges of a VM."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    @property
    def changes(self) -> ServedVm:
        """What can be done to it."""
        return self

    def status(self) -> dict[str, Any]:
        """The object of `vhostctl --json status VM`."""
        return self._vm.status()

    @property
    def devices(self) -> Sequence[DeviceSocket]:
        """What a VMM's command line must say about this VM's devices."""
        return device_sockets(self._vm.config)

    async def set_balloon_target(self, size: int) -> None:
        """Ask the guest to give up `size` bytes. Raises Refused."""
        self._vm.set_balloon_target(size)

    async def request_statistics(self) -> None:
        """Ask the guest for its statistics; an event tells when they came. Raises Refused."""
        self._vm.request_statistics()

    async def balloon_hint(self, action: HintAction) -> None:
        """Begin or break off a free page hinting round. Raises Refused."""
        self._vm.balloon_hint(start=action is HintAction.START)

    async def resize_mem(self, device: str | None, size: int) -> str:
        """Ask the guest to use `size` bytes of a memory device. Raises Refused."""
        return self._vm.resize_mem(device, size)

    async def flush_pmem(self, device: str | None) -> str:
        """Make a disk's image durable. Raises Refused."""
        pmem = self._vm.find_pmem(device)
        await self._vm.storage_of(pmem).flush()
        return pmem.options.id

    async def drop_pmem_cache(self, device: str | None) -> dict[str, Any]:
        """Give the page cache of a disk's image back to the host. Raises Refused."""
        return await self._vm.storage_of(self._vm.find_pmem(device)).drop_cache()

    async def clear_pmem(self, device: str | None) -> str:
        """Let flushes of a disk succeed again. Raises Refused."""
        return await self._vm.clear_pmem(device)

    async def set_memory(self, size: int) -> dict[str, Any]:
        """Ask for `size` bytes of usable memory. Raises Refused."""
        return self._vm.set_memory(size)


class PausedVm:
    """control.interface.VmView of a VM whose state is not to be trusted: nobody touches it."""

    def __init__(self, config: VmConfig, why: str) -> None:
        self._config = config
        self._why = why

    def status(self) -> dict[str, Any]:
        """That it is left alone, and why."""
        return {
            "vm": self._config.name,
            "state": "quarantined",
            "paused": self._why,
            "mem": [],
            "pmem": [],
            "connections": 0,
            "faults": {},
            "messages_refused": 0,
            "usable": None,
            "usable_goal": None,
        }

    @property
    def devices(self) -> Sequence[DeviceSocket]:
        """What a VMM's command line must say about this VM's devices."""
        return device_sockets(self._config)

    @property
    def changes(self) -> NoReturn:
        """Raises Refused."""
        raise Refused(f"VM {self._config.name!r} is left alone: {self._why}")


def device_sockets(config: VmConfig) -> list[DeviceSocket]:
    """The devices of a VM as a VMM's command line must describe them."""
    devices = []
    if config.balloon is not None:
        devices.append(_device_socket(BALLOON, "balloon0", config.balloon.socket))
    for mem in config.mems:
        window = MemoryWindow(mem.window_address, mem.size, mem.node)
        devices.append(_device_socket(MEM, mem.id, mem.socket, window))
    for pmem in config.pmems:
        image = MemoryWindow(
            pmem.window_address, pmem.size, pmem.node, pmem.file, readonly=pmem.readonly
        )
        window_or_none = image if pmem.mode == "window" else None
        devices.append(_device_socket(PMEM, pmem.id, pmem.socket, window_or_none))
    return devices


def _device_socket(
    kind: DeviceKind, identifier: str, path: Path, window: MemoryWindow | None = None
) -> DeviceSocket:
    return DeviceSocket(
        kind=kind.name,
        id=identifier,
        path=path,
        virtio_id=kind.virtio_id,
        queue_count=kind.queue_count,
        config_size=kind.config_size,
        queue_size=kind.queue_size,
        window=window,
    )
