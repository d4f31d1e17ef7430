"""The window of a virtio-mem device on the host: given back, filled, and looked at.

Does what the device asks for, one thing after the other and in threads, and tells it when it is
done. Must not know requests or which blocks are plugged.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from vhostd._native import Mapping
from vhostd.backend.journal import Journal
from vhostd.backend.memory_table import DeviceMemory
from vhostd.devices.base import Effects, GuestRange
from vhostd.devices.mem import Mem
from vhostd.devices.mem_window import MemOptions
from vhostd.log import LogEvent
from vhostd.memory.registry import HeldRegion
from vhostd.units import BALLOON_PAGE_SIZE, MiB

PART_SIZE: Final = 64 * MiB
"""Some 20 ms of work: whoever waits for a block of a large window waits no longer than that."""

LOOK_INTERVAL_S: Final = 2.0
"""How often unplugged blocks are looked at. A look costs microseconds where there is nothing."""

PARTS_LOOKED_AT_MAX: Final = 65536
"""Of one look: a guest that touches every second page must not keep a processor busy. Beyond it one
part of a block tells as much as all of them."""

_BIND_REMEDY: Final = "under systemd: the drop-in host-node.conf, docs/operations.md"

Perform = Callable[[Effects], None]


class NoHostWork:
    """For devices that ask for none."""

    def discard(self, part: GuestRange) -> None:
        """Never called."""
        raise AssertionError(f"a device without a window discards {part}")

    def populate(self, part: GuestRange) -> None:
        """Never called."""
        raise AssertionError(f"a device without a window populates {part}")


@dataclass(frozen=True, slots=True)
class _Job:
    part: GuestRange
    populates: bool


class Window:
    """One connection's window."""

    def __init__(self, device: Mem, memory: DeviceMemory, journal: Journal) -> None:
        self._device = device
        self._memory = memory
        self._journal = journal
        self._jobs: deque[_Job] = deque()
        self._more = trio.Event()
        # Our own: threads of VMs whose memory is slow must not use up those of others.
        self._thread = trio.CapacityLimiter(2)
        self._bound_to: tuple[int, int] | None = None  # the file that has its memory policy

    def discard(self, part: GuestRange) -> None:
        """Give a range back to the host after all that was asked for before."""
        self._jobs.append(_Job(part, populates=False))
        self._more.set()

    def populate(self, part: GuestRange) -> None:
        """Allocate a range's memory after all that was asked for before."""
        self._jobs.append(_Job(part, populates=True))
        self._more.set()

    async def run(self, perform: Perform) -> None:
        """Work until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._work, perform)
            nursery.start_soon(self._watch, perform)

    async def _work(self, perform: Perform) -> None:
        while True:
            await self._more.wait()
            self._more = trio.Event()
            while self._jobs:
                job = self._jobs.popleft()
                if job.populates:
                    await self._populate(job.part, perform)
                else:
                    await self._discard(job.part, perform)

    async def _discard(self, whole: GuestRange, perform: Perform) -> None:
        for part in self._parts(whole):
            error = None
            if self._device.discard_due(part):
                error = await self._do(part, lambda at, offset, size: at.discard(offset, size))
            perform(self._device.on_discarded(part, error))

    async def _populate(self, whole: GuestRange, perform: Perform) -> None:
        error = None
        for part in self._parts(whole):
            error = await self._do(part, lambda at, offset, size: at.populate(offset, size))
            if error is not None:
                break
        perform(self._device.on_populated(whole, error))

    async def _do(self, part: GuestRange, work: Callable[[Mapping, int, int], None]) -> str | None:
        """Do something with a range in a thread; what went wrong, or None."""
        found = self._memory.hold(part)
        if found is None:
            return "the VMM took the window away"
        held, offset = found
        try:
            await self._bind(held)
            await trio.to_thread.run_sync(
                work, held.region.mapping, offset, part.size, limiter=self._thread
            )
        except OSError as error:
            return os.strerror(error.errno or 0)
        finally:
            held.release()
        return None

    async def _bind(self, held: HeldRegion) -> None:
        """Give the window its memory policy, once."""
        node, identity = self._device.options.host_node, (held.device, held.inode)
        if node is None or self._bound_to == identity:
            return
        self._bound_to = identity
        window = self._memory.hold(self._device.options.window)
        if window is None:
            return
        whole, offset = window
        try:
            whole.region.mapping.bind(offset, self._device.options.size, node)
        except OSError as error:
            self._journal.log.error(
                LogEvent.HOST_ERROR,
                device=self._device.options.id,
                error=f"host_node = {node}: mbind: {os.strerror(error.errno or 0)}",
                consequence="the window takes its memory from any node",
                remedy=_BIND_REMEDY if error.errno == errno.EPERM else None,
            )
        finally:
            whole.release()

    def _parts(self, whole: GuestRange) -> Iterator[GuestRange]:
        # Never less than a block: it is given back when its part is.
        size = max(PART_SIZE, self._device.options.block_size)
        for at in range(whole.guest_addr, whole.end, size):
            yield GuestRange(at, min(size, whole.end - at))

    # -- looking -------------------------------------------------------------------------------

    async def _watch(self, perform: Perform) -> None:
        while True:
            await trio.sleep(LOOK_INTERVAL_S)
            perform(await self._look())

    async def _look(self) -> Effects:
        device = self._device
        empty = device.look_begins()
        window = self._memory.hold(device.options.window) if empty else None
        if window is None:
            return device.on_looked({})
        held, offset = window
        mapping = held.region.mapping
        try:
            if mapping.page_size > BALLOON_PAGE_SIZE:
                before = device.settled_size
                resident = await trio.to_thread.run_sync(
                    lambda: mapping.resident_size, limiter=self._thread
                )
                # Blocks may have come or gone meanwhile; neither makes a violation.
                return device.on_excess(max(0, resident - max(before, device.settled_size)))
            found = await trio.to_thread.run_sync(
                _memory_by_block, mapping, offset, device.options, empty, limiter=self._thread
            )
        except OSError as error:
            self._journal.guest_caused(
                "look", LogEvent.HOST_ERROR, error=f"window: {os.strerror(error.errno or 0)}"
            )
            found = {}
        finally:
            held.release()
        return device.on_looked(found)


def _memory_by_block(
    mapping: Mapping, offset: int, options: MemOptions, empty: Sequence[GuestRange]
) -> dict[int, int]:
    """Bytes of memory in each block of these ranges that has any; offset: of the window."""
    block_size = options.block_size
    found: dict[int, int] = {}
    parts = 0
    for part in empty:
        at = part.guest_addr - options.address
        end = at + part.size
        while (data := mapping.next_data(offset + at, end - at)) is not None:
            at, size = data[0] - offset, data[1]
            stop = at + size
            while at < stop:
                block_end = (at // block_size + 1) * block_size
                here = min(stop, block_end) - at
                found[at // block_size] = found.get(at // block_size, 0) + here
                at += here
            parts += 1
            if parts > PARTS_LOOKED_AT_MAX:
                at = -(-at // block_size) * block_size
            if at >= end:
                break
    return found
