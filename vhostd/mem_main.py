"""The program `vhostd-mem`: one virtio-mem device, by the conventions of vhost-user back-ends.

Source: QEMU's docs/interop/vhost-user, "Backend program conventions". Knows the options; the
daemon does the rest.
"""

from __future__ import annotations

from pathlib import Path

import click

from vhostd import __version__, single
from vhostd.config import VmConfig
from vhostd.config_devices import mem_from_options
from vhostd.single import Size

CAPABILITIES = {"type": "mem", "features": []}
VM_NAME = "mem"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@single.common_options
@click.option("--window-address", type=Size(), required=True, help="where the VMM has the window")
@click.option("--size", type=Size(), required=True, help="of the window: the most it can add")
@click.option("--block-size", type=Size(), default="2M", show_default=True)
@click.option("--requested-size", type=Size(), default=0, show_default=True)
@click.option("--node", type=int, default=0, show_default=True, help="NUMA node in the guest")
@click.option("--host-node", type=int, help="take memory from this NUMA node")
@click.option("--prealloc", is_flag=True, help="allocate memory before the guest may use it")
@click.option(
    "--on-violation",
    type=click.Choice(["report", "discard"]),
    default="report",
    show_default=True,
    help="what to do about memory in unplugged blocks",
)
@click.option("--packed/--no-packed", default=True, help="offer packed rings")
@click.option("--in-order/--no-in-order", default=True, help="offer in-order use of buffers")
@click.version_option(__version__, prog_name="vhostd-mem")
def cli(
    socket_path: Path | None,
    fd: int | None,
    runtime_dir: Path | None,
    **options: object,
) -> None:
    """Serve one virtio-mem. One of --socket-path and --fd is needed. SIGTERM ends it."""
    single.check_source(socket_path, fd)

    def config(path: Path) -> VmConfig:
        mem = mem_from_options("vhostd-mem", "mem0", path, options)
        return VmConfig(VM_NAME, mems=(mem,))

    single.serve(config, socket_path, fd, runtime_dir)


def main() -> None:
    """Console script. Exit codes: 0 done, 1 failed, 2 usage."""
    single.main("vhostd-mem", cli, CAPABILITIES)


if __name__ == "__main__":
    main()
