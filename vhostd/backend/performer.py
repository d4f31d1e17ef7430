"""Performs the actions of a session step on the native device, one at a time.

Each action's contract is in vhostd/session/actions.py. Decides nothing: what to do came from the
session, what a device makes of it comes from the device.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial

from vhostd import _native
from vhostd.backend.backend_requests import BackendRequests
from vhostd.backend.effects import EffectPerformer
from vhostd.backend.left import Left
from vhostd.backend.memory_table import DeviceMemory
from vhostd.backend.rings import Rings
from vhostd.backend.storage import Storage
from vhostd.backend.worker import VmWorker
from vhostd.devices.base import Device
from vhostd.errors import FrontendError
from vhostd.fds import OwnedFd
from vhostd.handover.fd_store import DeviceKeeping
from vhostd.protocol.features import ProtocolFeature, VirtioFeature
from vhostd.protocol.wire import Log
from vhostd.session import actions
from vhostd.session.actions import Action, Outcome
from vhostd.session.ring_layout import set_up
from vhostd.session.state import SessionState
from vhostd.transport.backend_channel import BackendChannel


class ActionPerformer:
    """One connection's hands.

    Attributes:
        features: virtio features in force.
        started: back-end requests may be sent, and chains are served.
    """

    def __init__(
        self,
        worker: VmWorker,
        native: _native.Device,
        device: Device,
        memory: DeviceMemory,
        rings: Rings,
        requests: BackendRequests,
        effects: EffectPerformer,
        storage: Storage | None,
        kept: DeviceKeeping,
        connection_fd: int,
    ) -> None:
        self._worker = worker
        self._native = native
        self._device = device
        self._memory = memory
        self._rings = rings
        self._requests = requests
        self._effects = effects
        self._storage = storage
        self._kept = kept
        self._connection_fd = connection_fd
        self._log: _native.Log | None = None
        self._logging = False
        self._obsolete: list[str] = []
        self.features = 0
        self.started = False
        self._by_type: dict[type[Action], Callable[..., Awaitable[Outcome]]] = {
            actions.SetRegions: self._set_regions,
            actions.SetLog: self._set_log,
            actions.SetLogging: self._set_logging,
            actions.StartRing: self._start_ring,
            actions.RestartRing: self._restart_ring,
            actions.StopRing: self._stop_ring,
            actions.EnableRing: self._enable_ring,
            actions.SetRingCall: self._set_ring_call,
            actions.SetRingErr: self._set_ring_err,
            actions.SetBackendChannel: self._set_backend_channel,
            actions.ConfigureConfigSpace: self._configure_config_space,
            actions.GetConfig: self._get_config,
            actions.SetConfig: self._set_config,
            actions.FeaturesSettled: self._features_settled,
            actions.DeviceStarted: self._device_started,
            actions.DeviceStopped: self._device_stopped,
            actions.DriverReset: self._driver_reset,
        }

    async def perform(self, action: Action) -> Outcome:
        """Do it; what it gives is the action's outcome.

        Raises:
            FrontendError, HostError: it can't be done and nothing changed.
        """
        return await self._by_type[type(action)](action)

    async def resume(self, state: SessionState, left: Left) -> None:
        """Go on where a predecessor stopped.

        Raises:
            FrontendError, HostError, OSError: it can't be; close() lets go of what was done.
        """
        # What the guest wrote while nobody listened comes first, then what only we may write.
        config = self._native.read_config()
        self._effects.perform(self._device.on_config_written(config))
        ours = zip(self._device.config(), config, self._device.config_writable, strict=True)
        mixed = bytes(new & ~mask & 0xFF | old & mask for new, old, mask in ours)
        self._native.publish_config(0, mixed)
        channel = left.channel(reply_ack=ProtocolFeature.REPLY_ACK in state.acked)
        if channel is not None:
            self._kept.adopt("channel", "outbox")
            self._requests.use(channel)
        self._native.configure_socket(
            ProtocolFeature.CONFIG in state.acked, ProtocolFeature.REPLY_ACK in state.acked
        )
        await self._memory.resume(state.regions)
        if state.features_settled:
            self.features = state.features
            self._logging = state.has(VirtioFeature.LOG_ALL)
            self._effects.perform(self._device.on_features(state.features))
        if state.log is not None and (file := left.take("log")) is not None:
            log = Log(state.log.size, state.log.file_offset)
            await self._set_log(actions.SetLog(log, file))
        async with self._worker.parked():
            self._resume_rings(state, left)
        self._effects.perform(self._device.on_memory(self._memory.slots))
        if self._storage is not None:
            self._effects.perform(self._storage.on_memory())
        # What the driver was to be told may have been lost; once more does no harm. Of one that
        # stands still too: it goes on after the next start, and reads nothing anew.
        self._requests.want_config_change()
        if state.device_started:
            await self._device_started(actions.DeviceStarted())

    def _resume_rings(self, state: SessionState, left: Left) -> None:
        for index, ring in enumerate(state.rings):
            setup = set_up(state, index, ring) if ring.started else None
            held = {"kick": ring.kick, "call": ring.call, "err": ring.err}
            files = [left.take(f"{role}.{index}") if has else None for role, has in held.items()]
            for role, file in zip(("kick", "call", "err"), files, strict=True):
                if file is not None:
                    self._kept.adopt(f"{role}.{index}")
            self._rings.resume(index, setup, *files)
        self._rings.assign(self._device.roles(self.features, self._rings.started))
        for index, ring in enumerate(state.rings):
            if ring.live and index in self._rings.started:
                self._rings.enable(index, enabled=True)

    def forget_obsolete(self) -> None:
        """Now that this is recorded, a successor needs them no more."""
        self._kept.forget(*self._obsolete)
        self._obsolete.clear()

    def close(self, *, leave: bool) -> None:
        """Let go of everything; the native device is detached. leave: to a successor."""
        with ExitStack() as release:  # all of it, whatever a part of it raises
            if self._log is not None:
                release.callback(self._log.close)
            release.callback(self._memory.release)
            release.callback(self._rings.close)
            release.callback(self._requests.leave if leave else partial(self._requests.use, None))

    # -- memory --------------------------------------------------------------------------------

    async def _set_regions(self, action: actions.SetRegions) -> Outcome:
        identities = await self._memory.replace(action.regions)
        self._effects.perform(self._device.on_memory(self._memory.slots))
        if self._storage is not None:
            self._effects.perform(self._storage.on_memory())
        return identities

    async def _set_log(self, action: actions.SetLog) -> None:
        log = _open_log(action.log, action.file)
        async with self._worker.parked():
            self._native.set_log(log, self._logging)
        old, self._log = self._log, log
        if old is not None:
            old.close()
        self._kept.keep("log", action.file.fileno())
        action.file.close()

    async def _set_logging(self, action: actions.SetLogging) -> None:
        self._logging = action.enabled
        async with self._worker.parked():
            self._native.set_log(self._log, self._logging)

    # -- rings ---------------------------------------------------------------------------------

    async def _start_ring(self, action: actions.StartRing) -> None:
        async with self._worker.parked():
            self._rings.start(action.setup, action.kick)
            self._kept.keep(f"kick.{action.setup.index}", action.kick.fileno())
            self._rings.assign(self._device.roles(self.features, self._rings.started))

    async def _restart_ring(self, action: actions.RestartRing) -> None:
        async with self._worker.parked():
            self._rings.restart(action.setup, action.kick)
        if action.kick is not None:
            self._kept.keep(f"kick.{action.setup.index}", action.kick.fileno())

    async def _stop_ring(self, action: actions.StopRing) -> Outcome:
        async with self._worker.parked():
            stopped = self._rings.stop(action.index)
        self._obsolete += [f"kick.{action.index}", f"call.{action.index}"]
        return stopped

    async def _enable_ring(self, action: actions.EnableRing) -> None:
        async with self._worker.parked():
            self._rings.enable(action.index, action.enabled)

    async def _set_ring_call(self, action: actions.SetRingCall) -> None:
        async with self._worker.parked():
            self._rings.set_call(action.index, action.file)
        self._keep_or_forget(f"call.{action.index}", action.file)

    async def _set_ring_err(self, action: actions.SetRingErr) -> None:
        async with self._worker.parked():
            self._rings.set_err(action.index, action.file)
        self._keep_or_forget(f"err.{action.index}", action.file)

    def _keep_or_forget(self, role: str, file: OwnedFd | None) -> None:
        if file is None:
            self._kept.forget(role)
        else:
            self._kept.keep(role, file.fileno())

    # -- config space and back-end channel -----------------------------------------------------

    async def _set_backend_channel(self, action: actions.SetBackendChannel) -> None:
        if self._requests.uses(action.file):
            # Sent twice, or a predecessor died before it had recorded this message: the channel
            # goes on, in the middle of a request maybe.
            action.file.close()
            return
        channel = BackendChannel.adopt(
            action.file, reply_ack=action.reply_ack, connection_fd=self._connection_fd
        )
        # In this order: what was begun on another channel must not go on here.
        self._kept.keep("outbox", channel.outbox_fd)
        self._kept.keep("channel", channel.fileno(), apart=True)
        self._requests.use(channel)

    async def _configure_config_space(self, action: actions.ConfigureConfigSpace) -> None:
        self._native.configure_socket(action.hot, action.reply_ack)

    async def _get_config(self, action: actions.GetConfig) -> Outcome:
        return self._native.read_config()[action.offset : action.offset + action.size]

    async def _set_config(self, action: actions.SetConfig) -> None:
        old = self._native.read_config()
        new = bytearray(old)
        for at, byte in enumerate(action.content, action.offset):
            mask = 0xFF if action.migration else self._device.config_writable[at]
            new[at] = (old[at] & ~mask) | (byte & mask)
        self._native.publish_config(0, bytes(new))
        self._effects.perform(self._device.on_config_written(bytes(new)))

    # -- the device's life ---------------------------------------------------------------------

    async def _features_settled(self, action: actions.FeaturesSettled) -> None:
        self.features = action.features
        self._effects.perform(self._device.on_features(action.features))

    async def _device_started(self, action: actions.DeviceStarted) -> None:
        del action
        self.started = True
        self._effects.perform(self._device.on_started())
        if self._storage is not None:
            self._storage.on_started()
        self._requests.open()

    async def _device_stopped(self, action: actions.DeviceStopped) -> None:
        del action
        self.started = False
        self._requests.close()
        self._effects.perform(self._device.on_stopped())

    async def _driver_reset(self, action: actions.DriverReset) -> None:
        del action
        async with self._worker.parked():
            self._effects.perform(self._device.on_driver_reset())


def _open_log(window: Log, file: OwnedFd) -> _native.Log:
    """Map the dirty log.

    Raises:
        FrontendError: the file is none that can be mapped, or shorter than the window.
    """
    try:
        return _native.Log(file.fileno(), window.size, window.file_offset)
    except OSError as error:
        reason = os.strerror(error.errno or errno.EINVAL)
        raise FrontendError(f"dirty log: its file cannot be mapped: {reason}") from error
