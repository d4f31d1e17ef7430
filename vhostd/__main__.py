"""The program `vhostd`: argument vector to configuration to daemon. Decides nothing else."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from vhostd import __version__
from vhostd.config import load, notes
from vhostd.errors import ConfigError, VhostdError

EXIT_FAILED = 1
EXIT_CONFIG = 2
WATCHDOG_S = 10.0  # as in the systemd units


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vhostd")
def cli() -> None:
    """Guest-memory daemon for QEMU/KVM hosts."""


@cli.command()
@click.option("--config", "config_path", type=click.Path(path_type=Path), required=True)
@click.option("--runtime-dir", type=click.Path(path_type=Path), help="sockets go here")
@click.option("--state-dir", type=click.Path(path_type=Path), help="what survives a restart")
@click.option("--keep", is_flag=True, help="where systemd does not: restart it when it dies")
def run(config_path: Path, runtime_dir: Path | None, state_dir: Path | None, keep: bool) -> None:
    """Serve every VM in the configuration file; never daemonizes. SIGTERM ends it.

    With --keep a parent process keeps what guests need if this one dies, starts it again, and
    replaces it by a new one on SIGHUP.
    """
    if keep:
        from vhostd.keeper.supervisor import keep as keep_running

        words = [word for word in sys.argv[1:] if word != "--keep"]
        # -P: not what lies in the directory we happen to be started in.
        program = [sys.executable, "-P", "-m", "vhostd", *words]
        sys.exit(keep_running(program, watchdog_s=WATCHDOG_S, spare=True))
    from vhostd import daemon, log, systemd  # --help and check-config stay quick
    from vhostd.keeper import spare
    from vhostd.served_config import choose

    if spare.is_spare(os.environ, os.getpid()):
        daemon.load_control()  # all of the program: nothing is loaded later
        if spare.is_upgrade(os.environ):  # what serves now goes on until the file is mended
            load(config_path, runtime_dir=runtime_dir, state_dir=state_dir)
        passed = spare.wait_for_turn()
    else:
        passed = systemd.passed_fds(os.environ, os.getpid())
    served = choose(config_path, passed, runtime_dir=runtime_dir, state_dir=state_dir)
    log.configure(served.config.log_format)
    daemon.run(served, passed)


@cli.command("check-config")
@click.argument("config_path", metavar="FILE", type=click.Path(path_type=Path))
def check_config(config_path: Path) -> None:
    """Exit 0, or 2 with one line a mistake. Features that cancel each other are named."""
    config = load(config_path)
    if config.refusals:
        raise ConfigError(*config.refusals)
    for note in notes(config):
        print(f"{config_path}: {note}")


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
            _complain(mistake)
        sys.exit(EXIT_CONFIG)
    except VhostdError as error:
        _complain(f"vhostd: {error}")
        sys.exit(EXIT_FAILED)


def _complain(line: str) -> None:
    """Write one line to stderr; the journal is told that it is an error."""
    from vhostd.systemd import is_journal, with_priority

    print(with_priority("error", line) if is_journal(sys.stderr) else line, file=sys.stderr)


if __name__ == "__main__":
    main()
