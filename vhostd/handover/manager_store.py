"""The service manager's store: sd_notify(3), "FDSTORE=1". One mechanism for systemd and our keeper.

Of each VM the manager has one bundle, which says what is kept of it, and those descriptors that
can't be in a bundle. Each change is one datagram that stores the new, then others that remove the
old, so that a successor finds the one or the other. Must not know what a descriptor is for.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import msgspec

from vhostd import systemd
from vhostd.fds import OwnedFd
from vhostd.handover import kept_config
from vhostd.handover.bundle import VERSION, Entry, Manifest, pack, peek
from vhostd.handover.fd_store import NoStore
from vhostd.handover.kept_fds import KeptFds, KeptVm
from vhostd.handover.state_memfd import StateDamaged
from vhostd.handover.stored import NAME_LENGTH_MAX, Names, Stored, identity_of, may_be_bundled
from vhostd.handover.unit import ask_store_max
from vhostd.log import LogEvent, get_logger

AVAILABLE: Final = "FDSTORE"
"""How many descriptors are kept: said by systemd 254 and later, and by our keeper."""

AVAILABLE_BY_UNIT: Final = "VHOSTD_FDSTORE"
"""The same, said by a unit for an older systemd. Not under the other name: a unit's word counts for
more than systemd's own, and a changed FileDescriptorStoreMax= would not be seen."""

SEND_TIMEOUT_S: Final = 1.0
"""A manager that takes in nothing for so long is not waited for any more."""

NAMES_LENGTH_MAX: Final = 131072 - len("LISTEN_FDNAMES=") - 1
"""MAX_ARG_STRLEN, execve(2): with longer names no manager could start a successor."""

UNDER_WAY: Final = 3
"""The configuration; and of a VM, while something new is stored and the old is not removed yet."""

_ROOM: Final = "room"
"""In place of a role."""

_GONE: Final = "the service manager keeps nothing any more: see the log"

_OUR_LIMITS: Final = (errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM)
"""Of sendmsg(2): the manager is well, and what comes later may pass."""


