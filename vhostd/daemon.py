"""The one nursery: every VM, the control sockets, and the order in which they start and stop.

Knows all rooms. Must not know what any of them does inside.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import trio

from vhostd import __version__, systemd, takeover
from vhostd.backend.journal import Journal
from vhostd.config import MetricsConfig, VmConfig
from vhostd.control.events import EventStream
from vhostd.errors import HostError, VhostdError
from vhostd.fds import OwnedFd
from vhostd.handover import kept_config
from vhostd.handover.state_dir import StateDir
from vhostd.homes import KeptHome, NoHome, Shared, SingleHome
from vhostd.keeper.child import KEEPER
from vhostd.log import LogEvent, RateLimiter, get_logger
from vhostd.memory.registry import MemoryRegistry
from vhostd.pause import Pause
from vhostd.served_config import ServedConfig
from vhostd.supervision import Source, SupervisedVm
from vhostd.takeover import Legacy

SETTLE_TIMEOUT_S: Final = 1.0
"""How long operators wait for VMs that are taken over; an image on hung storage takes longer."""


VMS_AT_ONCE: Final = 8
"""VMs that begin to be served in one turn of the event loop; one takes a millisecond or two."""

MEND: Final = "mend the file (vhostd check-config FILE), then restart vhostd"

LOOK_INTERVAL_S: Final = 5.0
"""How often native threads are looked at; a look at one takes a microsecond."""


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
        self._limiter = RateLimiter(trio.current_time)
        self._shared = Shared(
            MemoryRegistry(self._legacy.store), self._legacy, lambda: self.events.next_id
        )
        self._vms: dict[str, SupervisedVm] = {}
        self._taken_over = set(self._legacy.lefts)

    def vms(self) -> Mapping[str, SupervisedVm]:
        """All VMs by name, in the configuration's order."""
        return self._vms

    def add(self, config: VmConfig) -> None:
        """Take in a VM of the configuration file, and serve it if that can be."""
        journal = self._journal(config.name)
        vm = SupervisedVm(config.name, KeptHome(config, self._shared, journal), journal)
        self._expect_images(config.name, [pmem.file for pmem in config.pmems])
        self._begin(vm, self._legacy.paused.get(config.name))

    def add_absent(self, name: str, why: Pause, *, stays: bool) -> None:
        """Take in a VM that can't be served. stays: also when its VMM has gone."""
        self._expect_images(name, [])
        home = NoHome(name, self._legacy, why, stays=stays)
        self._begin(SupervisedVm(name, home, self._journal(name)), why)

    def add_single(self, config: VmConfig, source: Source) -> None:
        """Take in the one VM of this process."""
        journal = self._journal(config.name)
        self._expect_images(config.name, [pmem.file for pmem in config.pmems])
        home = SingleHome(config, source, self._shared, journal)
        self._begin(SupervisedVm(config.name, home, journal), None)

    def _journal(self, name: str) -> Journal:
        return Journal(name, self._limiter, self.events.publish)

    def _expect_images(self, name: str, paths: Sequence[Path]) -> None:
        kept = self._legacy.kept.borrow(name, "image")
        self._shared.registry.images.expect(name, paths, kept)

    def _begin(self, vm: SupervisedVm, why: Pause | None) -> None:
        self._vms[vm.name] = vm
        if why is None:
            vm.begin()
        else:
            vm.pause(why)

    async def run(self, scope: trio.CancelScope) -> None:
        """Serve them; ends the scope when the last of them has ended.

        Raises:
            HostError: the only one there is to be can't be served any more.
        """
        # Those whose guests wait come first. All at once would keep the event loop for seconds.
        in_order = sorted(self._vms.values(), key=lambda vm: vm.name not in self._taken_over)
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as vms:
                nursery.start_soon(self._look_at_workers)
                for number, vm in enumerate(in_order):
                    vms.start_soon(self._run_vm, vm)
                    if number % VMS_AT_ONCE == VMS_AT_ONCE - 1:
                        await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        scope.cancel()

    async def _look_at_workers(self) -> None:
        """One slow beat for all: nothing tells of a thread that does not come back."""
        while True:
            await trio.sleep(LOOK_INTERVAL_S)
            for vm in self._vms.values():
                vm.look_at_workers()

    async def _run_vm(self, vm: SupervisedVm) -> None:
        await vm.run()
        if vm.single and vm.paused is not None:
            raise HostError(vm.paused.reason)
        del self._vms[vm.name]
        self._shared.registry.images.forget(vm.name)

    async def settle(self) -> None:
        """Wait until nothing more is wanted of what a predecessor left."""
        for vm in list(self._vms.values()):
            await vm.settled.wait()


