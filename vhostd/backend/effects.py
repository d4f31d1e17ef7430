"""Performs what a device asks for: completions, config bytes, notifications, news.

Effects are performed at once and in order; none of them waits. Must not know messages.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final, Protocol

from vhostd import _native
from vhostd.backend.backend_requests import BackendRequests
from vhostd.backend.journal import Journal
from vhostd.devices import base
from vhostd.devices.base import Effect, Effects


class HostWork(Protocol):
    """What takes too long to be done at once."""

    def discard(self, part: base.GuestRange) -> None:
        """Give guest memory back to the host, soon."""

    def populate(self, part: base.GuestRange) -> None:
        """Allocate guest memory, soon."""


class EffectPerformer:
    """One connection's device side.

    Attributes:
        chains_refused: chains given back unused because their content was wrong.
    """

    def __init__(
        self,
        native: _native.Device,
        requests: BackendRequests,
        host_work: HostWork,
        stop_vm: Callable[[str], None],
        commit: Callable[[], None],
        journal: Journal,
    ) -> None:
        """commit: records what the device has become, before anybody learns of it."""
        self._native: Final = native
        self._requests = requests
        self._host_work = host_work
        self._stop_vm = stop_vm
        self._commit = commit
        self._journal = journal
        self.chains_refused = 0
        self._by_type: dict[type[Effect], Callable[..., None]] = {
            base.Complete: self._complete,
            base.PublishConfig: self._publish_config,
            base.NotifyConfig: self._notify_config,
            base.ConfigureDataPlane: self._configure_data_plane,
            base.ResetDataPlane: self._reset_data_plane,
            base.DiscardMemory: self._discard_memory,
            base.PopulateMemory: self._populate_memory,
            base.StopVm: self._stop,
            base.Log: self._log,
            base.Event: self._event,
        }

    def perform(self, effects: Effects) -> None:
        """Do all of them, in order. ResetDataPlane needs the worker parked."""
        if effects:
            self._commit()
        for effect in effects:
            self._by_type[type(effect)](effect)

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
        self._requests.want_config_change()

    def _configure_data_plane(self, effect: base.ConfigureDataPlane) -> None:
        self._native.balloon_configure(_native.BalloonFlag(effect.flags))

    def _reset_data_plane(self, effect: base.ResetDataPlane) -> None:
        del effect
        self._native.balloon_reset()

    def _discard_memory(self, effect: base.DiscardMemory) -> None:
        self._host_work.discard(effect.range)

    def _populate_memory(self, effect: base.PopulateMemory) -> None:
        self._host_work.populate(effect.range)

    def _stop(self, effect: base.StopVm) -> None:
        self._stop_vm(effect.why)

    def _log(self, effect: base.Log) -> None:
        self._journal.guest_caused(effect.name, effect.name, **effect.fields)

    def _event(self, effect: base.Event) -> None:
        self._journal.publish(effect.name, effect.fields)