class ManagerStore:
    """The service manager's store. A manager that fails us is told of once, and left alone."""

    def __init__(self, channel: socket.socket, room: int) -> None:
        """Nothing is stored yet.

        Args:
            channel: of systemd.connect(), ours from here on.
            room: how many descriptors the manager takes.
        """
        self._channel: socket.socket | None = channel
        self._room = min(room, NAMES_LENGTH_MAX // (NAME_LENGTH_MAX + 1))
        self._vms: dict[str, Stored] = {}
        self._rooms: dict[str, int] = {}
        self._set_aside = 0
        self._failed: dict[str, dict[str, str]] = {}
        self._names = Names()
        self._left: set[str] = set()
        self._on_failure: Callable[[str, str], None] = lambda vm, why: None

    @property
    def working(self) -> bool:
        """It took all that was sent."""
        return self._channel is not None

    # -- room ----------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Descriptors it takes."""
        return self._room

    @property
    def set_aside(self) -> int:
        """Descriptors that are stored, or for which there is room."""
        return self._set_aside

    def _set_room_aside(self, vm: str, room: int) -> None:
        self._set_aside += room - self._rooms.pop(vm, 0)
        if room:
            self._rooms[vm] = room

    def admit(self, vm: str, need: int) -> str | None:
        """Set room aside for a VM; why there is none, or None.

        One that is stored already is admitted in any case: it takes up its room.
        """
        stored = self._vms.get(vm)
        if stored is not None:
            self._gather(vm, stored)
        self._set_room_aside(vm, max(need, 0 if stored is None else stored.count))
        missing = self.set_aside + UNDER_WAY - self._room
        if missing <= 0:
            self._mend(vm, [_ROOM])
            return None
        why = (
            f"the store of descriptors has room for {self._room}, and {need} more for this VM are"
            f" {missing} too many: raise FileDescriptorStoreMax= of the unit to"
            f" {self.set_aside + UNDER_WAY} or more"
        )
        if stored is not None:
            self._fail(vm, _ROOM, why)
            return None
        self._set_room_aside(vm, 0)
        return why

    def not_kept(self, vm: str) -> str | None:
        """Why a successor could not take this VM over; None: it could."""
        if self._channel is None:
            return _GONE
        return next(iter(self._failed.get(vm, {}).values()), None)

    def tell_failures(self, listener: Callable[[str, str], None]) -> None:
        self._on_failure = listener

    def _fail(self, vm: str, role: str, why: str) -> None:
        of_vm = self._failed.setdefault(vm, {})
        if not of_vm:
            get_logger(vm=vm).error(
                LogEvent.NOT_KEPT, error=why, consequence="a successor can't take this VM over"
            )
            self._on_failure(vm, why)
        of_vm[role] = why

    def _mend(self, vm: str, roles: Iterable[str]) -> None:
        of_vm = self._failed.get(vm, {})
        for role in roles:
            of_vm.pop(role, None)

    # -- what is kept --------------------------------------------------------------------------

    def keep(self, name: str, fd: int, *, apart: bool = False) -> None:
        self.keep_all({name: fd}, apart=apart)

    def keep_all(self, fds: Mapping[str, int], *, apart: bool = False) -> None:
        vm = next(iter(fds)).partition("/")[0]
        if self._channel is None or vm in self._left:
            return
        stored = self._vms.setdefault(vm, Stored())
        before = stored.entries
        new: dict[str, Entry] = {}
        try:
            for name, fd in fds.items():
                role, identity = name.partition("/")[2], identity_of(fd)
                if role in before and before[role].identity == identity:
                    continue  # the manager would go on with the name it has, and not take another
                # First the new one, so that a successor never finds none. Hung up or not, it is for
                # us to say when it is needed no more.
                new[role] = Entry(role, identity, self._names.give("a") if apart else "")
                if apart:
                    self._tell(systemd.store_fds, new[role].stored, [fd], poll=False)
            if not new:
                return
            inside = {} if apart else {role: fds[f"{vm}/{role}"] for role in new}
            self._replace(vm, stored, {**before, **new}, inside)
        except (OSError, StateDamaged) as error:
            for role, entry in new.items():
                self._remove(entry.stored)  # if it was stored
                self._fail(vm, role, f"{role} can't be kept: {_reason(error)}")
            return
        self._mend(vm, new)
        for role in new.keys() & before.keys():
            self._remove(before[role].stored)

    def forget(self, vm: str, names: Sequence[str]) -> None:
        stored = self._vms.get(vm)
        if stored is None or self._channel is None or vm in self._left:
            return
        roles = {name.partition("/")[2] for name in names}
        gone = [entry for role, entry in stored.entries.items() if role in roles]
        if not gone:
            self._mend(vm, roles)
            return
        left = {role: entry for role, entry in stored.entries.items() if role not in roles}
        try:
            self._replace(vm, stored, left, {})
        except (OSError, StateDamaged) as error:
            self._fail(vm, gone[0].role, f"{gone[0].role} stays kept: {_reason(error)}")
            return
        self._mend(vm, roles)
        for entry in gone:
            self._remove(entry.stored)

    def keep_config(self, fd: int) -> None:
        try:
            self._tell(systemd.forget_fds, kept_config.NAME)
            self._tell(systemd.store_fds, kept_config.NAME, [fd], poll=False)
        except OSError as error:
            get_logger().error(
                LogEvent.HOST_ERROR,
                error=f"the configuration can't be kept: {_reason(error)}",
                consequence="if its file is broken when vhostd starts again, no VM is served",
            )

    def leave_vm(self, vm: str) -> None:
        self._left.add(vm)

    def clear_vm(self, vm: str) -> None:
        self._left.discard(vm)
        stored = self._vms.pop(vm, None)
        if stored is None:
            return
        # The bundle first: without it a successor takes the rest for left over.
        for name in (stored.name, *(entry.stored for entry in stored.entries.values())):
            self._remove(name)
        if stored.bundle is not None:
            stored.bundle.close()

    def _replace(
        self, vm: str, stored: Stored, entries: dict[str, Entry], new: Mapping[str, int]
    ) -> None:
        """Have another bundle kept.

        Args:
            new: descriptors of what is not in the present one.

        Raises:
            OSError: there can't be one; nothing changed.
        """
        held: list[OwnedFd] = [] if stored.bundle is None else peek(stored.bundle.fileno())[1]
        try:
            by_role = dict(zip(stored.inside(), (fd.fileno() for fd in held), strict=True))
            by_role.update(new)
            inside = [by_role[role] for role, entry in entries.items() if not entry.stored]
            number = stored.number + 1
            bundle = pack(Manifest(VERSION, vm, number, list(entries.values())), inside)
        finally:
            for fd in held:
                fd.close()
        name = self._names.give("b")
        try:
            self._tell(systemd.store_fds, name, [bundle.fileno()], poll=False)
        except OSError:
            bundle.close()
            raise
        old_name, old_bundle = stored.name, stored.bundle
        stored.name, stored.bundle = name, bundle
        stored.number, stored.entries = number, entries
        if old_bundle is not None:
            self._remove(old_name)
            old_bundle.close()

    def _gather(self, vm: str, stored: Stored) -> None:
        """Put into a bundle what the release before stored each by itself."""
        if not stored.loose or vm in self._left:
            return
        inside = {
            role: fd.fileno() for role, fd in stored.loose.items() if may_be_bundled(fd.fileno())
        }
        stored.loose = {}
        if not inside or sum(each.count for each in self._vms.values()) >= self._room:
            return
        before = stored.entries
        entries = {
            role: msgspec.structs.replace(entry, stored="") if role in inside else entry
            for role, entry in before.items()
        }
        try:
            self._replace(vm, stored, entries, inside)
        except (OSError, StateDamaged):
            return  # it is kept as it was
        for role in inside:
            self._remove(before[role].stored)

    # -- a predecessor's -----------------------------------------------------------------------

    def adopt(self, kept: KeptFds) -> None:
        self._names.begin_after(kept.stored_names)
        for name in kept.unclaimed():
            self._remove(name)
        for vm in kept.of_vms():
            stored = self._vms[vm.name] = self._adopted(vm)
            self._set_room_aside(vm.name, stored.count)

    def _adopted(self, vm: KeptVm) -> Stored:
        entries = {
            role: Entry(role, entry.identity or identity_of(vm.apart[role].fileno()), entry.stored)
            for role, entry in vm.entries.items()
        }
        bundle = None
        if vm.bundle is not None:
            try:
                bundle = OwnedFd(os.dup(vm.bundle.fileno()))
            except OSError:
                self._left.add(vm.name)  # what is in it can't be had either
        loose = vm.apart if vm.bundle_name is None else {}
        return Stored(vm.bundle_name or "", bundle, vm.number, entries, loose)

    # -- the manager ---------------------------------------------------------------------------

    def _remove(self, name: str) -> None:
        if not name:
            return
        try:
            self._tell(systemd.forget_fds, name)
        except OSError:
            return  # a successor removes what is nobody's
        self._names.take_back(name)  # the manager does what we say in order

    def leave(self) -> None:
        """Change nothing any more: what comes now is only our own end."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _tell(self, how: Callable[..., None], *arguments: object, **more: object) -> None:
        if self._channel is None:
            return
        try:
            how(self._channel, *arguments, **more)
        except OSError as error:
            if error.errno in _OUR_LIMITS:
                raise
            self.lose(str(error))

    def lose(self, why: str) -> None:
        if self._channel is None:
            return
        self.leave()
        get_logger().error(
            LogEvent.NO_FD_STORE,
            error=why,
            consequence="guests are served, but a successor can't take these VMs over",
            remedy="end the VMs or migrate them away, then start vhostd anew",
        )
        for vm in self._rooms:
            self._on_failure(vm, _GONE)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def open_store(environment: Mapping[str, str] = os.environ) -> NoStore | ManagerStore:
    """The service manager's store, if it says that it has one.

    It is not tried: what lies in the queue of a manager that does not read pins a guest's memory
    and an image's lock long after the VM has gone.
    """
    room = _number(environment.get(AVAILABLE, ""))
    if room == 0 and AVAILABLE not in environment:
        by_unit = _number(environment.get(AVAILABLE_BY_UNIT, ""))
        asked = ask_store_max() if by_unit else None
        room = by_unit if asked is None else asked
    if room == 0:
        return NoStore()
    try:
        channel = systemd.connect(environment, SEND_TIMEOUT_S)
    except OSError as error:
        get_logger().error(LogEvent.NO_FD_STORE, error=f"service manager: {error.strerror}")
        channel = None
    return NoStore() if channel is None else ManagerStore(channel, room)


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0