async def serve(
    populate: Callable[[Daemon], None],
    legacy: Legacy,
    runtime_dir: Path | None,
    metrics: MetricsConfig | None = None,
) -> None:
    """Serve VMs until SIGTERM or SIGINT, or until the last of them has ended.

    Args:
        populate: adds the VMs.
        legacy: what a predecessor left, and where a successor finds it.
        runtime_dir: where the control sockets go; None: there are none.
        metrics: an extra TCP address for /metrics.

    Raises:
        ConfigError, HostError: the control sockets, or a process' only VM, cannot be served. They
            come in an ExceptionGroup, as every nursery's do.
    """
    daemon = Daemon(legacy)
    taking_over = bool(legacy.lefts)
    log = get_logger()
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            populate(daemon)
            nursery.start_soon(_stop_on_signal, signals, nursery.cancel_scope, legacy)
            if taking_over:
                # Before all else: a VMM that waits for an answer of a predecessor stands still.
                nursery.start_soon(daemon.run, nursery.cancel_scope)
                with trio.move_on_after(SETTLE_TIMEOUT_S):
                    await daemon.settle()
            if runtime_dir is not None:
                from vhostd.control.server import serve_control  # see load_control()

                await nursery.start(serve_control, daemon, runtime_dir, metrics)
            if not taking_over:
                nursery.start_soon(daemon.run, nursery.cancel_scope)
            nursery.start_soon(_feed_watchdog)
            nursery.start_soon(_watch_keeper, legacy)
            served = sum(vm.paused is None for vm in daemon.vms().values())
            log.info(LogEvent.DAEMON_STARTED, version=__version__, vms=served)
            _tell_service_manager("READY=1", f"STATUS=serving {served} VMs")
            await trio.sleep_forever()
    log.info(LogEvent.DAEMON_STOPPED)


def _tell_service_manager(*assignments: str, timeout_s: float | None = None) -> None:
    try:
        systemd.notify(*assignments, timeout_s=timeout_s)
    except OSError as error:
        # Guests are served all the same; the manager will say by itself what it missed.
        get_logger().error(LogEvent.HOST_ERROR, error=f"service manager: {error}")


async def _stop_on_signal(
    signals: AsyncIterator[int],
    scope: trio.CancelScope,
    legacy: Legacy,
) -> None:
    async for number in signals:
        get_logger().info(LogEvent.DAEMON_STOPPING, signal=signal.Signals(number).name)
        _tell_service_manager("STOPPING=1", timeout_s=0)
        kept = legacy.store.working
        legacy.leave()
        if kept:
            # A successor goes on as it does after kill -9, and guests wait until it does: a
            # thousand VMs take seconds to be ended one by one.
            get_logger().info(LogEvent.DAEMON_STOPPED)
            os._exit(0)
        scope.cancel()


async def _feed_watchdog() -> None:
    interval_s = systemd.watchdog_interval_s(os.environ, os.getpid())
    if interval_s is None:
        return
    while _keeper_lives():
        _tell_service_manager("WATCHDOG=1", timeout_s=0)
        await trio.sleep(interval_s / 2)


def _keeper_lives() -> bool:
    """False: our keeper has ended; True where there is none, too."""
    return os.environ.get(KEEPER, str(os.getppid())) == str(os.getppid())


async def _watch_keeper(legacy: Legacy) -> None:
    """Tell at once that nothing is kept any more, and not at the next change."""
    if KEEPER not in os.environ:
        return
    try:
        with OwnedFd(os.pidfd_open(int(os.environ[KEEPER]))) as keeper:
            if _keeper_lives():
                await trio.lowlevel.wait_readable(keeper.fileno())
    except (OSError, ValueError):
        pass  # there is no such process any more
    legacy.store.lose("the keeper has ended")


def load_control() -> None:
    """Load the control API now. It takes as long as all else together, so a take-over does not."""
    import vhostd.control.server  # noqa: F401


def run(served: ServedConfig, passed: Mapping[str, list[OwnedFd]]) -> None:
    """Serve what a configuration file describes, until a signal ends it.

    passed: descriptors a service manager kept of a predecessor, by name; ours from here on.

    Raises:
        ConfigError, HostError: it cannot be served; the text is for the operator.
    """
    config = served.config
    _tell_mistakes(served)
    if not passed:
        load_control()  # who finds a device's socket finds the control socket, too
    state_dir = StateDir.open(config.state_dir, make=config.state_dir_named)
    legacy = takeover.inherit(list(config.vms.values()), state_dir, passed, config.wrong)
    with kept_config.pack(served.text) as text:
        legacy.store.keep_config(text.fileno())
    try:
        config.runtime_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"{config.runtime_dir}: cannot be made: {error.strerror}") from error

    def populate(daemon: Daemon) -> None:
        for vm in config.vms.values():
            daemon.add(vm)
        for name, lines in config.wrong.items():
            more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
            daemon.add_absent(name, Pause(lines[0] + more, MEND), stays=True)
        for name in legacy.gone:
            daemon.add_absent(name, legacy.paused[name], stays=False)

    run_to_end(populate, legacy, config.runtime_dir, config.metrics)


def _tell_mistakes(served: ServedConfig) -> None:
    log = get_logger()
    for line in served.complaints:
        log.error(
            LogEvent.CONFIG_WRONG,
            error=line,
            consequence="the configuration from before is served",
            remedy=MEND,
        )
    for line in served.config.refusals:
        log.error(
            LogEvent.DEVICE_REFUSED, error=line, consequence="a VMM that connects is turned away"
        )


def run_single(config: VmConfig, source: Source, runtime_dir: Path | None) -> None:
    """Serve one VM, until a signal ends it or its connection has ended.

    Raises:
        ConfigError, HostError: it cannot be served any more; the text is for the operator.
    """
    run_to_end(lambda daemon: daemon.add_single(config, source), Legacy(), runtime_dir)


def run_to_end(
    populate: Callable[[Daemon], None],
    legacy: Legacy,
    runtime_dir: Path | None,
    metrics: MetricsConfig | None = None,
) -> None:
    """serve() in an event loop of its own.

    Raises:
        ConfigError, HostError: as serve(), without a group around it.
    """
    try:
        trio.run(serve, populate, legacy, runtime_dir, metrics)
    except* VhostdError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
