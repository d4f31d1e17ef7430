"""Native threads of one VM that do not come back from what they do, as an operator is told of them.

Must not know what they wait for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from vhostd.backend.journal import Journal
from vhostd.backend.worker import VmWorker
from vhostd.log import LogEvent

STUCK_AFTER_S: Final = 5.0
"""In one round of its loop, which is a few requests of the guest."""

CONSEQUENCE: Final = (
    "its devices stand still, and no other VM's; end its VMM, and restart vhostd where the next"
    " one is not served then"
)


class WorkerWatch:
    """The workers of a VM, and which of them are stuck."""

    def __init__(self, journal: Journal) -> None:
        """None yet."""
        self._journal = journal
        self._workers: list[VmWorker] = []
        self._stuck_s: dict[VmWorker, float] = {}

    @contextmanager
    def watched(self, worker: VmWorker) -> Iterator[None]:
        """Look at this one, too, inside the block."""
        self._workers.append(worker)
        try:
            yield
        finally:
            self._workers.remove(worker)
            self._stuck_s.pop(worker, None)

    def look(self, now_s: float) -> None:
        """Tell what has changed since the last look; now_s: of any clock that goes on."""
        for worker in self._workers:
            since_s = worker.busy_since_s(now_s)
            if since_s is not None and now_s - since_s >= STUCK_AFTER_S:
                if worker not in self._stuck_s:
                    self._journal.log.error(
                        LogEvent.WORKER_STUCK, worker=worker.name, consequence=CONSEQUENCE
                    )
                    self._journal.publish(LogEvent.WORKER_STUCK, {"worker": worker.name})
                self._stuck_s[worker] = now_s - since_s
            elif self._stuck_s.pop(worker, None) is not None:
                self._journal.log.info(LogEvent.WORKER_BACK, worker=worker.name)
                self._journal.publish(LogEvent.WORKER_BACK, {"worker": worker.name})

    @property
    def stuck(self) -> str | None:
        """What is to be said of those that are, on one line; None: nothing."""
        found = [
            f"the native thread {worker.name} has not come back for {stuck_s:.0f} s"
            for worker, stuck_s in self._stuck_s.items()
        ]
        if not found:
            return None
        return "; ".join(found) + ": memory or a descriptor of its VMM does not answer"
