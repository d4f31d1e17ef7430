"""How many files this process may have open, and which VMs that is enough for.

A process without free descriptors can't accept, map or answer for any VM. So each VM has its number
set aside: what it needs without a VMM before it is served, the rest before its VMM is. Must not
know what a VM's files are for.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Final

from vhostd.config import VmConfig
from vhostd.errors import PauseVm
from vhostd.log import LogEvent, get_logger
from vhostd.pause import Pause

RESERVE: Final = 96
"""Files of the process itself: logs, control clients, metrics, threads at work, the event loop."""

OF_VM: Final = 8
"""Its record, its worker's and its monitor's connection."""

OF_IDLE_DEVICE: Final = 1
"""Its listening socket."""

IDLE_SHARE: Final = 0.75
"""Of what there is, for VMs without a VMM: the rest is for VMMs that connect."""

OF_BALLOON: Final = 24
OF_MEM: Final = 14
OF_PMEM: Final = 18
"""Once the VMM is there: its connection, the channel, queues' eventfds, shared memory, the image,
memory files and what is known of them."""


def raise_limit() -> int:
    """Let this process have as many open files as it may at all; how many (RLIMIT_NOFILE)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def idle_need(vm: VmConfig) -> int:
    """Files that a VM has open while no VMM is connected."""
    return OF_VM + OF_IDLE_DEVICE * len(vm.device_names)


def need(vm: VmConfig) -> int:
    """Files that an ordinary VM has open at most, once its VMM has connected all devices."""
    balloon = 0 if vm.balloon is None else OF_BALLOON
    return idle_need(vm) + balloon + OF_MEM * len(vm.mems) + OF_PMEM * len(vm.pmems)


class OpenFiles:
    """What is set aside of this process' limit.

    Attributes:
        without_room: the VMs that can't be served at all, and why.
    """

    def __init__(self, limit: int, vms: Sequence[VmConfig]) -> None:
        """Set aside what VMs need without a VMM, those that come first being served.

        One log line says so where the limit is not enough for all of them and their VMMs.
        """
        self._left = limit - RESERVE
        wanted = RESERVE + sum(map(need, vms))
        self._why = Pause(
            f"open files: this process may have {limit}, and all VMs together need {wanted}",
            f"raise LimitNOFILE= of the unit, or the hard limit (ulimit -Hn), to {wanted} or more,"
            " and restart vhostd",
        )
        self.without_room: dict[str, Pause] = {}
        for_vmms = self._left * (1 - IDLE_SHARE)
        for vm in vms:
            if idle_need(vm) > self._left - for_vmms:
                self.without_room[vm.name] = self._why
            else:
                self._left -= idle_need(vm)
        if wanted > limit:
            get_logger().error(
                LogEvent.HOST_ERROR,
                error=self._why.reason,
                consequence=f"{len(self.without_room)} VMs are paused; others will be when their"
                " VMMs connect and no files are left",
                remedy=self._why.remedy,
            )

    def of(self, vm: VmConfig) -> VmFiles:
        """What is set aside for a VM's VMM."""
        return VmFiles(self, need(vm) - idle_need(vm))

    def take(self, count: int, *, open_already: bool) -> None:
        """Set some aside. Raises PauseVm: so many are not left."""
        if count > self._left and not open_already:
            raise PauseVm(self._why.reason, self._why.remedy)
        self._left -= count

    def give_back(self, count: int) -> None:
        """They are not needed any more."""
        self._left += count


class VmFiles:
    """What is set aside for one VM as long as its VMM is connected to any device."""

    def __init__(self, pool: OpenFiles | None = None, count: int = 0) -> None:
        """pool: None: there is no limit."""
        self._pool = pool
        self._count = count
        self._connections = 0

    def enter(self, *, resumed: bool = False) -> None:
        """A device gets a VMM. resumed: a predecessor's, whose files are open already.

        Raises:
            PauseVm: there are not enough for this VM.
        """
        if self._pool is not None and self._connections == 0:
            self._pool.take(self._count, open_already=resumed)
        self._connections += 1

    def leave(self) -> None:
        """A device's VMM has gone."""
        self._connections -= 1
        if self._pool is not None and self._connections == 0:
            self._pool.give_back(self._count)
