"""Serves the control API: control.sock, control-ro.sock and, if wanted, a metrics port.

Opens and closes sockets in the right order. Must not know a verb or a VM.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from vhostd.config import CONTROL_READ_ONLY_SOCKET, CONTROL_SOCKET, MetricsConfig
from vhostd.control.api import create_app, create_metrics_app
from vhostd.control.http import HttpServer
from vhostd.control.interface import Daemon
from vhostd.control.sockets import ListeningSocket, RuntimeDirLock
from vhostd.log import LogEvent, get_logger

CONTROL_MODE: Final = 0o600
CONTROL_READ_ONLY_MODE: Final = 0o666


@dataclass(frozen=True, slots=True)
class ControlAddresses:
    """Where the API is; metrics_port is 0 where there is none."""

    control: Path
    read_only: Path
    metrics_port: int


async def serve_control(
    daemon: Daemon,
    runtime_dir: Path,
    metrics: MetricsConfig | None = None,
    *,
    task_status: trio.TaskStatus[ControlAddresses] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled, then end within HttpServer's grace and remove the sockets.

    Use it with `await nursery.start(...)`, which returns once clients can connect. Ends the
    daemon's event stream when it ends.

    Raises:
        ConfigError: another daemon serves this runtime directory.
        HostError: a socket can't be made.
    """
    with ExitStack() as stack:
        stack.enter_context(closing(RuntimeDirLock(runtime_dir)))
        servers = [
            HttpServer(
                create_app(daemon, writable=writable),
                [_listener(stack.enter_context(ListeningSocket(runtime_dir / name, mode)))],
            )
            for name, mode, writable in (
                (CONTROL_SOCKET, CONTROL_MODE, True),
                (CONTROL_READ_ONLY_SOCKET, CONTROL_READ_ONLY_MODE, False),
            )
        ]
        metrics_port = 0
        listeners = [] if metrics is None else await _tcp_listeners(metrics)
        if listeners:
            metrics_port = int(listeners[0].socket.getsockname()[1])
            servers.append(HttpServer(create_metrics_app(daemon), listeners))
        addresses = ControlAddresses(
            runtime_dir / CONTROL_SOCKET, runtime_dir / CONTROL_READ_ONLY_SOCKET, metrics_port
        )
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            for server in servers:
                nursery.start_soon(_run_shielded, server, stop)
            get_logger().info(
                LogEvent.CONTROL_LISTENING,
                control=str(addresses.control),
                read_only=str(addresses.read_only),
                metrics_port=metrics_port,
            )
            task_status.started(addresses)
            try:
                await trio.sleep_forever()
            finally:
                daemon.events.close()
                stop.set()


async def _run_shielded(server: HttpServer, stop: trio.Event) -> None:
    with trio.CancelScope(shield=True):
        await server.run(stop)


def _listener(bound: ListeningSocket) -> trio.SocketListener:
    return trio.SocketListener(trio.socket.from_stdlib_socket(bound.socket))


async def _tcp_listeners(metrics: MetricsConfig) -> list[trio.SocketListener]:
    """None where the address can't be had: guests are served all the same."""
    try:
        return await trio.open_tcp_listeners(metrics.port, host=metrics.host)
    except OSError as error:
        get_logger().error(
            LogEvent.HOST_ERROR,
            error=f"metrics.listen: {metrics.host} port {metrics.port}: {error.strerror}",
            consequence="/metrics is served by the control sockets alone",
            remedy="choose an address of this host and a free port (ss -ltnp), allow it in the"
            " unit (RestrictAddressFamilies=, IPAddressAllow=), then restart vhostd",
        )
        return []
