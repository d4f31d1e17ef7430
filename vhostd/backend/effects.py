"""Performs what a device asks for: completions, config bytes, notifications, news.

Effects are performed at once and in order; none of them waits. Must not know messages.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from vhostd import _native
from vhostd.backend.journal import Journal
from vhostd.backend.notifier import ConfigNotifier
from vhostd.devices import base
from vhostd.devices.balloon import Balloon
from vhostd.devices.base import Effect, Effects


class EffectPerformer:
    """One connection's device side.

    Attributes:
        chains_refused: chains given back unused because their content was wrong.
    """

    def __init__(
        self, native: _native.Device, device: Balloon, notifier: ConfigNotifier, journal: Journal
    ) -> None:
        self._native: Final = native
        self._device: Final = device
        self._notifier = notifier
        self._journal = journal
        self.chains_refused = 0
        self._by_type: dict[type[Effect], Callable[..., None]] = {
            base.Complete: self._complete,
            base.PublishConfig: self._publish_config,
            base.NotifyConfig: self._notify_config,
            base.ConfigureDataPlane: self._configure_data_plane,
            base.ResetDataPlane: self._reset_data_plane,
            base.Log: self._log,
            base.Event: self._event,
        }

    def perform(self, effects: Effects) -> None:
        """Do all of them, in order. ResetDataPlane needs the worker parked."""
        for effect in effects:
            self._by_type[type(effect)](effect)

    def on_guest_memory(self, size: int) -> None:
        """The memory table changed; bytes in all."""
        self.perform(self._device.set_guest_memory(size))

    def refuse_chain(self, chain: base.Chain) -> None:
        """Give a chain back unused."""
        self.chains_refused += 1
        self._complete(base.Complete(chain.queue_index, chain.token))

    def _complete(self, effect: base.Complete) -> None:
        try:
            self._native.complete_chain(effect.queue_index, effect.token, effect.data)
        except OSError as error:
            # The ring stopped meanwhile: the chain comes again at its next start.
            if error.errno != errno.ESTALE:
                raise

    def _publish_config(self, effect: base.PublishConfig) -> None:
        self._native.publish_config(effect.offset, effect.data)

    def _notify_config(self, effect: base.NotifyConfig) -> None:
        del effect
        self._notifier.want()

    def _configure_data_plane(self, effect: base.ConfigureDataPlane) -> None:
        self._native.balloon_configure(_native.BalloonFlag(effect.flags))

    def _reset_data_plane(self, effect: base.ResetDataPlane) -> None:
        del effect
        self._native.balloon_reset()

    def _log(self, effect: base.Log) -> None:
        self._journal.guest_caused(effect.name, effect.name, **effect.fields)

    def _event(self, effect: base.Event) -> None:
        self._journal.publish(effect.name, effect.fields)
