"""What the worker found wrong on one connection, told once each. Must not know what follows."""

from __future__ import annotations

from vhostd import _native
from vhostd.backend.journal import Journal
from vhostd.backend.left import Left
from vhostd.backend.rings import Rings
from vhostd.errors import FrontendError
from vhostd.log import LogEvent


class Faults:
    """One connection's quarantined rings and failed discards.

    Attributes:
        refused: an address of a ring that could not start, in no memory the VMM has given.
    """

    def __init__(
        self, native: _native.Device, rings: Rings, journal: Journal, left: Left | None
    ) -> None:
        """left: what a predecessor left of the connection."""
        self._native = native
        self._rings = rings
        self._journal = journal
        self._told: set[int] = set()
        self.refused = None if left is None else left.record.outside

    def now(self) -> dict[int, str]:
        """Quarantined rings and what was wrong with them."""
        return {
            index: fault.name.lower()
            for index in sorted(self._rings.started)
            if (fault := self._native.ring_statistics(index).fault) is not _native.Fault.NONE
        }

    def on_refusal(self, refusal: Exception) -> None:
        """A message of the VMM was refused."""
        if isinstance(refusal, FrontendError) and refusal.outside is not None:
            self.refused = refusal.outside

    def outside(self, *, live: bool) -> int | None:
        """A guest address that is in no memory the VMM has given.

        A request lies there, or the guest gave it up, or a ring that could not start for that.

        Args:
            live: a ring was started after all.
        """
        if live:
            self.refused = None
        statistics = map(self._native.ring_statistics, sorted(self._rings.started))
        found = (
            *(ring.fault_addr for ring in statistics),
            self.refused,
            self._native.balloon_counters().outside_addr or None,
        )
        return next((addr for addr in found if addr is not None), None)

    def forget_stopped(self) -> None:
        """A ring that starts again may be told of again."""
        self._told &= self._rings.started

    def tell(self) -> None:
        """Tell of rings that were quarantined since."""
        for index, fault in self.now().items():
            if index not in self._told:
                self._told.add(index)
                outside = self._native.ring_statistics(index).fault_addr
                self._journal.guest_caused(
                    (index, "fault"),
                    LogEvent.QUEUE_QUARANTINED,
                    queue=index,
                    fault=fault,
                    **({} if outside is None else {"guest_addr": f"{outside:#x}"}),
                    consequence="the queue stands still until the driver sets it up again",
                )

    def tell_discard_errors(self) -> None:
        """Tell of discards that failed."""
        counters = self._native.balloon_counters().as_dict()
        self._journal.guest_caused(
            "discard",
            LogEvent.DISCARD_FAILED,
            errors=counters["discard_errors"],
            errno=counters["discard_errno"],
            consequence="these pages stay resident on the host",
        )
