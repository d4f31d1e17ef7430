"""The program `vhostd-balloon`: one balloon, by the conventions of vhost-user back-ends.

Source: QEMU's docs/interop/vhost-user, "Backend program conventions". Knows the options; the
daemon does the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vhostd import __version__, single
from vhostd.config import VmConfig
from vhostd.config_devices import BalloonConfig

CAPABILITIES = {"type": "balloon", "features": []}
VM_NAME = "balloon"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@single.common_options
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
    **options: Any,  # noqa: ANN401  # fields of BalloonConfig
) -> None:
    """Serve one virtio-balloon. One of --socket-path and --fd is needed. SIGTERM ends it."""
    single.check_source(socket_path, fd)
    single.serve(
        lambda path: VmConfig(VM_NAME, balloon=BalloonConfig(socket=path, **options)),
        socket_path,
        fd,
        runtime_dir,
    )


def main() -> None:
    """Console script. Exit codes: 0 done, 1 failed, 2 usage."""
    single.main("vhostd-balloon", cli, CAPABILITIES)


if __name__ == "__main__":
    main()
