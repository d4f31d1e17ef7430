"""The configuration file: TOML in, frozen dataclasses out, every mistake named at once.

Holds every key's default and limit. Must not touch what it describes: no socket is opened and no
image file looked at.
"""

from __future__ import annotations

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from vhostd.config_devices import (
    BalloonConfig,
    MemConfig,
    PmemConfig,
    WindowPlace,
    check_overlap,
    read_balloon,
    read_mem,
    read_pmem,
)
from vhostd.config_pairs import found_pairs
from vhostd.config_reader import Mistakes, Table
from vhostd.errors import ConfigError

DEFAULT_RUNTIME_DIR: Final = Path("/run/vhostd")
DEFAULT_STATE_DIR: Final = Path("/var/lib/vhostd")
CONTROL_SOCKET: Final = "control.sock"
CONTROL_READ_ONLY_SOCKET: Final = "control-ro.sock"

SOCKET_PATH_MAX: Final = 107
"""Bytes: sockaddr_un.sun_path holds 108 with its terminating zero."""
VM_NAME_MAX: Final = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

LogFormat = Literal["json", "console"]


@dataclass(frozen=True, slots=True)
class VmConfig:
    """[vm.NAME]; qmp is the absolute path of the VMM's QMP socket."""

    name: str
    qmp: Path | None = None
    balloon: BalloonConfig | None = None
    mems: tuple[MemConfig, ...] = ()
    pmems: tuple[PmemConfig, ...] = ()

    @property
    def device_names(self) -> list[str]:
        """Of its devices, in the order of `sockets`."""
        balloon = [] if self.balloon is None else ["balloon"]
        return balloon + [mem.id for mem in self.mems] + [pmem.id for pmem in self.pmems]

    @property
    def sockets(self) -> list[Path]:
        """Of its devices: the balloon's, those of the memory devices, of the disks; in order."""
        balloon = [] if self.balloon is None else [self.balloon.socket]
        mems = [mem.socket for mem in self.mems]
        return balloon + mems + [pmem.socket for pmem in self.pmems]


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """[metrics]; host is an IP address, port 0 lets the kernel choose."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file.

    Attributes:
        log_format: None: console on a terminal, json elsewhere.
        refusals: a line for each device that no VMM that connects is given. A VMM that has it
            from an earlier release keeps it, so this is no reason not to serve the others.
        state_dir_named: somebody chose state_dir, and not the default counts.
        mistakes: a line for each mistake in what is no single VM's; the default counts instead.
        wrong: VMs that can't be served as they are described, and their mistakes, one line each.
    """

    runtime_dir: Path = DEFAULT_RUNTIME_DIR
    state_dir: Path = DEFAULT_STATE_DIR
    state_dir_named: bool = False
    log_format: LogFormat | None = None
    metrics: MetricsConfig | None = None
    vms: Mapping[str, VmConfig] = field(default_factory=dict)
    refusals: tuple[str, ...] = ()
    mistakes: tuple[str, ...] = ()
    wrong: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def all_mistakes(self) -> list[str]:
        """Of the whole file, one line each."""
        of_vms = [line for lines in self.wrong.values() for line in lines]
        return [*self.mistakes, *of_vms]

    @property
    def control_socket(self) -> Path:
        return self.runtime_dir / CONTROL_SOCKET


def notes(config: Config) -> list[str]:
    """Features of its VMs that cancel each other and what becomes of them, one line each."""
    return [
        f"vm.{name}: {pair.text}"
        for name, vm in config.vms.items()
        for pair in found_pairs(vm)
        if not pair.refused
    ]


def load(path: Path, *, runtime_dir: Path | None = None, state_dir: Path | None = None) -> Config:
    """Read a configuration file; the two directories override what it says.

    Raises:
        ConfigError: it can't be read, is no TOML, or holds mistakes; all of them are named.
    """
    config = parse(read_text(path), str(path), runtime_dir=runtime_dir, state_dir=state_dir)
    if mistakes := config.all_mistakes:
        raise ConfigError(*mistakes, *config.refusals)
    return config


