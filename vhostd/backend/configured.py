"""Devices as the configuration describes them. Knows every key of both sides, and no behaviour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from vhostd.backend.storage import StoragePolicy
from vhostd.config_devices import BalloonConfig, MemConfig, PmemConfig
from vhostd.devices.balloon import Balloon
from vhostd.devices.balloon_features import BalloonOptions
from vhostd.devices.base import Device, GuestRange, Refused
from vhostd.devices.mem import Mem
from vhostd.devices.mem_violations import OnViolation
from vhostd.devices.mem_window import MemOptions
from vhostd.devices.pmem import Pmem, PmemMode, PmemOptions

AnyDevice = TypeVar("AnyDevice", bound=Device)


def balloon_of(config: BalloonConfig, windows: Sequence[GuestRange] = ()) -> Balloon:
    """The balloon a configuration describes, in a VM with these windows."""
    return Balloon(
        BalloonOptions(
            free_page_reporting=config.free_page_reporting,
            free_page_hinting=config.free_page_hinting,
            deflate_on_oom=config.deflate_on_oom,
            page_poison=config.page_poison,
            packed=config.packed,
            in_order=config.in_order,
            stats_interval_s=config.stats_interval_s,
            windows=tuple(windows),
        )
    )


def mem_of(config: MemConfig) -> Mem:
    """The virtio-mem device a configuration describes."""
    return Mem(
        MemOptions(
            id=config.id,
            address=config.window_address,
            size=config.size,
            block_size=config.block_size,
            requested_size=config.requested_size,
            node=config.node,
            host_node=config.host_node,
            prealloc=config.prealloc,
            on_violation=OnViolation(config.on_violation),
            packed=config.packed,
            in_order=config.in_order,
        )
    )


def pmem_of(config: PmemConfig) -> Pmem:
    """The virtio-pmem device a configuration describes."""
    return Pmem(
        PmemOptions(
            id=config.id,
            file=str(config.file),
            size=config.size,
            mode=PmemMode(config.mode),
            window_address=config.window_address,
            readonly=config.readonly,
            packed=config.packed,
            in_order=config.in_order,
        )
    )


def policy_of(config: PmemConfig) -> StoragePolicy:
    """How its image is looked after."""
    return StoragePolicy(
        config.writeback_limit, config.cold_cache_s, sequential=config.readahead == "sequential"
    )


def find(owner: str, kind: str, devices: Mapping[str, AnyDevice], device: str | None) -> AnyDevice:
    """A device by its id, or the only one.

    Raises:
        Refused: there is none of that id, or several to choose from.
    """
    names = ", ".join(devices)
    if device is None:
        if len(devices) == 1:
            return next(iter(devices.values()))
        has = f"several: choose one of {names}" if devices else "none"
        raise Refused(f"which {kind}? {owner} has {has}")
    if device not in devices:
        raise Refused(f"{owner} has no {kind} {device!r}; it has {names or 'none'}")
    return devices[device]
