"""The one nursery: every VM, the control sockets, and the order in which they start and stop.

Knows all rooms. Must not know what any of them does inside.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

import trio

from vhostd import __version__, systemd, takeover
from vhostd.backend.journal import Journal
from vhostd.backend.vm import Vm
from vhostd.config import DEFAULT_STATE_DIR, Config, MetricsConfig, VmConfig
from vhostd.control.events import EventStream
from vhostd.control.interface import VmView
from vhostd.errors import HostError, VhostdError
from vhostd.fds import OwnedFd
from vhostd.handover.state_dir import StateDir
from vhostd.log import LogEvent, RateLimiter, get_logger
from vhostd.memory.registry import MemoryRegistry
from vhostd.served_vm import PausedVm, ServedVm
from vhostd.takeover import Legacy
from vhostd.transport.connection import Connection
from vhostd.transport.listener import Listener

SETTLE_TIMEOUT_S: Final = 1.0
"""How long operators wait for VMs that are taken over; an image on hung storage takes longer."""

Source: TypeAlias = Listener | Connection
"""Where a device's VMM comes from."""


class Daemon:
    """All VMs of one process (control.interface.Daemon).

    Attributes:
        events: what happens to VMs.
    """

    def __init__(self, legacy: Legacy | None = None) -> None:
        """legacy: what a predecessor left."""
        self._legacy = Legacy() if legacy is None else legacy
        self.events = EventStream()
        self.events.begin_after(self._legacy.last_event)
        self._legacy.store.tell_failures(
            lambda vm, why: self.events.publish(vm, LogEvent.NOT_KEPT, {"error": why})
        )
        self._registry = MemoryRegistry(self._legacy.store)
        self._limiter = RateLimiter(trio.current_time)
        self._views: dict[str, VmView] = {}

    def vms(self) -> Mapping[str, VmView]:
        """All VMs by name, in the configuration's order."""
        return self._views

    def add_all(self, sources: Sequence[tuple[VmConfig, Sequence[Source]]]) -> list[Vm]:
        """Take VMs in; those that are to be run come back."""
        vms = []
        for config, of_vm in sources:
            vm = self._new_vm(config, of_vm)
            if vm is None:
                why = self._legacy.paused[config.name]
                self._views[config.name] = PausedVm(config, why)
                _leave(of_vm)
            else:
                self._views[config.name] = ServedVm(vm)
                vms.append(vm)
        return vms

    def _new_vm(self, config: VmConfig, sources: Sequence[Source]) -> Vm | None:
        """A VM to be run; None: it is left alone."""
        if config.name in self._legacy.paused:
            return None
        journal = Journal(config.name, self._limiter, self.events.publish)
        try:
            return Vm(
                config,
                sources,
                self._registry,
                journal,
                self._legacy.keeping(config.name),
                self._legacy.lefts.get(config.name),
                lambda: self.events.next_id,
            )
        except ValueError as error:
            self._legacy.pause(config.name, str(error))
            return None


async def serve(
    sources: Sequence[tuple[VmConfig, Sequence[Source]]],
    runtime_dir: Path | None,
    metrics: MetricsConfig | None = None,
    legacy: Legacy | None = None,
) -> None:
    """Serve VMs until SIGTERM or SIGINT, or until the last of them has ended.

    Args:
        sources: each VM and where its VMM comes from, as VmConfig.sockets has it; owned from
            here on.
        runtime_dir: where the control sockets go; None: there are none.
        metrics: an extra TCP address for /metrics.
        legacy: what a predecessor left, and where a successor finds it.

    Raises:
        ConfigError, HostError: the control sockets cannot be served. They come in an
            ExceptionGroup, as every nursery's do.
    """
    legacy = Legacy() if legacy is None else legacy
    daemon = Daemon(legacy)
    log = get_logger()
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            vms = daemon.add_all(sources)
            nursery.start_soon(_stop_on_signal, signals, nursery.cancel_scope, legacy, sources)
            run_vms = partial(_run_vms, vms, bool(legacy.paused), nursery.cancel_scope)
            if legacy.lefts:
                # Before all else: a VMM that waits for an answer of a predecessor stands still.
                nursery.start_soon(run_vms)
                with trio.move_on_after(SETTLE_TIMEOUT_S):
                    for vm in vms:
                        await vm.settled.wait()
            if runtime_dir is not None:
                from vhostd.control.server import serve_control  # see load_control()

                await nursery.start(serve_control, daemon, runtime_dir, metrics)
            if not legacy.lefts:
                nursery.start_soon(run_vms)
            nursery.start_soon(_feed_watchdog)
            log.info(LogEvent.DAEMON_STARTED, version=__version__, vms=len(vms))
            _tell_service_manager("READY=1", f"STATUS=serving {len(vms)} VMs")
            await trio.sleep_forever()
    log.info(LogEvent.DAEMON_STOPPED)


