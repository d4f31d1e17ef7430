"""The program `vhostd-balloon`: one balloon, by the conventions of vhost-user back-ends.

Source: QEMU's docs/interop/vhost-user, "Backend program conventions". Knows the options; the
daemon does the rest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from vhostd import __version__
from vhostd.errors import ConfigError, VhostdError

CAPABILITIES = {"type": "balloon", "features": []}
PRINT_CAPABILITIES = "--print-capabilities"
VM_NAME = "balloon"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(PRINT_CAPABILITIES, is_flag=True, expose_value=False, help="as JSON, then exit")
@click.option("--socket-path", type=click.Path(path_type=Path), help="listen here for the VMM")
@click.option("--fd", type=int, help="use this socket instead: listening, or connected to the VMM")
@click.option("--runtime-dir", type=click.Path(path_type=Path), help="put control.sock here")
@click.option("--free-page-reporting/--no-free-page-reporting", default=True)
@click.option("--free-page-hinting/--no-free-page-hinting", default=True)
@click.option("--deflate-on-oom/--no-deflate-on-oom", default=True)
@click.option("--page-poison/--no-page-poison", default=True)
@click.option("--packed/--no-packed", default=True, help="offer packed rings")
@click.option("--in-order/--no-in-order", default=True, help="offer in-order use of buffers")
@click.option("--stats-interval-s", type=click.FloatRange(0, 86400), default=5.0)
@click.version_option(__version__, prog_name="vhostd-balloon")
def cli(
    socket_path: Path | None,
    fd: int | None,
    runtime_dir: Path | None,
    **options: bool | float,
) -> None:
    """Serve one virtio-balloon. One of --socket-path and --fd is needed. SIGTERM ends it."""
    if (socket_path is None) == (fd is None):
        raise click.UsageError("give either --socket-path=PATH or --fd=NUMBER")
    from vhostd import log, single  # --print-capabilities stays quick

    log.configure()
    single.run_balloon(VM_NAME, socket_path, fd, runtime_dir, options)


def main() -> None:
    """Console script. Exit codes: 0 done, 1 failed, 2 usage."""
    if PRINT_CAPABILITIES in sys.argv[1:]:
        # The conventions want every other option ignored beside this one, wrong ones included.
        print(json.dumps(CAPABILITIES))
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
            print(f"vhostd-balloon: {mistake}", file=sys.stderr)
        sys.exit(2)
    except VhostdError as error:
        print(f"vhostd-balloon: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
