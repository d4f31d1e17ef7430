"""One device's memory table: which regions it holds, put into the native device as a whole.

Knows regions and their files. Must not know messages, rings or other devices.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import replace
from typing import Protocol

from vhostd import _native
from vhostd.backend.journal import Journal
from vhostd.devices.base import GuestRange, MemorySlot
from vhostd.errors import FrontendError, HostError
from vhostd.log import LogEvent
from vhostd.memory.registry import HeldRegion, MemoryRegistry, RegionRequest, UnmappedRegion
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
        self,
        registry: MemoryRegistry,
        worker: Parkable,
        device: _native.Device,
        journal: Journal,
        preallocated: Sequence[GuestRange] = (),
    ) -> None:
        """preallocated: windows whose memory the guest keeps though it reports it free."""
        self._vm_name = journal.vm_name
        self._registry = registry
        self._worker = worker
        self._device = device
        self._journal = journal
        self._preallocated = preallocated
        self._slots: dict[MemoryRegion, HeldRegion | UnmappedRegion] = {}

    @property
    def slots(self) -> list[MemorySlot]:
        """Where guest memory is; files that are left alone are none."""
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
            if isinstance(held, UnmappedRegion) and (held.device, held.inode) == identity
        ]

    def begins_at(self, guest_addr: int) -> bool:
        """Whether a region of whatever file begins there."""
        return any(region.guest_addr == guest_addr for region in self._slots)

    def hold(self, part: GuestRange) -> tuple[HeldRegion, int] | None:
        """Hold the region in which a range lies; None if it lies in none.

        Returns:
            The region, to be released, and the range's offset in its file in bytes.
        """
        for held in self._slots.values():
            if isinstance(held, UnmappedRegion):
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
        taken: list[HeldRegion | UnmappedRegion] = []
        slots: dict[MemoryRegion, HeldRegion | UnmappedRegion] = {}
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
                if isinstance(held, UnmappedRegion) and not held.is_image:
                    self._tell_left_alone(region)
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

    def _tell_left_alone(self, region: MemoryRegion) -> None:
        self._journal.guest_caused(
            ("memory", region.guest_addr),
            LogEvent.MEMORY_LEFT_ALONE,
            guest_addr=hex(region.guest_addr),
            size=region.size,
            why="its file is neither shmem (memfd, tmpfs) nor hugetlbfs",
            consequence="vhostd does not touch it; a device whose rings lie there can't work",
        )

    async def resume(self, regions: Sequence[GuestRegion]) -> None:
        """Make a predecessor's table ours; its files are mapped already, or left alone.

        Raises:
            FrontendError, HostError: it can't be.
        """
        slots: dict[MemoryRegion, HeldRegion | UnmappedRegion] = {}
        for region in regions:
            identity = (region.device, region.inode)
            slots[region.announced] = self._registry.hold_known(
                self._vm_name, identity, region.guest_addr, region.size, region.file_offset
            ) or UnmappedRegion(identity, is_image=identity in self._registry.images)
        await self._install(slots)
        self._slots = slots

    async def _install(self, slots: dict[MemoryRegion, HeldRegion | UnmappedRegion]) -> None:
        async with self._worker.parked():
            try:
                self._device.set_regions(
                    [
                        replace(held.region, preallocated=self._is_preallocated(held.region))
                        for held in slots.values()
                        if isinstance(held, HeldRegion)
                    ]
                )
            except OSError as error:
                if error.errno not in (errno.EFAULT, errno.EINVAL):
                    reason = os.strerror(error.errno or 0)
                    raise HostError(error.errno, f"memory table: {reason}") from error
                raise FrontendError(
                    "memory table: a started ring would not lie in guest memory any more"
                ) from error

    def _is_preallocated(self, region: _native.Region) -> bool:
        return any(
            window.guest_addr <= region.guest_addr and region.guest_addr + region.size <= window.end
            for window in self._preallocated
        )

    def release(self) -> None:
        """Let go of all files; the native device is detached and never runs again."""
        slots, self._slots = self._slots, {}
        with ExitStack() as release:
            for held in slots.values():
                release.callback(held.release)
