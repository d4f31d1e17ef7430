"""One device without a configuration file, for vhostd-balloon, vhostd-mem and vhostd-pmem.

Knows where the VMM comes from, and what both programs have in common.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import click

from vhostd.errors import ConfigError, VhostdError
from vhostd.units import parse_size

PRINT_CAPABILITIES: Final = "--print-capabilities"
NO_PATH: Final = Path("/")

COMMON_OPTIONS: Final = (
    click.option(PRINT_CAPABILITIES, is_flag=True, expose_value=False, help="as JSON, then exit"),
    click.option("--socket-path", type=click.Path(path_type=Path), help="listen here for the VMM"),
    click.option(
        "--fd", type=int, help="use this socket instead: listening, or connected to the VMM"
    ),
    click.option("--runtime-dir", type=click.Path(path_type=Path), help="put control.sock here"),
)


class Size(click.ParamType):  # type: ignore[type-arg]  # not generic in older releases
    """A SIZE in bytes."""

    name = "SIZE"

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Read it; a number that is one already stays."""
        if isinstance(value, int):
            return value
        try:
            return int(value, 16) if value.startswith("0x") else parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options every such program has."""
    for option in reversed(COMMON_OPTIONS):
        command = option(command)
    return command


def main(program: str, cli: click.Command, capabilities: Mapping[str, Any]) -> None:
    """Console script. Exit codes: 0 done, 1 failed, 2 usage."""
    if PRINT_CAPABILITIES in sys.argv[1:]:
        # The conventions want every other option ignored beside this one, wrong ones included.
        print(json.dumps(capabilities))
        return
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except ConfigError as error:
        for mistake in error.mistakes:
            print(f"{program}: {mistake}", file=sys.stderr)
        sys.exit(2)
    except VhostdError as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(1)


def check_source(socket_path: Path | None, fd: int | None) -> None:
    """Exactly one of the two says where the VMM comes from. Raises click.UsageError."""
    if (socket_path is None) == (fd is None):
        raise click.UsageError("give either --socket-path=PATH or --fd=NUMBER")


def serve(
    make_config: Callable[[Path], Any],
    socket_path: Path | None,
    fd: int | None,
    runtime_dir: Path | None,
) -> None:
    """Serve one device until a signal, or until the connection that was passed has ended.

    Args:
        make_config: the VmConfig for a device at this socket.
        runtime_dir: where to put control sockets, or None.

    Raises:
        ConfigError, HostError: it cannot be served; the text is for the operator.
    """
    from vhostd import daemon, log  # --print-capabilities stays quick
    from vhostd.transport.connection import Connection
    from vhostd.transport.listener import Listener, from_passed_fd

    log.configure()
    if runtime_dir is not None:
        daemon.load_control()  # before anybody sees the device's socket
    # First: whoever sees the socket may connect, and nothing but a VMM's end closes it again.
    config = make_config((socket_path or NO_PATH).absolute())
    source: Listener | Connection
    if socket_path is not None:
        source = Listener.bind(socket_path.absolute())
    else:
        assert fd is not None, "checked with the other options"
        source = from_passed_fd(fd)
    try:
        daemon.run_single(config, source, runtime_dir)
    finally:
        source.close()
