"""What a predecessor left of all VMs, sorted out before any of them is served.

Knows the fd store and state memfds. Must not know how a VM goes on from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vhostd.backend.keeping import VmKeeping
from vhostd.backend.lasting import Lasting
from vhostd.backend.left import VmLeft, read_left
from vhostd.config import VmConfig
from vhostd.fds import OwnedFd
from vhostd.handover.fd_store import FdStore, NoStore, need
from vhostd.handover.kept_fds import KeptFds
from vhostd.handover.manager_store import open_store
from vhostd.handover.state_dir import StateDir
from vhostd.handover.state_memfd import StateDamaged, StateMemfd, StateVersionUnknown
from vhostd.log import LogEvent, get_logger
from vhostd.transport.listener import Listener

EVENTS_LOST_MAX: Final = 100_000
"""Events a predecessor may have published after it last recorded a number."""

LEFT_ALONE: Final = (
    "its guest runs on without its devices; start the release that left it, or restart the VM and"
    " then vhostd"
)


@dataclass(slots=True)
class Legacy:
    """Everything that was kept, by VM; keepings and lefts are those of VMs that are taken over.

    Attributes:
        store: where descriptors of this process go.
        paused: VMs that are left alone, because their state is not to be trusted, and why.
        state_dir: what outlives the host, too.
        last_event: the event stream goes on after it.
    """

    store: FdStore = field(default_factory=NoStore)
    kept: KeptFds = field(default_factory=lambda: KeptFds({}))
    keepings: dict[str, VmKeeping] = field(default_factory=dict)
    lefts: dict[str, VmLeft] = field(default_factory=dict)
    paused: dict[str, str] = field(default_factory=dict)
    state_dir: StateDir = field(default_factory=lambda: StateDir(None))
    last_event: int = 0

    def keeping(self, vm_name: str) -> VmKeeping:
        """Where a VM's state goes."""
        if vm_name not in self.keepings:
            self.keepings[vm_name] = self._new_keeping(vm_name)
        return self.keepings[vm_name]

    def _new_keeping(self, vm_name: str, memfd: StateMemfd | None = None) -> VmKeeping:
        return VmKeeping(self.store, vm_name, memfd, Lasting(self.state_dir, vm_name))

    def take_over(self, vm_name: str, left: VmLeft, memfd: StateMemfd) -> None:
        """This is what a predecessor left of a VM."""
        keeping = self.keepings[vm_name] = self._new_keeping(vm_name, memfd)
        keeping.begin_with(left.record)
        self.lefts[vm_name] = left
        self.last_event = max(self.last_event, left.record.next_event + EVENTS_LOST_MAX)

    def settle(self, vm_name: str) -> None:
        """Let go of what was kept of a VM without a record: nobody can go on with it."""
        if vm_name not in self.lefts and vm_name not in self.paused:
            self.kept.let_go(vm_name, self.store)

    def admit(self, vm: VmConfig) -> None:
        """Set room in the store aside for a VM, or leave it alone where there is none."""
        why = self.store.admit(vm.name, need(len(vm.device_names), len(vm.pmems)))
        if why is not None:
            self.pause(vm.name, why, "it is not served: its VMM can't connect")

    def pause(self, vm_name: str, why: str, consequence: str = LEFT_ALONE) -> None:
        """Leave a VM alone: nothing of it is recorded, forgotten or closed."""
        self.paused[vm_name] = why
        self.lefts.pop(vm_name, None)
        if (keeping := self.keepings.pop(vm_name, None)) is not None:
            keeping.leave()
        get_logger(vm=vm_name).error(
            LogEvent.NOT_TAKEN_OVER,
            error=why,
            consequence=consequence,
        )

    def listener(self, vm: VmConfig, device: str, path: Path) -> Listener:
        """A device's socket: the predecessor's, or a new one.

        Raises:
            ConfigError: it can't be made.
        """
        kept = self.kept.take(f"{vm.name}/{device}/listen")
        adopted = None if kept is None else Listener.adopt(kept, path)
        return Listener.bind(path) if adopted is None else adopted

    def leave(self) -> None:
        """From now on nothing is recorded or forgotten: what comes is only our own end."""
        self.store.leave()
        for keeping in self.keepings.values():
            keeping.leave()


def inherit(
    vms: list[VmConfig], state_dir: StateDir, passed: Mapping[str, list[OwnedFd]]
) -> Legacy:
    """Take over what the service manager passed.

    Args:
        passed: descriptors by name, ours from here on.
        vms: those of the configuration; what was kept of others stays where it is.
        state_dir: what outlives the host, too.

    Raises:
        ConfigError: what it passed contradicts itself.
    """
    kept = KeptFds(passed)
    legacy = Legacy(open_store(), kept, state_dir=state_dir)
    legacy.store.adopt(kept)
    for vm in vms:
        try:
            found = read_left(vm.name, kept)
        except (StateDamaged, StateVersionUnknown, OSError) as error:
            legacy.pause(vm.name, str(error))
            continue
        if found is not None:
            legacy.take_over(vm.name, *found)
    for vm in sorted(vms, key=lambda vm: vm.name not in legacy.lefts):  # those are stored already
        if vm.name not in legacy.paused:
            legacy.admit(vm)
    for name in sorted(kept.vms() - {vm.name for vm in vms}):
        get_logger(vm=name).error(
            LogEvent.NOT_TAKEN_OVER,
            error="the configuration has no such VM any more",
            consequence="its guest runs on without its devices; describe it again and restart",
        )
    return legacy
