"""How many files this process may have open, and which VMs that is enough for.

A process without free descriptors can't accept, map or answer for any VM. So each VM that is served
has its number set aside before. Must not know what a VM's files are for.
"""

from __future__ import annotations

import resource
from collections.abc import Iterable
from typing import Final

from vhostd.config import VmConfig
from vhostd.log import LogEvent, get_logger
from vhostd.pause import Pause

RESERVE: Final = 96
"""Files of the process itself: logs, control clients, metrics, threads at work, the event loop."""

OF_VM: Final = 24
"""Records, the worker's, the monitor's connection; memory files and their bitmaps."""

OF_DEVICE: Final = 7
"""Listening socket, connection, channel with its outbox, shared memory, reply socket, one to
spare."""

OF_QUEUE: Final = 2
"""Kick and call."""

OF_DISK: Final = 4
"""The image twice, its state, one to spare."""

BALLOON_QUEUES: Final = 5


def raise_limit() -> int:
    """Let this process have as many open files as it may at all; how many (RLIMIT_NOFILE)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def need(vm: VmConfig) -> int:
    """Files that an ordinary VM has open at most, once its VMM has connected all devices."""
    others = len(vm.mems) + len(vm.pmems)
    queues = others + (0 if vm.balloon is None else BALLOON_QUEUES)
    devices = len(vm.device_names)
    return OF_VM + OF_DEVICE * devices + OF_QUEUE * queues + OF_DISK * len(vm.pmems)


def without_room(vms: Iterable[VmConfig], limit: int) -> dict[str, Pause]:
    """The VMs that the limit is not enough for, those that come first being served.

    One log line says so of all of them.
    """
    left, wanted = limit - RESERVE, RESERVE
    beyond: list[str] = []
    for vm in vms:
        wanted += need(vm)
        if need(vm) <= left:
            left -= need(vm)
        else:
            beyond.append(vm.name)
    if not beyond:
        return {}
    reason = f"open files: this process may have {limit}, and all VMs together need {wanted}"
    remedy = (
        f"raise LimitNOFILE= of the unit, or the hard limit (ulimit -Hn), to {wanted} or more,"
        " and restart vhostd"
    )
    get_logger().error(
        LogEvent.HOST_ERROR,
        error=reason,
        consequence=f"{len(beyond)} VMs are paused",
        remedy=remedy,
    )
    return {name: Pause(reason, remedy) for name in beyond}
