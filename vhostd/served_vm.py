"""A VM as the control API changes it, and its devices as the control API describes them.

Knows the control API's interface and backend.vm. Must not know HTTP.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractContextManager
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from vhostd.backend.vm import Vm
from vhostd.config import VmConfig
from vhostd.control.interface import DeviceSocket, HintAction, MemoryWindow
from vhostd.devices.registry import BALLOON, MEM, PMEM, DeviceKind

Asked = ParamSpec("Asked")
Answer = TypeVar("Answer")


def _supervised(
    change: Callable[Concatenate[ServedVm, Asked], Awaitable[Answer]],
) -> Callable[Concatenate[ServedVm, Asked], Coroutine[Any, Any, Answer]]:
    """What goes wrong in a change is the VM's trouble."""

    @wraps(change)
    async def supervised(vm: ServedVm, /, *asked: Asked.args, **more: Asked.kwargs) -> Answer:
        with vm.supervised():
            return await change(vm, *asked, **more)

    return supervised


class ServedVm:
    """control.interface.VmChanges of a VM.

    Attributes:
        supervised: the context of every change; pauses the VM where it raises more than Refused.
    """

    def __init__(self, vm: Vm, supervised: Callable[[], AbstractContextManager[None]]) -> None:
        self._vm = vm
        self.supervised = supervised

    @_supervised
    async def set_balloon_target(self, size: int) -> None:
        """Ask the guest to give up `size` bytes. Raises Refused."""
        self._vm.set_balloon_target(size)

    @_supervised
    async def request_statistics(self) -> None:
        """Ask the guest for its statistics; an event tells when they came. Raises Refused."""
        self._vm.request_statistics()

    @_supervised
    async def balloon_hint(self, action: HintAction) -> None:
        """Begin or break off a free page hinting round. Raises Refused."""
        self._vm.balloon_hint(start=action is HintAction.START)

    @_supervised
    async def resize_mem(self, device: str | None, size: int) -> str:
        """Ask the guest to use `size` bytes of a memory device. Raises Refused."""
        return self._vm.resize_mem(device, size)

    @_supervised
    async def flush_pmem(self, device: str | None) -> str:
        """Make a disk's image durable. Raises Refused."""
        pmem = self._vm.find_pmem(device)
        await self._vm.storage_of(pmem).flush()
        return pmem.options.id

    @_supervised
    async def drop_pmem_cache(self, device: str | None) -> dict[str, Any]:
        """Give the page cache of a disk's image back to the host. Raises Refused."""
        return await self._vm.storage_of(self._vm.find_pmem(device)).drop_cache()

    @_supervised
    async def clear_pmem(self, device: str | None) -> str:
        """Let flushes of a disk succeed again. Raises Refused."""
        return await self._vm.clear_pmem(device)

    @_supervised
    async def set_memory(self, size: int) -> dict[str, Any]:
        """Ask for `size` bytes of usable memory. Raises Refused."""
        return self._vm.set_memory(size)


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
