"""One device's memory table: which regions it holds, put into the native device as a whole.

Knows regions and their files. Must not know messages, rings or other devices.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from vhostd import _native
from vhostd.devices.base import GuestRange, MemorySlot
from vhostd.errors import FrontendError, HostError
from vhostd.memory.registry import HeldRegion, ImageRegion, MemoryRegistry, RegionRequest
from vhostd.protocol.wire import MemoryRegion
from vhostd.session.actions import FileIdentity, RegionSource
from vhostd.session.state import GuestRegion


class Parkable(Protocol):
    """Something that can hold a VM's worker still."""

    def parked(self) -> AbstractAsyncContextManager[None]:
        """Inside the block the worker stands between two chains."""


class DeviceMemory:
    """The memory table of one native device, with its hold on the files."""

    def __init__(
        self, vm_name: str, registry: MemoryRegistry, worker: Parkable, device: _native.Device
    ) -> None:
        self._vm_name = vm_name
        self._registry = registry
        self._worker = worker
        self._device = device
        self._slots: dict[MemoryRegion, HeldRegion | ImageRegion] = {}

    @property
    def slots(self) -> list[MemorySlot]:
        """Where guest memory is; disk images are none."""
        return [
            MemorySlot(region.guest_addr, region.size, held.region.mapping.page_size)
            for region, held in self._slots.items()
            if isinstance(held, HeldRegion)
        ]

    def images(self, identity: tuple[int, int]) -> list[GuestRange]:
        """Where the disk image of this st_dev and st_ino is."""
        return [
            GuestRange(region.guest_addr, region.size)
            for region, held in self._slots.items()
            if isinstance(held, ImageRegion) and (held.device, held.inode) == identity
        ]

    def hold(self, part: GuestRange) -> tuple[HeldRegion, int] | None:
        """Hold the region in which a range lies; None if it lies in none.

        Returns:
            The region, to be released, and the range's offset in its file in bytes.
        """
        for held in self._slots.values():
            if isinstance(held, ImageRegion):
                continue
            region = held.region
            offset = part.guest_addr - region.guest_addr
            if offset >= 0 and offset + part.size <= region.size:
                return held.share(), region.file_offset + offset
        return None

    async def replace(self, sources: tuple[RegionSource, ...]) -> tuple[FileIdentity, ...]:
        """Make these regions the table; the descriptors that came with them are closed.

        Returns:
            The file behind each region, in order.

        Raises:
            FrontendError: a region can't be mapped, or a started ring is not inside the new table.
                Nothing changed then, and the descriptors stay the caller's.
        """
        taken: list[HeldRegion | ImageRegion] = []
        slots: dict[MemoryRegion, HeldRegion | ImageRegion] = {}
        try:
            for source in sources:
                if source.file is None:
                    slots[source.region] = self._slots[source.region]
                    continue
                region = source.region
                request = RegionRequest(
                    region.guest_addr, region.size, region.file_offset, source.file
                )
                held = await self._registry.hold(self._vm_name, request)
                taken.append(held)
                slots[region] = held
            await self._install(slots)
        except BaseException:
            for held in taken:
                held.release()
            raise
        old, self._slots = self._slots, slots
        kept = set(map(id, slots.values()))
        for held in old.values():
            if id(held) not in kept:
                held.release()
        for source in sources:
            if source.file is not None:
                source.file.close()
        return tuple(
            FileIdentity(slots[source.region].device, slots[source.region].inode)
            for source in sources
        )

    async def resume(self, regions: Sequence[GuestRegion]) -> None:
        """Make a predecessor's table ours; its files are mapped already, or disk images.

        Raises:
            FrontendError, HostError: it can't be.
        """
        slots: dict[MemoryRegion, HeldRegion | ImageRegion] = {}
        for region in regions:
            identity = (region.device, region.inode)
            slots[region.announced] = self._registry.hold_known(
                self._vm_name, identity, region.guest_addr, region.size, region.file_offset
            ) or ImageRegion(identity)
        await self._install(slots)
        self._slots = slots

    async def _install(self, slots: dict[MemoryRegion, HeldRegion | ImageRegion]) -> None:
        async with self._worker.parked():
            try:
                self._device.set_regions(
                    [held.region for held in slots.values() if isinstance(held, HeldRegion)]
                )
            except OSError as error:
                if error.errno not in (errno.EFAULT, errno.EINVAL):
                    reason = os.strerror(error.errno or 0)
                    raise HostError(error.errno, f"memory table: {reason}") from error
                raise FrontendError(
                    "memory table: a started ring would not lie in guest memory any more"
                ) from error

    def release(self) -> None:
        """Let go of all files; the native device is detached and never runs again."""
        slots, self._slots = self._slots, {}
        for held in slots.values():
            held.release()
