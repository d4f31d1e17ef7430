"""The program `vhostd-pmem`: one virtio-pmem device, by the conventions of vhost-user back-ends.

Source: QEMU's docs/interop/vhost-user, "Backend program conventions". Knows the options; the
daemon does the rest.
"""

from __future__ import annotations

from pathlib import Path

import click

from vhostd import __version__, single
from vhostd.config import VmConfig
from vhostd.config_devices import pmem_from_options
from vhostd.single import Size

CAPABILITIES = {"type": "pmem", "features": []}
VM_NAME = "pmem"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@single.common_options
@click.option("--file", type=click.Path(path_type=Path), required=True, help="the raw image")
@click.option("--size", type=Size(), required=True, help="of the disk")
@click.option("--mode", type=click.Choice(["shmem", "window"]), default="shmem", show_default=True)
@click.option("--window-address", type=Size(), help="where the VMM has the window")
@click.option("--readonly", is_flag=True, help="map it without write permission")
@click.option("--writeback-limit", type=Size(), default="64M", show_default=True)
@click.option("--cold-cache-s", type=float, default=0.0, help="drop a cache unused for so long")
@click.option("--readahead", type=click.Choice(["normal", "sequential"]), default="normal")
@click.option("--packed/--no-packed", default=True, help="offer packed rings")
@click.option("--in-order/--no-in-order", default=True, help="offer in-order use of buffers")
@click.version_option(__version__, prog_name="vhostd-pmem")
def cli(
    socket_path: Path | None,
    fd: int | None,
    runtime_dir: Path | None,
    file: Path,
    **options: object,
) -> None:
    """Serve one virtio-pmem. One of --socket-path and --fd is needed. SIGTERM ends it."""
    from vhostd.images.image_file import open_image  # --print-capabilities stays quick

    single.check_source(socket_path, fd)
    image = file.absolute()

    def config(path: Path) -> VmConfig:
        pmem = pmem_from_options("vhostd-pmem", "pmem0", path, {**options, "file": str(image)})
        # What is wrong with it should be said now and not when the VMM comes.
        open_image(image, pmem.size, readonly=pmem.readonly).close()
        return VmConfig(VM_NAME, pmems=(pmem,))

    single.serve(config, socket_path, fd, runtime_dir)


def main() -> None:
    """Console script. Exit codes: 0 done, 1 failed, 2 usage."""
    single.main("vhostd-pmem", cli, CAPABILITIES)


if __name__ == "__main__":
    main()