def read_text(path: Path) -> bytes:
    """The bytes of a configuration file. Raises ConfigError: it can't be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error


def parse(
    text: bytes, source: str, *, runtime_dir: Path | None = None, state_dir: Path | None = None
) -> Config:
    """What a configuration file says, with its mistakes beside it.

    Args:
        source: the file's name, for the mistakes.
        runtime_dir, state_dir: count for more than what it says.

    Raises:
        ConfigError: it is no TOML.
    """
    mistakes = Mistakes(source)
    try:
        raw = tomllib.loads(text.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: byte {error.start} is not UTF-8, as TOML must be") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: is not TOML: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{source}: holds a value Python can't read: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: is not TOML: values are nested too deeply") from error
    return _read(Table(raw, mistakes), runtime_dir, state_dir)


def _read(root: Table, runtime_dir: Path | None, state_dir: Path | None) -> Config:
    daemon = root.table("daemon")
    directories = {}
    for key, override, default in (
        ("runtime_dir", runtime_dir, DEFAULT_RUNTIME_DIR),
        ("state_dir", state_dir, DEFAULT_STATE_DIR),
    ):
        written = daemon.absolute_path(key) or default
        directories[key] = written if override is None else Path.cwd() / override
    state_dir_named = state_dir is not None or "state_dir" in daemon
    longest = directories["runtime_dir"] / CONTROL_READ_ONLY_SOCKET
    if len(os.fsencode(longest)) > SOCKET_PATH_MAX:
        daemon.mistake(
            "runtime_dir",
            f"{longest} would have {len(os.fsencode(longest))} bytes, a socket's path may have"
            f" {SOCKET_PATH_MAX}; choose a shorter directory",
        )
    log_format = daemon.choice("log_format", ("json", "console"))
    daemon.end()

    metrics = _metrics(root.table("metrics"))
    sockets = _Sockets(directories["runtime_dir"])
    tables = dict(root.tables("vm"))
    vms = {name: _vm(name, table, sockets) for name, table in tables.items()}
    _check_images(tables, vms)
    if not vms:
        root.mistake("vm", "no VM is described; write a table such as [vm.web.balloon]")
    root.end()
    wrong = {
        name: tuple(table.mistakes.lines) for name, table in tables.items() if table.mistakes.lines
    }
    return Config(
        runtime_dir=directories["runtime_dir"],
        state_dir=directories["state_dir"],
        state_dir_named=state_dir_named,
        log_format=None if log_format is None else ("json" if log_format == "json" else "console"),
        metrics=metrics,
        vms={name: vm for name, vm in vms.items() if name not in wrong},
        refusals=tuple(line for table in tables.values() for line in table.mistakes.refusals),
        mistakes=tuple(root.mistakes.lines),
        wrong=wrong,
    )


def _check_images(tables: Mapping[str, Table], vms: Mapping[str, VmConfig]) -> None:
    """An image that a device may write to is nobody else's; it is whose comes first."""
    users: dict[Path, list[tuple[str, PmemConfig]]] = {}
    for name, vm in vms.items():
        for pmem in vm.pmems:
            users.setdefault(pmem.file, []).append((name, pmem))
    for file, devices in users.items():
        if len(devices) > 1 and not all(pmem.readonly for _, pmem in devices):
            names = " and ".join(f"vm.{name}.pmem {pmem.id}" for name, pmem in devices)
            for later in dict.fromkeys(name for name, _ in devices[1:]):
                tables[later].mistake(
                    "", f"{file} is the image of {names}; only read-only devices may share one"
                )


def _metrics(table: Table) -> MetricsConfig | None:
    listen = table.text("listen")
    table.end()
    if listen is None:
        return None
    host, _, port = listen.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        number = int(port) if port.isascii() and port.isdigit() else -1
    except ValueError:
        number = -1
    if not 0 <= number <= 65535:
        table.mistake("listen", f"{listen!r} is no address; write one such as 127.0.0.1:9713")
        return None
    return MetricsConfig(str(address), number)


