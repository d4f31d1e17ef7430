"""Features of one VM that cancel each other: the one table that says what becomes of them.

A pair is refused, or reconciled: then `check-config` says what is done instead. Must not read a
file, nor know what else a configuration holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from vhostd.config_devices import BalloonConfig, MemConfig, PmemConfig


class VmLike(Protocol):
    """The part of config.VmConfig that is looked at."""

    @property
    def qmp(self) -> Path | None:
        """Path of the VMM's QMP socket."""

    @property
    def balloon(self) -> BalloonConfig | None:
        """Its balloon."""

    @property
    def mems(self) -> Sequence[MemConfig]:
        """Its virtio-mem devices."""

    @property
    def pmems(self) -> Sequence[PmemConfig]:
        """Its disks."""


@dataclass(frozen=True, slots=True)
class FoundPair:
    """One pair in one VM; refused: it is a mistake."""

    text: str
    refused: bool


@dataclass(frozen=True, slots=True)
class Pair:
    """Two features.

    Attributes:
        where: the devices of a VM that have both, by id; "balloon" for the balloon.
        says: what they are and what becomes of them.
    """

    where: Callable[[VmLike], Iterable[str]]
    says: str
    refused: bool = False


def _stops_without_monitor(vm: VmLike) -> Iterator[str]:
    return (mem.id for mem in vm.mems if mem.on_violation == "stop" and vm.qmp is None)


def _reports_what_is_preallocated(vm: VmLike) -> Iterator[str]:
    reports = vm.balloon is not None and vm.balloon.free_page_reporting
    return (mem.id for mem in vm.mems if mem.prealloc and reports)


def _reports_without_poison(vm: VmLike) -> Iterator[str]:
    balloon = vm.balloon
    if balloon is not None and balloon.free_page_reporting and not balloon.page_poison:
        yield "balloon"


def _read_only_with_writeback(vm: VmLike) -> Iterator[str]:
    default = PmemConfig.__dataclass_fields__["writeback_limit"].default
    return (pmem.id for pmem in vm.pmems if pmem.readonly and pmem.writeback_limit != default)


PAIRS: Final = (
    Pair(
        _stops_without_monitor,
        'on_violation = "stop" needs qmp in the table of the VM, to stop it',
        refused=True,
    ),
    Pair(
        _reports_what_is_preallocated,
        "prealloc and the balloon's free_page_reporting: memory of this device that the guest"
        " reports free is not given back, so that it stays allocated",
    ),
    Pair(
        _reports_without_poison,
        "free_page_reporting without page_poison: a guest that fills free pages with a pattern"
        " (page_poison=1, init_on_free=1) reports nothing",
    ),
    Pair(
        _read_only_with_writeback,
        "readonly and writeback_limit: nothing is ever written to the image, so that the limit has"
        " no effect",
    ),
)


def found_pairs(vm: VmLike) -> list[FoundPair]:
    """The pairs a VM has."""
    return [
        FoundPair(f"{device}: {pair.says}", pair.refused)
        for pair in PAIRS
        for device in pair.where(vm)
    ]
