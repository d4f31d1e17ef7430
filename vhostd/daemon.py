"""The one nursery: every VM, the control sockets, and the order in which they start and stop.

Knows all rooms. Must not know what any of them does inside.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import trio

from vhostd import __version__, systemd
from vhostd.backend.journal import Journal
from vhostd.backend.vm import Vm
from vhostd.config import Config, MetricsConfig, VmConfig
from vhostd.control.events import EventStream
from vhostd.control.interface import DeviceSocket, HintAction, MemoryWindow
from vhostd.control.server import serve_control
from vhostd.devices.registry import BALLOON, MEM, PMEM, DeviceKind
from vhostd.errors import HostError, VhostdError
from vhostd.log import LogEvent, RateLimiter, get_logger
from vhostd.memory.registry import MemoryRegistry
from vhostd.transport.connection import Connection
from vhostd.transport.listener import Listener

Source: TypeAlias = Listener | Connection
"""Where a device's VMM comes from."""


class ServedVm:
    """A VM as the control API sees and changes it (control.interface.VmView)."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm

    def status(self) -> dict[str, Any]:
        """The object of `vhostctl --json status VM`."""
        return self._vm.status()

    @property
    def devices(self) -> Sequence[DeviceSocket]:
        """What a VMM's command line must say about this VM's devices."""
        config = self._vm.config
        devices = []
        if config.balloon is not None:
            devices.append(_device_socket(BALLOON, "balloon0", config.balloon.socket))
        for mem in config.mems:
            window = MemoryWindow(mem.window_address, mem.size, mem.node)
            devices.append(_device_socket(MEM, mem.id, mem.socket, window))
        for pmem in config.pmems:
            image = MemoryWindow(
                pmem.window_address, pmem.size, pmem.node, pmem.file, readonly=pmem.readonly
            )
            window_or_none = image if pmem.mode == "window" else None
            devices.append(_device_socket(PMEM, pmem.id, pmem.socket, window_or_none))
        return devices

    async def set_balloon_target(self, size: int) -> None:
        """Ask the guest to give up `size` bytes. Raises Refused."""
        self._vm.set_balloon_target(size)

    async def request_statistics(self) -> None:
        """Ask the guest for its statistics; an event tells when they came. Raises Refused."""
        self._vm.request_statistics()

    async def balloon_hint(self, action: HintAction) -> None:
        """Begin or break off a free page hinting round. Raises Refused."""
        self._vm.balloon_hint(start=action is HintAction.START)

    async def resize_mem(self, device: str | None, size: int) -> str:
        """Ask the guest to use `size` bytes of a memory device. Raises Refused."""
        return self._vm.resize_mem(device, size)

    async def flush_pmem(self, device: str | None) -> str:
        """Make a disk's image durable. Raises Refused."""
        pmem = self._vm.find_pmem(device)
        await self._vm.storage_of(pmem).flush()
        return pmem.options.id

    async def drop_pmem_cache(self, device: str | None) -> dict[str, Any]:
        """Give the page cache of a disk's image back to the host. Raises Refused."""
        return await self._vm.storage_of(self._vm.find_pmem(device)).drop_cache()

    async def clear_pmem(self, device: str | None) -> str:
        """Let flushes of a disk succeed again. Raises Refused."""
        return await self._vm.clear_pmem(device)

    async def set_memory(self, size: int) -> dict[str, Any]:
        """Ask for `size` bytes of usable memory. Raises Refused."""
        return self._vm.set_memory(size)


def _device_socket(
    kind: DeviceKind, identifier: str, path: Path, window: MemoryWindow | None = None
) -> DeviceSocket:
    return DeviceSocket(
        kind=kind.name,
        id=identifier,
        path=path,
        virtio_id=kind.virtio_id,
        queue_count=kind.queue_count,
        config_size=kind.config_size,
        queue_size=kind.queue_size,
        window=window,
    )


