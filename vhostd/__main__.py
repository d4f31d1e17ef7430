"""The program `vhostd`: argument vector to configuration to daemon. Decides nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from vhostd import __version__
from vhostd.config import load
from vhostd.errors import ConfigError, VhostdError

EXIT_FAILED = 1
EXIT_CONFIG = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vhostd")
def cli() -> None:
    """Guest-memory daemon for QEMU/KVM hosts."""


@cli.command()
@click.option("--config", "config_path", type=click.Path(path_type=Path), required=True)
@click.option("--runtime-dir", type=click.Path(path_type=Path), help="sockets go here")
@click.option("--state-dir", type=click.Path(path_type=Path), help="what survives a restart")
def run(config_path: Path, runtime_dir: Path | None, state_dir: Path | None) -> None:
    """Serve every VM in the configuration file; never daemonizes. SIGTERM ends it."""
    config = load(config_path, runtime_dir=runtime_dir, state_dir=state_dir)
    from vhostd import daemon, log  # --help and check-config stay quick

    log.configure(config.log_format)
    daemon.run(config)


@cli.command("check-config")
@click.argument("config_path", metavar="FILE", type=click.Path(path_type=Path))
def check_config(config_path: Path) -> None:
    """Exit 0, or 2 with one line a mistake."""
    load(config_path)


def main() -> None:
    """Console script. Exit codes: 0 done, 1 failed, 2 usage or configuration."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(EXIT_FAILED)
    except click.ClickException as error:
        error.show()
        sys.exit(EXIT_CONFIG)
    except ConfigError as error:
        for mistake in error.mistakes:
            print(mistake, file=sys.stderr)
        sys.exit(EXIT_CONFIG)
    except VhostdError as error:
        print(f"vhostd: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
