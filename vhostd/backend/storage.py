"""The image of a pmem device while a VMM is there: opened, mapped by the VMM, watched, flushed.

Does what the device and the operator ask for, in threads, since storage may take long or for ever.
Must not know messages or requests of the guest: those are the native worker's.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Final, TypeVar

import trio

from vhostd import _native
from vhostd.backend.backend_requests import BackendRequests
from vhostd.backend.image_beat import FREE_SIZE_MIN, Beat
from vhostd.backend.image_opening import native_image, open_for, refuse_memory
from vhostd.backend.journal import Journal
from vhostd.backend.left import Left
from vhostd.backend.memory_table import DeviceMemory
from vhostd.backend.surroundings import start_apart
from vhostd.backend.worker import VmWorker
from vhostd.devices.base import Effects, JsonObject, Refused
from vhostd.devices.pmem import ImageView, Pmem, PmemMode
from vhostd.devices.pmem_state import Failure
from vhostd.handover.fd_store import DeviceKeeping
from vhostd.images.image_file import ImageState, ImageUnusable, OpenImage, look_at
from vhostd.images.mapped import drop_cache, mark_cold, referenced_size
from vhostd.log import LogEvent
from vhostd.memory.registry import MemoryRegistry
from vhostd.protocol.wire import ShmemMapping
from vhostd.units import MiB, format_size

LET_GO_TIMEOUT_S: Final = 1.0
"""How long a VMM's end may take for the sake of the next: a look at a healthy image is over."""

Perform = Callable[[Effects], None]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class StoragePolicy:
    """What an operator chose about an image; sizes in bytes.

    Attributes:
        writeback_limit: begin to write when more than this is dirty; 0: leave it to the kernel.
        cold_cache_s: drop the page cache of an image unused for so long; 0: never.
        sequential: read further ahead than usual.
    """

    writeback_limit: int = 64 * MiB
    cold_cache_s: float = 0.0
    sequential: bool = False