def _tell_service_manager(*assignments: str, timeout_s: float | None = None) -> None:
    try:
        systemd.notify(*assignments, timeout_s=timeout_s)
    except OSError as error:
        # Guests are served all the same; the manager will say by itself what it missed.
        get_logger().error(LogEvent.HOST_ERROR, error=f"service manager: {error}")


async def _run_vms(vms: Sequence[Vm], stay: bool, scope: trio.CancelScope) -> None:
    async with trio.open_nursery() as nursery:
        for vm in vms:
            nursery.start_soon(vm.run)
        if stay:
            nursery.start_soon(trio.sleep_forever)
    scope.cancel()


async def _stop_on_signal(
    signals: AsyncIterator[int],
    scope: trio.CancelScope,
    legacy: Legacy,
    sources: Sequence[tuple[VmConfig, Sequence[Source]]],
) -> None:
    async for number in signals:
        get_logger().info(LogEvent.DAEMON_STOPPING, signal=signal.Signals(number).name)
        _tell_service_manager("STOPPING=1", timeout_s=0)
        kept = legacy.store.working
        legacy.leave()
        if kept:
            for _, of_vm in sources:
                _leave(of_vm)
        scope.cancel()


def _leave(sources: Sequence[Source]) -> None:
    """Have a successor's paths stay when we close."""
    for source in sources:
        if isinstance(source, Listener):
            source.leave_path()


async def _feed_watchdog() -> None:
    interval_s = systemd.watchdog_interval_s(os.environ, os.getpid())
    if interval_s is None:
        return
    while True:
        _tell_service_manager("WATCHDOG=1", timeout_s=0)
        await trio.sleep(interval_s / 2)


def load_control() -> None:
    """Load the control API now. It takes as long as all else together, so a take-over does not."""
    import vhostd.control.server  # noqa: F401


def run(config: Config, passed: Mapping[str, list[OwnedFd]]) -> None:
    """Serve what a configuration file describes, until a signal ends it.

    passed: descriptors a service manager kept of a predecessor, by name; ours from here on.

    Raises:
        ConfigError, HostError: it cannot be served; the text is for the operator.
    """
    for line in config.refusals:
        get_logger().error(
            LogEvent.DEVICE_REFUSED, error=line, consequence="a VMM that connects is turned away"
        )
    sources: list[tuple[VmConfig, list[Source]]] = []
    if not passed:
        load_control()  # who finds a device's socket finds the control socket, too
    state_dir = StateDir.open(config.state_dir, make=config.state_dir != DEFAULT_STATE_DIR)
    legacy = takeover.inherit(list(config.vms.values()), state_dir, passed)
    try:
        config.runtime_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"{config.runtime_dir}: cannot be made: {error.strerror}") from error
    try:
        for vm in config.vms.values():
            listeners: list[Source] = []
            sources.append((vm, listeners))
            if vm.name in legacy.paused:
                continue
            for name, socket in zip(vm.device_names, vm.sockets, strict=True):
                listeners.append(legacy.listener(vm, name, socket))  # closed one by one
            legacy.settle(vm.name)
        run_to_end(sources, config.runtime_dir, config.metrics, legacy)
    finally:
        for _, of_vm in sources:
            for source in of_vm:
                source.close()


def run_to_end(
    sources: Sequence[tuple[VmConfig, Sequence[Source]]],
    runtime_dir: Path | None,
    metrics: MetricsConfig | None = None,
    legacy: Legacy | None = None,
) -> None:
    """serve() in an event loop of its own.

    Raises:
        ConfigError, HostError: as serve(), without a group around it.
    """
    try:
        trio.run(serve, sources, runtime_dir, metrics, legacy)
    except* VhostdError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
