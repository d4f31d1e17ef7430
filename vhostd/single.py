"""One balloon without a configuration file, for vhostd-balloon. Knows how its options map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vhostd import daemon
from vhostd.config import BalloonConfig, VmConfig
from vhostd.errors import ConfigError
from vhostd.transport.connection import Connection
from vhostd.transport.listener import Listener, from_passed_fd

NO_PATH = Path("/")


def run_balloon(
    vm_name: str,
    socket_path: Path | None,
    fd: int | None,
    runtime_dir: Path | None,
    options: dict[str, Any],
) -> None:
    """Serve one balloon until a signal, or until the connection that was passed has ended.

    Args:
        vm_name: how vhostctl knows it.
        socket_path, fd: where the VMM comes from; one of them is None.
        runtime_dir: where to put control sockets, or None.
        options: fields of BalloonConfig.

    Raises:
        ConfigError, HostError: it cannot be served; the text is for the operator.
    """
    source: Listener | Connection
    if socket_path is not None:
        source = Listener.bind(socket_path.absolute())
    elif fd is not None:
        source = from_passed_fd(fd)
    else:
        raise ConfigError("give either --socket-path=PATH or --fd=NUMBER")
    config = BalloonConfig(socket=(socket_path or NO_PATH).absolute(), **options)
    try:
        daemon.run_to_end([(VmConfig(vm_name, balloon=config), source)], runtime_dir)
    finally:
        source.close()