class Daemon:
    """All VMs of one process (control.interface.Daemon).

    Attributes:
        events: what happens to VMs.
    """

    def __init__(self) -> None:
        self.events = EventStream()
        self._registry = MemoryRegistry()
        self._limiter = RateLimiter(trio.current_time)
        self._vms: dict[str, Vm] = {}

    def vms(self) -> Mapping[str, ServedVm]:
        """All VMs by name, in the configuration's order."""
        return {name: ServedVm(vm) for name, vm in self._vms.items()}

    def add(self, config: VmConfig, sources: Sequence[Source]) -> Vm:
        """Take a VM in, whose VMM comes through one source a device; the caller runs it."""
        journal = Journal(config.name, self._limiter, self.events.publish)
        vm = Vm(config, sources, self._registry, journal)
        self._vms[vm.name] = vm
        return vm


async def serve(
    sources: Sequence[tuple[VmConfig, Sequence[Source]]],
    runtime_dir: Path | None,
    metrics: MetricsConfig | None = None,
) -> None:
    """Serve VMs until SIGTERM or SIGINT, or until the last of them has ended.

    Args:
        sources: each VM and where its VMM comes from, as VmConfig.sockets has it; owned from
            here on.
        runtime_dir: where the control sockets go; None: there are none.
        metrics: an extra TCP address for /metrics.

    Raises:
        ConfigError, HostError: the control sockets cannot be served. They come in an
            ExceptionGroup, as every nursery's do.
    """
    daemon = Daemon()
    log = get_logger()
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            vms = [daemon.add(config, of_vm) for config, of_vm in sources]
            nursery.start_soon(_stop_on_signal, signals, nursery.cancel_scope)
            if runtime_dir is not None:
                await nursery.start(serve_control, daemon, runtime_dir, metrics)
            nursery.start_soon(_run_vms, vms, nursery.cancel_scope)
            log.info(LogEvent.DAEMON_STARTED, version=__version__, vms=len(vms))
            _tell_service_manager("READY=1", f"STATUS=serving {len(vms)} VMs")
            await trio.sleep_forever()
    log.info(LogEvent.DAEMON_STOPPED)


def _tell_service_manager(*assignments: str) -> None:
    try:
        systemd.notify(*assignments)
    except OSError as error:
        # Guests are served all the same; the manager will say by itself what it missed.
        get_logger().error(LogEvent.HOST_ERROR, error=f"service manager: {error}")


async def _run_vms(vms: Sequence[Vm], scope: trio.CancelScope) -> None:
    async with trio.open_nursery() as nursery:
        for vm in vms:
            nursery.start_soon(vm.run)
    scope.cancel()


async def _stop_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for number in signals:
        get_logger().info(LogEvent.DAEMON_STOPPING, signal=signal.Signals(number).name)
        _tell_service_manager("STOPPING=1")
        scope.cancel()


def run(config: Config) -> None:
    """Serve what a configuration file describes, until a signal ends it.

    Raises:
        ConfigError, HostError: it cannot be served; the text is for the operator.
    """
    sources: list[tuple[VmConfig, list[Source]]] = []
    try:
        config.runtime_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"{config.runtime_dir}: cannot be made: {error.strerror}") from error
    try:
        for vm in config.vms.values():
            listeners: list[Source] = []
            sources.append((vm, listeners))
            for socket in vm.sockets:
                listeners.append(Listener.bind(socket))  # noqa: PERF401  # closed one by one
        run_to_end(sources, config.runtime_dir, config.metrics)
    finally:
        for _, of_vm in sources:
            for source in of_vm:
                source.close()


def run_to_end(
    sources: Sequence[tuple[VmConfig, Sequence[Source]]],
    runtime_dir: Path | None,
    metrics: MetricsConfig | None = None,
) -> None:
    """serve() in an event loop of its own.

    Raises:
        ConfigError, HostError: as serve(), without a group around it.
    """
    try:
        trio.run(serve, sources, runtime_dir, metrics)
    except* VhostdError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
