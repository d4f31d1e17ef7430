"""A VM's devices as an operator sees them. Reads seats; changes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from vhostd import _native
from vhostd.backend.seat import DeviceSeat

JsonObject = dict[str, Any]

STATES_BY_WEIGHT: Final = ("quarantined", "running", "stopped", "connected", "waiting")
"""A VM is in the first of these that one of its devices is in."""

NO_COUNTERS: Final = _native.BalloonCounters().as_dict()
"""What the counters are while no VMM is connected."""

NO_COUNTS: Final = {
    "messages_refused": 0,
    "chains_refused": 0,
    "config_changes": 0,
    "config_reads": 0,
    "config_writes": 0,
}


def overall_state(seats: Iterable[DeviceSeat]) -> str:
    """One of STATES_BY_WEIGHT."""
    states = {seat.state for seat in seats}
    return next(state for state in STATES_BY_WEIGHT if state in states)


def describe(
    seats: Mapping[str, DeviceSeat], mems: Sequence[str], pmems: Sequence[str]
) -> JsonObject:
    """The part of a VM's status that is its devices' and their connections'."""
    devices = {name: _describe_device(seat) for name, seat in seats.items()}
    return {
        **({"balloon": devices["balloon"]} if "balloon" in devices else {}),
        "mem": [devices[name] for name in mems],
        "pmem": [devices[name] for name in pmems],
        "connections": sum(seat.connections for seat in seats.values()),
        "connections_refused": sum(seat.connections_refused for seat in seats.values()),
        "faults": _faults(seats),
        **_counts(seats),
    }


def _describe_device(seat: DeviceSeat) -> JsonObject:
    connection = seat.connection
    counters = NO_COUNTERS if connection is None else connection.counters()
    status = seat.device.status(counters, time.time())
    status["state"] = seat.state
    status["untold"] = untold = None if connection is None else connection.requests.untold
    if untold is not None and "standing" in status and not status.get("reached", True):
        status["standing"] = untold
    status["queues"] = {} if connection is None else connection.queues()
    return status


def _faults(seats: Mapping[str, DeviceSeat]) -> dict[str, str]:
    """Quarantined rings by index; of other devices than the balloon, by id/index."""
    return {
        str(index) if name == "balloon" else f"{name}/{index}": fault
        for name, seat in seats.items()
        if seat.connection is not None
        for index, fault in seat.connection.faults.items()
    }


def unshared(seats: Mapping[str, DeviceSeat], backends: Sequence[str]) -> str | None:
    """What speaks for guest memory that the VMM does not share, on one line.

    Args:
        backends: those of which the VMM's monitor says so.
    """
    found = [f"memory backends without share=on: {', '.join(backends)}"] if backends else []
    for name, seat in seats.items():
        if seat.connection is None:
            continue
        if (addr := seat.connection.outside) is not None:
            found.append(
                f"{name}: guest address {addr:#x} is in no memory that the VMM shares: memory"
                " without share=on?"
            )
    return "; ".join(found) or None


def _counts(seats: Mapping[str, DeviceSeat]) -> Mapping[str, int]:
    counts = dict(NO_COUNTS)
    for seat in seats.values():
        if seat.connection is not None:
            for name, count in seat.connection.counts().items():
                counts[name] += count
    return counts
