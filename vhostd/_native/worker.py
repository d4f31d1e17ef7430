"""The native thread of a VM."""

from __future__ import annotations

from typing import Any

from vhostd._native._core import ffi, lib
from vhostd._native.failure import check


class Worker:
    """One thread, running at once.

    Attributes:
        notify_fd: an eventfd, readable when a device has events or the thread has parked.

    Raises:
        OSError: no thread, memory or descriptor for it.
    """

    def __init__(self, name: str) -> None:
        error = ffi.new("int *")
        self.handle: Any = lib.vhd_worker_create(name.encode(), error)
        if not self.handle:
            check(error[0], "worker thread")
        self.notify_fd: int = lib.vhd_worker_notify_fd(self.handle)

    def park(self) -> None:
        """Ask it to stop between two chains; parked tells when it has."""
        lib.vhd_worker_park(self.handle)

    @property
    def parked(self) -> bool:
        """It stands, and its devices may be changed."""
        return bool(lib.vhd_worker_parked(self.handle))

    def unpark(self) -> None:
        """Let it run again; only when parked."""
        lib.vhd_worker_unpark(self.handle)

    @property
    def rounds(self) -> int:
        """Rounds of its loop so far."""
        rounds: int = lib.vhd_worker_rounds(self.handle)
        return rounds

    @property
    def busy_round(self) -> int:
        """A number of the round it is in; 0 while it waits for events, is parked or syncs."""
        number: int = lib.vhd_worker_busy_round(self.handle)
        return number

    def close(self) -> None:
        """End it and wait for that, one discard at most; no device may be attached."""
        handle, self.handle = self.handle, ffi.NULL
        lib.vhd_worker_destroy(handle)
