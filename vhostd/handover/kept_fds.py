"""What a predecessor had kept, as it came from the service manager, sorted out by VM and role.

Knows bundles and the names of the release before, which stored each descriptor by itself. Must not
know what a descriptor is for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from vhostd.fds import OwnedFd
from vhostd.handover.bundle import BundleVersionUnknown, Entry, Manifest, peek, read_manifest
from vhostd.handover.state_memfd import StateDamaged
from vhostd.log import LogEvent, get_logger


class Forgetting(Protocol):
    """Where descriptors are kept."""

    def forget(self, vm: str, names: list[str]) -> None:
        """Have these of a VM kept no longer."""


@dataclass(slots=True)
class KeptVm:
    """Of one VM.

    Attributes:
        bundle_name, bundle, number: its bundle; None: the release before had no bundles.
        entries: what is kept, by role.
        apart: descriptors that are not in the bundle, by role.
        taken: roles of those that somebody has by now.
    """

    name: str
    bundle_name: str | None = None
    bundle: OwnedFd | None = None
    number: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)
    apart: dict[str, OwnedFd] = field(default_factory=dict)
    inside: dict[str, OwnedFd] | None = None
    taken: set[str] = field(default_factory=set)

    def take(self, role: str) -> OwnedFd | None:
        """A descriptor, once. Raises OSError: there is no room for the bundle's."""
        entry = self.entries.get(role)
        if entry is None or role in self.taken:
            return None
        fds = self.apart if entry.stored else self._unpacked()
        fd = fds.pop(role, None)
        if fd is not None:
            self.taken.add(role)
        return fd

    def _unpacked(self) -> dict[str, OwnedFd]:
        if self.inside is None:
            assert self.bundle is not None, "an entry is in it"
            manifest, fds = peek(self.bundle.fileno())
            roles = [entry.role for entry in manifest.entries if not entry.stored]
            self.inside = dict(zip(roles, fds, strict=True))
        return self.inside

    def close(self) -> list[str]:
        """Close what nobody took; the roles of those."""
        left = [role for role in self.entries if role not in self.taken]
        for fds in (self.apart, self.inside or {}):
            for fd in fds.values():
                fd.close()
            fds.clear()
        self.inside = {}
        if self.bundle is not None:
            self.bundle.close()
        return left


class KeptFds:
    """What a predecessor had kept, by VM, device and role; each can be taken once.

    Attributes:
        stored_names: all names in the manager's store.
        unknown: VMs of which another release left a bundle that can't be read, and why.
    """

    def __init__(self, passed: Mapping[str, list[OwnedFd]]) -> None:
        """passed: descriptors by the names they have in the store, ours from here on."""
        self.stored_names = set(passed)
        self._vms: dict[str, KeptVm] = {}
        self._unclaimed: dict[str, OwnedFd] = {}
        self.unknown: dict[str, str] = {}
        self._damaged = False
        by_name: dict[str, OwnedFd] = {}
        for name, fds in passed.items():
            for fd in fds[1:]:
                fd.close()  # never two of a name
            by_name[name] = fds[0]
        for name in sorted(by_name):
            if "/" in name:
                self._add_old(name, by_name[name])
        for name, manifest in self._manifests(by_name).items():
            self._add_bundle(name, manifest, by_name)
        claimed = {id(fd) for vm in self._vms.values() for fd in (vm.bundle, *vm.apart.values())}
        self._unclaimed = {name: fd for name, fd in by_name.items() if id(fd) not in claimed}

    def _manifests(self, by_name: Mapping[str, OwnedFd]) -> dict[str, Manifest]:
        """Of each VM's newest bundle, by the name that has in the store."""
        newest: dict[str, tuple[str, Manifest]] = {}
        for name, fd in by_name.items():
            if not name.startswith("b") or "/" in name:
                continue
            try:
                manifest = read_manifest(fd.fileno())
            except BundleVersionUnknown as error:
                self.unknown[error.vm] = str(error)
                continue
            except (StateDamaged, OSError) as error:
                self._damaged = True
                get_logger().error(
                    LogEvent.HOST_ERROR,
                    error=f"stored descriptor {name}: {error}",
                    consequence="all that is stored and has no owner stays as it is",
                )
                continue
            other = newest.get(manifest.vm)
            if other is None or other[1].number < manifest.number:
                newest[manifest.vm] = name, manifest
        return dict(newest.values())

    def _add_bundle(self, name: str, manifest: Manifest, by_name: Mapping[str, OwnedFd]) -> None:
        vm = self._vms[manifest.vm] = KeptVm(manifest.vm, name, by_name[name], manifest.number)
        vm.entries = {entry.role: entry for entry in manifest.entries}
        vm.apart = {
            entry.role: by_name[entry.stored]
            for entry in manifest.entries
            if entry.stored in by_name
        }

    def _add_old(self, stored: str, fd: OwnedFd) -> None:
        name, generation = _old_name(stored)
        vm_name, _, role = name.partition("/")
        vm = self._vms.setdefault(vm_name, KeptVm(vm_name))
        known = vm.entries.get(role)
        if known is None or _old_name(known.stored)[1] < generation:
            vm.entries[role] = Entry(role, "", stored)
            vm.apart[role] = fd

    def of_vms(self) -> list[KeptVm]:
        """All of it."""
        return list(self._vms.values())

    def unclaimed(self) -> Iterator[str]:
        """Names of what is nobody's any more: a predecessor died while it replaced something.

        They are closed. Where a bundle can't be read nothing is: it may be that one's.
        """
        if self._damaged or self.unknown:
            return
        for name, fd in self._unclaimed.items():
            fd.close()
            yield name
        self._unclaimed.clear()

    def take(self, name: str) -> OwnedFd | None:
        """The descriptor of this name, or None.

        Raises:
            OSError: there is no room for what is kept of its VM.
        """
        vm, _, role = name.partition("/")
        return None if vm not in self._vms else self._vms[vm].take(role)

    def vms(self) -> set[str]:
        """The VMs of which there is anything."""
        return set(self._vms)

    def names(self, prefix: str) -> list[str]:
        """Those that begin with it, taken or not."""
        vm = self._vms.get(prefix.partition("/")[0])
        names = [] if vm is None else [f"{vm.name}/{role}" for role in vm.entries]
        return [name for name in names if name.startswith(prefix)]

    def borrow(self, vm_name: str, role: str) -> list[int]:
        """Descriptors that all devices of a VM have of this role, outside its bundle; not taken."""
        vm = self._vms.get(vm_name)
        apart = {} if vm is None else vm.apart
        return [fd.fileno() for name, fd in apart.items() if name.rpartition("/")[2] == role]

    def drop(self, vm_name: str) -> None:
        """Close what nobody took of a VM; it goes on being kept."""
        if (vm := self._vms.get(vm_name)) is not None:
            vm.close()

    def let_go(self, vm_name: str, store: Forgetting) -> None:
        """Close what nobody took of a VM, and have it kept no longer."""
        vm = self._vms.pop(vm_name, None)
        if vm is not None:
            store.forget(vm_name, [f"{vm_name}/{role}" for role in vm.close()])


def _old_name(stored: str) -> tuple[str, int]:
    """The release before stored "vm/device/role", and "vm/device/role~2" the third time."""
    name, _, generation = stored.rpartition("~")
    return (name, int(generation)) if name and generation.isdigit() else (stored, 0)
