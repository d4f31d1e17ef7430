"""The rings of one connection: their eventfds, and which native handler runs each.

Performs what the session decided about rings on the native device; the worker must be parked
around every call that says so. Must not know messages or what a device does with a chain.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Final

from vhostd import _native
from vhostd.devices.base import Role
from vhostd.errors import FrontendError, HostError
from vhostd.fds import OwnedFd
from vhostd.protocol.features import VirtioFeature
from vhostd.session.actions import RingPosition, RingSetup, StoppedRing
from vhostd.transport.eventfd import check_call, check_eventfd

HANDLER_OF: Final = {
    Role.INFLATE: _native.Handler.INFLATE,
    Role.DEFLATE: _native.Handler.DEFLATE,
    Role.REPORTING: _native.Handler.REPORT,
    Role.STATISTICS: _native.Handler.CONTROL,
    Role.GUEST_REQUEST: _native.Handler.CONTROL,
    Role.FLUSH: _native.Handler.FLUSH,
    # Its descriptors are free blocks of guest memory, not buffers to read or write.
    Role.FREE_PAGE_HINT: _native.Handler.CONTROL_BLOCKS,
}

CONTROL_HANDLERS: Final = (_native.Handler.CONTROL, _native.Handler.CONTROL_BLOCKS)
"""Their chains are served in Python."""

_RING_FEATURE: Final = {
    VirtioFeature.RING_PACKED: _native.RingFeature.PACKED,
    VirtioFeature.RING_EVENT_IDX: _native.RingFeature.EVENT_IDX,
    VirtioFeature.RING_INDIRECT_DESC: _native.RingFeature.INDIRECT,
    VirtioFeature.IN_ORDER: _native.RingFeature.IN_ORDER,
}


@dataclass(slots=True)
class _Eventfds:
    """What the VMM gave for one ring; the native side borrows them."""

    kick: OwnedFd | None = None
    call: OwnedFd | None = None
    err: OwnedFd | None = None

    def close(self) -> None:
        for file in (self.kick, self.call, self.err):
            if file is not None:
                file.close()


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turn the native side's verdict into a refusal: the VMM's fault, or the host's."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EFAULT):
            raise FrontendError(f"{what}: not a legal ring, or not inside guest memory") from error
        raise HostError(error.errno, f"{what}: {os.strerror(error.errno or 0)}") from error


class Rings:
    """All rings of one device. started holds the indexes the VMM has started."""

    def __init__(self, device: _native.Device, queue_count: int) -> None:
        self._device = device
        self._eventfds = [_Eventfds() for _ in range(queue_count)]
        self._handlers: dict[int, _native.Handler] = {}
        self._setups: dict[int, _native.RingSetup] = {}
        self.started: set[int] = set()

    def close(self) -> None:
        """Close every eventfd; the device is detached."""
        with ExitStack() as release:
            for eventfds in self._eventfds:
                release.callback(eventfds.close)

    def start(self, setup: RingSetup, kick: OwnedFd) -> None:
        """Start a stopped ring; it is served once it has a handler and is enabled. Parked.

        Raises:
            FrontendError: kick is no eventfd, or the parts do not lie in guest memory. The kick
                stays the caller's then.
        """
        check_eventfd(kick, "kick")
        self._handlers[setup.index] = _native.Handler.NONE
        with _refusing(f"ring {setup.index}"):
            self._start_native(setup.index, self._native_setup(setup, kick, setup.position))
        self._eventfds[setup.index].kick = kick
        self.started.add(setup.index)

    def resume(
        self,
        index: int,
        setup: RingSetup | None,
        kick: OwnedFd | None,
        call: OwnedFd | None,
        err: OwnedFd | None,
    ) -> None:
        """Go on with a predecessor's ring. Parked.

        setup: of a started ring, None for another; its position is stale.

        Raises:
            FrontendError, HostError: it can't be; its descriptors are ours all the same.
        """
        self._eventfds[index] = _Eventfds(kick, call, err)
        if setup is None:
            return
        self._handlers[index] = _native.Handler.NONE
        native = self._native_setup(setup, kick, setup.position)
        with _refusing(f"ring {index}"):
            self._device.resume_ring(index, native)
        self._setups[index] = native
        self.started.add(index)

    def restart(self, setup: RingSetup, kick: OwnedFd | None) -> None:
        """Stop a ring and start it where it stood, with other settings. Parked.

        Raises:
            FrontendError, HostError: as start(); the ring goes on as it was then.
        """
        index = setup.index
        eventfds = self._eventfds[index]
        old_setup, old_kick = self._setups[index], eventfds.kick
        if kick is not None:
            check_eventfd(kick, "kick")
        new_kick = kick or old_kick
        assert new_kick is not None, "a started ring has a kick"
        position = self._device.stop_ring(index)
        new_setup = self._native_setup(setup, new_kick, _session_position(position))
        try:
            with _refusing(f"ring {index}"):
                self._start_native(index, new_setup)
        except (FrontendError, HostError):
            self._start_native(index, replace(old_setup, position=position))
            self._device.enable_ring(index, setup.enabled)
            raise
        self._device.enable_ring(index, setup.enabled)
        eventfds.kick = new_kick
        if kick is not None and old_kick is not None:
            old_kick.close()

    def stop(self, index: int) -> StoppedRing:
        """Stop a ring, close its kick and call, say where it stood. Parked."""
        position = self._device.stop_ring(index)
        taken = self._device.ring_statistics(index).taken
        eventfds = self._eventfds[index]
        for file in (eventfds.kick, eventfds.call):
            if file is not None:
                file.close()
        eventfds.kick = eventfds.call = None
        self.started.discard(index)
        self._setups.pop(index, None)
        return StoppedRing(_session_position(position), taken)

    def enable(self, index: int, enabled: bool) -> None:
        """Serve a started ring, or stop serving it. Parked."""
        self._device.enable_ring(index, enabled)

    def set_call(self, index: int, file: OwnedFd | None) -> None:
        """Use another call, an eventfd or a socket. Parked.

        Raises:
            FrontendError: it is neither.
        """
        if file is not None:
            check_call(file, "call")
        self._device.set_call(index, _number(file))
        self._eventfds[index].call = _replaced(self._eventfds[index].call, file)

    def set_err(self, index: int, file: OwnedFd | None) -> None:
        """Use another err eventfd. Parked.

        Raises:
            FrontendError: it is no eventfd.
        """
        if file is not None:
            check_eventfd(file, "err")
        self._device.set_err(index, _number(file))
        self._eventfds[index].err = _replaced(self._eventfds[index].err, file)

    def assign(self, roles: Mapping[int, Role]) -> None:
        """Give every started ring whose role is known its handler. Parked."""
        for index in self.started:
            handler = HANDLER_OF[roles[index]] if index in roles else _native.Handler.NONE
            if self._handlers[index] is not handler:
                self._handlers[index] = handler
                self._device.set_handler(index, handler)

    def _start_native(self, index: int, setup: _native.RingSetup) -> None:
        self._device.start_ring(index, replace(setup, handler=self._handlers[index]))
        self._setups[index] = setup

    def _native_setup(
        self, setup: RingSetup, kick: OwnedFd | None, position: RingPosition
    ) -> _native.RingSetup:
        features = _native.RingFeature(0)
        for virtio, ring in _RING_FEATURE.items():
            if setup.features & virtio:
                features |= ring
        if setup.log_used:
            features |= _native.RingFeature.LOG_USED
        eventfds = self._eventfds[setup.index]
        return _native.RingSetup(
            size=setup.size,
            features=features,
            desc_addr=setup.addresses.desc,
            avail_addr=setup.addresses.avail,
            used_addr=setup.addresses.used,
            log_addr=setup.log_addr,
            position=_native.RingPosition(
                position.next_avail, position.next_used, position.avail_wrap, position.used_wrap
            ),
            handler=_native.Handler.NONE,
            start_number=setup.start_number,
            kick_fd=_number(kick),
            call_fd=_number(eventfds.call),
            err_fd=_number(eventfds.err),
        )


def _session_position(position: _native.RingPosition) -> RingPosition:
    return RingPosition(
        position.next_avail, position.next_used, position.avail_wrap, position.used_wrap
    )


def _replaced(old: OwnedFd | None, new: OwnedFd | None) -> OwnedFd | None:
    if old is not None:
        old.close()
    return new


def _number(file: OwnedFd | None) -> int:
    return -1 if file is None else file.fileno()