class _Sockets:
    """Device sockets so far: no two alike, none too long for a socket address."""

    def __init__(self, runtime_dir: Path) -> None:
        self._runtime_dir = runtime_dir
        self._taken: dict[Path, str] = {
            runtime_dir / CONTROL_SOCKET: "the control socket",
            runtime_dir / CONTROL_READ_ONLY_SOCKET: "the read-only control socket",
        }

    def read(self, table: Table, default: str) -> Path:
        text = table.text("socket")
        relative = Path(default if text is None else text)
        socket = self._runtime_dir / relative
        if text is not None and (not text or "\0" in text or ".." in relative.parts):
            table.mistake("socket", f"{text!r} is no path below {self._runtime_dir}")
        elif len(os.fsencode(socket)) > SOCKET_PATH_MAX:
            table.mistake(
                "socket",
                f"{socket} has {len(os.fsencode(socket))} bytes, a socket's path may have"
                f" {SOCKET_PATH_MAX}; shorten it or runtime_dir",
            )
        elif socket in self._taken:
            table.mistake("socket", f"{socket} is taken by {self._taken[socket]}; name another")
        else:
            self._taken[socket] = table.where
        return socket


def _check_name(table: Table, name: str) -> None:
    if not _NAME.fullmatch(name) or len(name) > VM_NAME_MAX:
        table.mistake(
            "",
            f"a VM's name is 1 to {VM_NAME_MAX} of A-Z a-z 0-9 . _ - and starts with a letter"
            " or a digit, because it becomes part of file names",
        )


def _device_identifier(table: Table, taken: set[str]) -> str:
    identifier = table.text("id", required=True)
    if identifier is None:
        return f"unnamed{len(taken)}"
    if not _NAME.fullmatch(identifier) or len(identifier) > VM_NAME_MAX:
        table.mistake("id", f"{identifier!r} is no name; write letters, digits and . _ -")
    elif identifier in taken or identifier == "balloon":
        table.mistake("id", f"{identifier!r} is used twice in this VM; name another")
    taken.add(identifier)
    return identifier


def _add_window(table: Table, window: WindowPlace, windows: list[WindowPlace]) -> None:
    check_overlap(table, window, windows)
    windows.append(window)


def _vm(name: str, table: Table, sockets: _Sockets) -> VmConfig:
    _check_name(table, name)
    qmp = table.absolute_path("qmp")
    if qmp is not None and len(os.fsencode(qmp)) > SOCKET_PATH_MAX:
        table.mistake("qmp", f"a socket's path may have {SOCKET_PATH_MAX} bytes; shorten it")
    balloon = None
    if "balloon" in table:
        found = table.table("balloon")
        balloon = read_balloon(found, sockets.read(found, f"{name}-balloon.sock"))
    identifiers: set[str] = set()
    windows: list[WindowPlace] = []
    mems: list[MemConfig] = []
    for device in table.array("mem"):
        identifier = _device_identifier(device, identifiers)
        mem = read_mem(device, identifier, sockets.read(device, f"{name}-{identifier}.sock"))
        _add_window(device, WindowPlace(mem.id, mem.window_address, mem.size), windows)
        mems.append(mem)
        device.end()
    pmems: list[PmemConfig] = []
    for device in table.array("pmem"):
        identifier = _device_identifier(device, identifiers)
        pmem = read_pmem(device, identifier, sockets.read(device, f"{name}-{identifier}.sock"))
        if pmem.mode == "window":
            _add_window(device, WindowPlace(pmem.id, pmem.window_address, pmem.size), windows)
        pmems.append(pmem)
        device.end()
    table.end()  # a misspelt device comes before the one that is missing
    if balloon is None and not mems and not pmems and "balloon" not in table:
        table.mistake("", f"has no device; write a table [{table.where}.balloon]")
    config = VmConfig(name, qmp, balloon, tuple(mems), tuple(pmems))
    for pair in found_pairs(config):
        if pair.refused:
            table.mistake("", pair.text)
    return config
