"""What a successor gets: descriptors in the service manager's store, by VM, device and role.

Must not know what a descriptor is for, nor how the manager keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from vhostd.handover.kept_fds import KeptFds

VM_WIDE: Final = "-"
"""In place of a device's id, which never begins with it."""


def need(devices: int, disks: int) -> int:
    """Descriptors in the manager's store that a VM takes up at most.

    Its bundle; of each device the listening socket, the connection and the channel; of a disk its
    image, open twice.
    """
    return 1 + 3 * devices + 2 * disks


class FdStore(Protocol):
    """Where descriptors are kept; a name is "vm/device/role".

    Attributes:
        working: they are, as far as anybody can know.
    """

    @property
    def working(self) -> bool: ...

    def admit(self, vm: str, need: int) -> str | None:
        """Set room aside for a VM; why there is none, or None."""

    def keep(self, name: str, fd: int, *, apart: bool = False) -> None:
        """Have a descriptor kept, in place of what had this name; it stays the caller's.

        apart: it is a socket, or its close may take long.
        """

    def keep_all(self, fds: Mapping[str, int], *, apart: bool = False) -> None:
        """keep() for several descriptors of one VM, by name: quicker than one by one."""

    def forget(self, vm: str, names: Sequence[str]) -> None:
        """Have these of a VM kept no longer."""

    def keep_config(self, fd: int) -> None:
        """Have the configuration kept, in place of the one before; fd stays the caller's."""

    def adopt(self, kept: KeptFds) -> None:
        """This is what a predecessor stored."""

    def not_kept(self, vm: str) -> str | None:
        """Why a successor could not take this VM over; None: it could."""

    def tell_failures(self, listener: Callable[[str, str], None]) -> None:
        """Call the listener with a VM, and why it can't be kept, when that comes to be so."""

    def leave(self) -> None:
        """Change nothing any more: what comes now is only our own end."""

    def lose(self, why: str) -> None:
        """Nothing is kept any more."""

    def leave_vm(self, vm: str) -> None:
        """Change nothing of this VM any more: a successor gets it as it is now."""

    def clear_vm(self, vm: str) -> None:
        """Have nothing of this VM kept, and take changes again: nobody needs what there was."""


class NoStore:
    """Nobody keeps anything: when the process dies, so do its connections."""

    working = False

    def admit(self, vm: str, need: int) -> str | None:
        """There is nothing to fill."""

    def keep(self, name: str, fd: int, *, apart: bool = False) -> None:
        """Not."""

    def keep_all(self, fds: Mapping[str, int], *, apart: bool = False) -> None:
        """Not."""

    def forget(self, vm: str, names: Sequence[str]) -> None:
        """Nothing was kept."""

    def keep_config(self, fd: int) -> None:
        """Not."""

    def adopt(self, kept: KeptFds) -> None:
        """There is none."""

    def not_kept(self, vm: str) -> str | None:
        """That nobody keeps anything."""
        return "nobody keeps its descriptors: run vhostd by its unit, or with --keep"

    def tell_failures(self, listener: Callable[[str, str], None]) -> None:
        """There are none but the one."""

    def leave(self) -> None:
        """Nothing was kept."""

    def lose(self, why: str) -> None:
        """Nothing was kept."""

    def leave_vm(self, vm: str) -> None:
        """Nothing was kept."""

    def clear_vm(self, vm: str) -> None:
        """Nothing was kept."""


class DeviceKeeping:
    """Descriptors of one device, or of a VM as a whole, under its own names."""

    def __init__(self, store: FdStore, vm_name: str, device: str = VM_WIDE) -> None:
        self._store = store
        self._vm_name = vm_name
        self._prefix = f"{vm_name}/{device}/"
        self._roles: set[str] = set()

    def name(self, role: str) -> str:
        """What a role's descriptor is called in the store."""
        return self._prefix + role

    def keep(self, role: str, fd: int, *, apart: bool = False) -> None:
        """Have a descriptor kept, in place of what had this role; see FdStore.keep()."""
        self._roles.add(role)
        self._store.keep(self.name(role), fd, apart=apart)

    def adopt(self, *roles: str) -> None:
        """These are in the store already, from a predecessor."""
        self._roles.update(roles)

    def forget(self, *roles: str) -> None:
        """Have these kept no longer."""
        self._roles.difference_update(roles)
        self._store.forget(self._vm_name, [self.name(role) for role in roles])

    def forget_all(self, *, but: str = "") -> None:
        """Have nothing of it kept any more, except the role `but`."""
        self.forget(*sorted(self._roles - {but}))
