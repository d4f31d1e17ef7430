"""Which configuration is served: the file's, or while that is broken the one from before.

Knows the file and what a predecessor kept. Must not know VMs.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from vhostd.config import Config, parse, read_text
from vhostd.errors import ConfigError
from vhostd.fds import OwnedFd
from vhostd.handover import kept_config


@dataclass(frozen=True, slots=True)
class ServedConfig:
    """What is served.

    Attributes:
        config: it.
        text: the bytes that it was read from.
        complaints: why the file's is not served, one line each; none: it is.
    """

    config: Config
    text: bytes
    complaints: tuple[str, ...] = ()


def choose(
    path: Path,
    passed: MutableMapping[str, list[OwnedFd]],
    *,
    runtime_dir: Path | None = None,
    state_dir: Path | None = None,
) -> ServedConfig:
    """Decide which configuration is served.

    A VM whose section is wrong costs no other one its service: see Config.wrong.

    Args:
        path: of the file.
        passed: descriptors of a predecessor, by name; its configuration is taken out.
        runtime_dir, state_dir: count for more than the file.

    Raises:
        ConfigError: the file is broken, and there is nothing from before.
    """
    before = kept_config.take(passed)
    try:
        text = read_text(path)
        config = parse(text, str(path), runtime_dir=runtime_dir, state_dir=state_dir)
        if config.mistakes or not config.vms:
            raise ConfigError(*config.all_mistakes, *config.refusals)
    except ConfigError as error:
        if before is None:
            raise
        was = parse(before, str(path), runtime_dir=runtime_dir, state_dir=state_dir)
        return ServedConfig(was, before, error.mistakes)
    return ServedConfig(config, text)