class Storage:
    """One connection's image."""

    def __init__(
        self,
        device: Pmem,
        policy: StoragePolicy,
        native: _native.Device,
        memory: DeviceMemory,
        registry: MemoryRegistry,
        requests: BackendRequests,
        stop_vm: Callable[[str], None],
        peer_pid: int | None,
        perform: Perform,
        kept: DeviceKeeping,
        journal: Journal,
        pause: Callable[[BaseException], None],
    ) -> None:
        """perform: carries out what the device says to what happens to the image."""
        self._device = device
        self._policy = policy
        self._native = native
        self._memory = memory
        self._registry = registry
        self._requests = requests
        self._stop_vm = stop_vm
        self._peer_pid = peer_pid
        self._perform = perform
        self._kept = kept
        self._journal = journal
        self._pause = pause
        self._open: OpenImage | None = None
        self._image: _native.Image | None = None
        # Our own: threads that wait for this image's storage must not be those of other VMs.
        self._threads = trio.CapacityLimiter(2)
        self._counted = False
        self._stopped_below: int | None = None
        self._removal_told = False
        self._cold_s = 0.0

    @asynccontextmanager
    async def opened(self, worker: VmWorker, left: Left | None = None) -> AsyncIterator[None]:
        """Have the image open and locked inside the block, and the native device flush it.

        Raises:
            ImageUnusable: it can't be served, for want of memory or descriptors too.
        """
        opened = await self._in_thread(lambda: open_for(self._device.options, left))
        self._registry.images.opened(opened.identity)
        try:
            refuse_memory(opened, self._registry.memory_owner(opened.identity))
            self._device.refused_image = None
            self._image = native_image(opened, left)
            self._kept.keep("image", opened.file.fileno(), apart=True)
            self._kept.keep("witness", opened.witness.fileno(), apart=True)
            self._kept.keep("image-state", self._image.shared_fd)
            if self._device.failure is not None:
                self._image.fail(self._device.failure.error)
            async with worker.parked():
                self._native.set_image(self._image)
            self._open = opened
            if not opened.locked:
                self._journal.log.warning(LogEvent.IMAGE_NOT_LOCKED, file=str(opened.path))
            if self._policy.sequential:
                # Of the open file, which is the one the VMM maps.
                os.posix_fadvise(opened.file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            yield
        finally:
            with trio.CancelScope(shield=True):
                async with worker.parked():
                    self._native.stop_ring(0)  # requests that still wait are nobody's
                    self._native.set_image(None)
            self._open, image, self._image = None, self._image, None
            await self._let_go(opened, image)
            self._registry.images.closed(opened.identity)
            self._device.add_counters(self.flush_counters())
            self._counted = True

    async def _let_go(self, opened: OpenImage, image: _native.Image | None) -> None:
        """Close it once no thread and no worker is in it; the next VMM finds it in use before."""
        closed = trio.Event()
        start_apart(self._pause, self._close_unused, opened, image, closed)
        with trio.move_on_after(LET_GO_TIMEOUT_S, shield=True):
            await closed.wait()

    async def _close_unused(
        self, opened: OpenImage, image: _native.Image | None, closed: trio.Event
    ) -> None:
        for _ in range(int(self._threads.total_tokens)):
            # A thread has its token until it ends, whoever waits for it.
            await self._threads.acquire_on_behalf_of(object())
        if image is not None:
            limiter = trio.CapacityLimiter(1)
            await trio.to_thread.run_sync(image.wait_alone, limiter=limiter, abandon_on_cancel=True)
            self._perform(self._failure_of(image))  # there was nobody left to be told of it
            image.close()
        opened.close()
        closed.set()

    def refuse(self, error: ImageUnusable) -> None:
        """The VMM can't be served for this reason."""
        self._device.refused_image = str(error)
        self._journal.log.error(
            LogEvent.IMAGE_UNUSABLE, error=str(error), consequence="the VMM was turned away"
        )
        self._journal.publish(LogEvent.IMAGE_UNUSABLE, {"error": str(error)})

    def flush_counters(self) -> dict[str, int]:
        """What became of the guest's flushes on this connection; none once its device counts it."""
        return {} if self._counted else self._native.pmem_counters().as_dict()

    def counters(self) -> dict[str, int]:
        """The same, with what its syncs took; named as in c_src/vhd_api.h."""
        if self._image is None:
            return self.flush_counters()
        statistics = self._image.statistics()
        return {
            **self.flush_counters(),
            "syncs": statistics.syncs,
            "sync_ns": statistics.sync_ns,
            "sync_ns_last": statistics.sync_ns_last,
            "sync_ns_max": statistics.sync_ns_max,
        }

    # -- the region ----------------------------------------------------------------------------

    def on_memory(self) -> Effects:
        """The VMM's memory table changed: is the image in it, where it must be?"""
        if self._open is None:
            return []
        found = self._memory.images(self._open.identity)
        options = self._device.options
        if options.mode is PmemMode.WINDOW:
            return self._device.on_region(self._why_no_window())
        if not self._device.wants_mapping:
            return []
        if any(part.size == options.size for part in found):
            return self._device.on_region(None)
        return [] if self._device.missing else self._device.on_region("the VMM took it away")

    def _why_no_window(self) -> str | None:
        assert self._open is not None, "called while the image is open"
        window = self._device.options.window
        if window in self._memory.images(self._open.identity):
            return None
        if self._memory.begins_at(window.guest_addr):
            return f"the VMM has another file at {window.guest_addr:#x}; see vhostctl qemu-args"
        return f"the VMM has no memory at {window.guest_addr:#x}; see vhostctl qemu-args"

    def on_started(self) -> None:
        """The VMM bears requests now: hand it the image, unless it has it from before."""
        options, image = self._device.options, self._open
        if image is None or not self._device.wants_mapping or self._memory.images(image.identity):
            return
        if not self._requests.possible:
            self._on_mapped(None)
            return
        flags = 0 if options.readonly else ShmemMapping.WRITABLE
        self._requests.want_mapping(
            ShmemMapping(0, 0, 0, options.size, flags).pack(), image.file, self._on_mapped
        )

    def _on_mapped(self, verdict: int | None) -> None:
        known = self._open is not None and self._memory.images(self._open.identity)
        if verdict == 0 or known:  # refused, perhaps, since a predecessor asked for it too
            self._perform(self._device.on_region(None))
            return
        why = "the VMM did not answer" if verdict is None else f"the VMM refused it ({verdict})"
        if verdict and self._device.options.readonly:
            # A writable descriptor would do, but QEMU 11.1 ignores the flag and maps it writable.
            why += ': QEMU 11.1 takes no read-only file as shared memory; set mode = "window"'
        self._journal.log.error(
            LogEvent.IMAGE_NOT_MAPPED, device=self._device.options.id, error=why
        )
        self._perform(self._device.on_region(why))

    # -- what goes wrong -----------------------------------------------------------------------

    def on_flush_failed(self) -> Effects:
        """The guest was told that a flush failed."""
        return [] if self._image is None else self._failure_of(self._image)

    def _failure_of(self, image: _native.Image) -> Effects:
        error = image.statistics().failed_errno
        return [] if error == 0 else self._fail(image, error, f"sync: {os.strerror(error)}")

    def _fail(self, image: _native.Image, error: int, why: str) -> Effects:
        if self._device.failure is not None:
            return []
        image.fail(error)
        self._journal.log.error(
            LogEvent.IMAGE_FAILED,
            device=self._device.options.id,
            file=self._device.options.file,
            error=why,
            consequence="every flush of the guest fails until: vhostctl pmem clear",
        )
        return self._device.on_failure(Failure(error, why, time.time()))

    # -- what an operator wants ----------------------------------------------------------------

    async def flush(self) -> None:
        """Make all that was written durable.

        Raises:
            Refused: it failed, now or before.
        """
        image, _ = self._require()
        try:
            await self._in_thread(image.sync)
        except OSError as error:
            self._perform(self.on_flush_failed())
            raise Refused(f"{self._device.options.id}: {os.strerror(error.errno or 0)}") from error

    async def drop_cache(self) -> JsonObject:
        """Make it durable and give its page cache back to the host; what came of it, in bytes.

        Raises:
            Refused: it can't be made durable.
        """
        image, opened = self._require()
        try:
            dropped = await self._in_thread(
                lambda: drop_cache(image, opened.file.fileno(), opened.identity, self._peer_pid)
            )
        except OSError as error:
            self._perform(self.on_flush_failed())
            raise Refused(f"{self._device.options.id}: {os.strerror(error.errno or 0)}") from error
        await self._look(image, opened)  # so that the status shows it at once
        told = {"device": self._device.options.id, **asdict(dropped)}
        self._journal.publish(LogEvent.CACHE_DROPPED, told)
        return told

    async def clear(self) -> None:
        """Flushes may succeed again."""
        if self._image is not None:
            await self._in_thread(self._image.clear)

    def _require(self) -> tuple[_native.Image, OpenImage]:
        if self._image is None or self._open is None:
            raise Refused(f"{self._device.options.id}: its image is not open")
        return self._image, self._open

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await trio.to_thread.run_sync(work, limiter=self._threads, abandon_on_cancel=True)

    # -- care ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look after the image until cancelled."""
        self._cold_s = trio.current_time()
        beat = Beat(self._device.options.size, self._policy.cold_cache_s / 4)
        while True:
            started_s = trio.current_time()
            took_s = 0.0
            image, opened = self._require()
            try:
                cache = await self._look(image, opened)
                # Not what follows: that takes as long as the disk, and a writing guest goes on.
                took_s = trio.current_time() - started_s
                limit = self._policy.writeback_limit
                if limit and cache is not None and cache.dirty > limit:
                    await self._in_thread(image.write_back)
                await self._cool(image, opened)
            except OSError as error:
                self._journal.guest_caused(
                    ("image", self._device.options.id),
                    LogEvent.HOST_ERROR,
                    file=str(opened.path),
                    error=os.strerror(error.errno or 0),
                )
            await trio.sleep(beat.interval_s(self._device.image, took_s))

    async def _look(self, image: _native.Image, opened: OpenImage) -> _native.ImageCache | None:
        cache, state = await self._in_thread(lambda: (image.cache(), look_at(opened.file)))
        self._device.image = ImageView(
            cached=None if cache is None else cache.cached,
            dirty=None if cache is None else cache.dirty,
            writeback=None if cache is None else cache.writeback,
            allocated=state.allocated,
            free=state.free,
            removed=state.removed,
        )
        self._look_at_file(state)
        return cache

    def _look_at_file(self, state: ImageState) -> None:
        options = self._device.options
        if state.file_size < options.size:
            why = f"the file has shrunk to {state.file_size} bytes, {options.size} are in use"
            if self._device.failure is None:
                self._stop_vm(f"{options.id}: {why}")
            self._perform(self._fail(self._require()[0], errno.ENODATA, why))
        if state.removed and not self._removal_told:
            self._removal_told = True
            self._tell(
                LogEvent.IMAGE_REMOVED,
                consequence="its data is lost when the VM ends; copy it from the guest",
            )
        self._look_at_room(state)

    def _look_at_room(self, state: ImageState) -> None:
        """Stop the VM while there is still room, once; and again when half of that is gone."""
        options = self._device.options
        may_grow = not options.readonly and state.allocated < options.size
        if state.free is None or not may_grow or state.free >= FREE_SIZE_MIN:
            self._stopped_below = None
            return
        if self._stopped_below is not None and state.free > self._stopped_below // 2:
            return
        self._stopped_below = state.free
        left = format_size(state.free)
        self._tell(LogEvent.IMAGE_NO_SPACE, free=state.free, consequence="the VM is stopped")
        self._stop_vm(f"{options.id}: {options.file} may grow, and its file system has {left} left")

    def _tell(self, event: LogEvent, **fields: object) -> None:
        options = self._device.options
        self._journal.log.error(event, device=options.id, file=options.file, **fields)
        self._journal.publish(event, {"device": options.id, "file": options.file, **fields})

    async def _cool(self, image: _native.Image, opened: OpenImage) -> None:
        """Drop the cache of an image that nobody has used for a while."""
        period_s, pid = self._policy.cold_cache_s, self._peer_pid
        if not period_s or pid is None or trio.current_time() < self._cold_s + period_s:
            return
        self._cold_s = trio.current_time()
        used = await self._in_thread(lambda: referenced_size(opened.identity, pid))
        if used == 0 and self._device.image.cached and self._device.failure is None:
            with suppress(Refused):  # it has failed then, which is told and kept already
                await self.drop_cache()
        await self._in_thread(lambda: mark_cold(opened.identity, pid))
