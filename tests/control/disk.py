"""A disk of a VM without a VMM: the device is real, its image a file of its own.

Its guest and its host do what they do when a test says so. Must not know the control API.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vhostd._native import Image
from vhostd.devices.base import Effects, Refused
from vhostd.devices.pmem import ImageView, Pmem, PmemOptions
from vhostd.devices.pmem_state import Failure
from vhostd.fds import OwnedFd
from vhostd.images.mapped import drop_cache
from vhostd.units import GiB, MiB

COUNTERS = {"flushes": 5, "flush_errors": 1, "malformed": 2, "batches": 3}
QUEUE_COUNTERS = ("kicks", "chains", "used", "calls", "calls_dropped", "faults", "rejected")
SYNCS = {"syncs": 4, "sync_ns": 2_000_000_000, "sync_ns_last": 500_000, "sync_ns_max": 10**9}


class Disk:
    """A virtio-pmem of 64 MiB."""

    def __init__(self, name: str, perform: Callable[[Effects], None], *, running: bool) -> None:
        """perform: what becomes of the device's effects."""
        self.pmem = Pmem(PmemOptions(name, f"/images/{name}.img", 64 * MiB))
        self.running = running
        self._perform = perform
        self._file = OwnedFd(os.memfd_create(name))
        os.ftruncate(self._file.fileno(), 64 * MiB)
        if running:
            self.pmem.on_features(self.pmem.offered_features)
            self.pmem.on_started()
            self.pmem.on_region(None)  # before anybody listened
            self.pmem.image = ImageView(8 * MiB, 4096, 0, 16 * MiB, 100 * GiB)

    def status(self, state: str) -> dict[str, Any]:
        """What the VM's status has of it."""
        counters = COUNTERS | SYNCS if self.running else {}
        queues = {"flush": dict.fromkeys(QUEUE_COUNTERS, 13)} if self.running else {}
        return self.pmem.status(counters, 0) | {
            "state": state,
            "queues": queues,
            "untold": None,
        }

    def flush(self) -> None:
        """Make it durable. Raises Refused."""
        try:
            with self._image() as image:
                image.sync()
        except OSError as error:
            raise self._refused(error) from error

    def drop_cache(self) -> dict[str, Any]:
        """Drop its page cache. Raises Refused."""
        status = os.fstat(self._file.fileno())
        try:
            with self._image() as image:
                dropped = drop_cache(
                    image, self._file.fileno(), (status.st_dev, status.st_ino), None
                )
        except OSError as error:
            raise self._refused(error) from error
        return {
            "device": self.pmem.options.id,
            "cached_before": dropped.cached_before,
            "cached_after": dropped.cached_after,
            "why_not_all": dropped.why_not_all,
        }

    def clear(self) -> None:
        """Forget that it failed."""
        self._perform(self.pmem.on_cleared())

    def break_down(self) -> None:
        """Its storage fails from now on."""
        self._perform(self.pmem.on_failure(Failure(5, "sync: Input/output error", 1000.0)))

    def write(self, size: int) -> None:
        """The guest writes to it."""
        os.pwrite(self._file.fileno(), b"x" * size, 0)

    @contextmanager
    def _image(self) -> Iterator[Image]:
        if not self.running:
            name = self.pmem.options.id
            raise Refused(f"{name}: no VMM is connected, so its image is not open")
        image = Image(self._file.fileno())
        try:
            if self.pmem.failure is not None:
                image.fail(self.pmem.failure.error)
            yield image
        finally:
            image.close()

    def _refused(self, error: OSError) -> Refused:
        return Refused(f"{self.pmem.options.id}: {os.strerror(error.errno or 0)}")
