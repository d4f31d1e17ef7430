"""What a predecessor left of all VMs, sorted out before any of them is served.

Knows the fd store and state memfds. Must not know how a VM goes on from there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vhostd.backend.keeping import LISTEN, VmKeeping
from vhostd.backend.lasting import Lasting
from vhostd.backend.left import VmLeft, read_left
from vhostd.config import VmConfig
from vhostd.fds import OwnedFd
from vhostd.handover.fd_store import FdStore, NoStore, need
from vhostd.handover.kept_fds import KeptFds
from vhostd.handover.manager_store import open_store
from vhostd.handover.state_dir import StateDir
from vhostd.handover.state_memfd import StateDamaged, StateMemfd, StateVersionUnknown
from vhostd.open_files import OpenFiles, VmFiles, raise_limit
from vhostd.pause import Pause
from vhostd.transport.listener import Listener

EVENTS_LOST_MAX: Final = 100_000
"""Events a predecessor may have published after it last recorded a number."""

CONNECTION: Final = "connection"
"""Role of a VMM's connection."""

OTHER_RELEASE: Final = "start the release that left it, or restart the VM"
NO_ROOM: Final = "its VMM can't connect until the store is larger and vhostd was restarted"
NOT_DESCRIBED: Final = Pause(
    "the configuration does not describe it any more, and its VMM still runs",
    "describe it again and restart vhostd, or end its VMM",
)


@dataclass(slots=True)
class Legacy:
    """Everything that was kept, by VM; keepings and lefts are those of VMs that are taken over.

    Attributes:
        store: where descriptors of this process go.
        paused: VMs that are left alone, because their state is not to be trusted, and why.
        gone: VMs that the configuration does not describe any more, whose VMMs still run.
        state_dir: what outlives the host, too.
        last_event: the event stream goes on after it.
        open_files: what is set aside for VMs; None: there is no limit.
    """

    store: FdStore = field(default_factory=NoStore)
    kept: KeptFds = field(default_factory=lambda: KeptFds({}))
    keepings: dict[str, VmKeeping] = field(default_factory=dict)
    lefts: dict[str, VmLeft] = field(default_factory=dict)
    paused: dict[str, Pause] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    state_dir: StateDir = field(default_factory=lambda: StateDir(None))
    last_event: int = 0
    open_files: OpenFiles | None = None

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
        if vm_name not in self.lefts:
            self.kept.let_go(vm_name, self.store)

    def admit(self, vm: VmConfig) -> None:
        """Set room in the store aside for a VM, or have it paused where there is none."""
        why = self.store.admit(vm.name, need(len(vm.device_names), len(vm.pmems)))
        if why is not None:
            self.paused[vm.name] = Pause(why, NO_ROOM)

    def listener(self, vm: VmConfig, device: str, path: Path) -> Listener:
        """A device's socket: the predecessor's, or a new one.

        Raises:
            ConfigError: it can't be made.
        """
        kept = self.kept.take(f"{vm.name}/{device}/{LISTEN}")
        adopted = None if kept is None else Listener.adopt(kept, path)
        return Listener.bind(path) if adopted is None else adopted

    def files_of(self, vm: VmConfig) -> VmFiles:
        """What of this process' open files is set aside for a VM."""
        return VmFiles() if self.open_files is None else self.open_files.of(vm)

    def leave(self) -> None:
        """From now on nothing is recorded or forgotten: what comes is only our own end."""
        self.store.leave()
        for keeping in self.keepings.values():
            keeping.leave()
            if keeping.lasting is not None:
                keeping.lasting.write_rest()

    # -- VMs that are paused -------------------------------------------------------------------

    def leave_vm(self, vm_name: str) -> None:
        """Nothing of a VM is recorded or forgotten from now on, and no VMM finds its sockets."""
        names = self._names(vm_name, LISTEN)
        for name in names:
            if (file := self.kept.take(name)) is not None:
                Listener.discard(file)
        self.store.forget(vm_name, names)
        self.keeping(vm_name).pause()

    def waiting_vmms(self, vm_name: str) -> list[OwnedFd]:
        """Connections of a VM that was left, each once; what else was kept of it is closed here."""
        keeping = self.keeping(vm_name)
        found = [self.kept.take(name) for name in self._names(vm_name, CONNECTION)]
        self.kept.drop(vm_name)
        connections, keeping.left = keeping.left, []
        return connections + [file for file in found if file is not None]

    def clear_vm(self, vm_name: str) -> None:
        """Nobody goes on with a VM that was left: have nothing of it kept."""
        self.kept.let_go(vm_name, self.store)
        self.store.clear_vm(vm_name)
        self.keepings.pop(vm_name, None)
        self.lefts.pop(vm_name, None)

    def _names(self, vm_name: str, role: str) -> list[str]:
        names = self.kept.names(f"{vm_name}/")
        return [name for name in names if name.rpartition("/")[2] == role]


def inherit(
    vms: list[VmConfig],
    state_dir: StateDir,
    passed: Mapping[str, list[OwnedFd]],
    wrong: Collection[str] = (),
) -> Legacy:
    """Take over what the service manager passed.

    Args:
        passed: descriptors by name, ours from here on.
        vms: those of the configuration; others whose VMMs still run are paused.
        wrong: names of those that the configuration describes wrongly.
        state_dir: what outlives the host, too.
    """
    kept = KeptFds(passed)
    legacy = Legacy(open_store(), kept, state_dir=state_dir)
    legacy.store.adopt(kept)
    legacy.paused = {name: Pause(why, OTHER_RELEASE) for name, why in kept.unknown.items()}
    for vm in vms:
        if vm.name in legacy.paused:
            continue
        try:
            found = read_left(vm.name, kept)
        except (StateDamaged, StateVersionUnknown) as error:
            legacy.paused[vm.name] = Pause(str(error), OTHER_RELEASE)
        except Exception as error:  # noqa: BLE001  # see SupervisedVm: it is this VM's trouble
            legacy.paused[vm.name] = Pause.because(error)
        else:
            if found is not None:
                legacy.take_over(vm.name, *found)
    # Those that are taken over are stored and have their files open already.
    in_order = sorted(vms, key=lambda vm: vm.name not in legacy.lefts)
    legacy.open_files = OpenFiles(raise_limit(), in_order)
    legacy.paused |= legacy.open_files.without_room
    for vm in in_order:
        if vm.name not in legacy.paused:
            legacy.admit(vm)
    for name in sorted((kept.vms() | set(kept.unknown)) - {*wrong, *(vm.name for vm in vms)}):
        legacy.gone.append(name)
        legacy.paused[name] = NOT_DESCRIBED
    return legacy
