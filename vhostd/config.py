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

from vhostd.config_reader import Mistakes, Table
from vhostd.errors import ConfigError
from vhostd.units import MiB, TiB

DEFAULT_RUNTIME_DIR: Final = Path("/run/vhostd")
DEFAULT_STATE_DIR: Final = Path("/var/lib/vhostd")
CONTROL_SOCKET: Final = "control.sock"
CONTROL_READ_ONLY_SOCKET: Final = "control-ro.sock"

SOCKET_PATH_MAX: Final = 107
"""Bytes: sockaddr_un.sun_path holds 108 with its terminating zero."""
VM_NAME_MAX: Final = 64
STATS_INTERVAL_MIN_S: Final = 0.1
"""Each request wakes the guest; more often than this it would be busy answering."""
STATS_INTERVAL_MAX_S: Final = 86400.0
MEM_BLOCK_SIZE_MIN: Final = 1 * MiB
"""QEMU's own limit; below the huge page size Linux can't use the block either."""
PMEM_ALIGNMENT: Final = 2 * MiB
"""Linux maps persistent memory in sections of this size."""
GUEST_ADDRESS_MAX: Final = 1 << 52
DEVICE_SIZE_MAX: Final = 16 * TiB

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NOT_SERVED: Final = "not served by this version, which has only the balloon; remove the table"

LogFormat = Literal["json", "console"]


@dataclass(frozen=True, slots=True)
class BalloonConfig:
    """[vm.NAME.balloon]; the meaning of the switches is in the device's BalloonOptions.

    Attributes:
        socket: absolute path; by default NAME-balloon.sock in the runtime directory.
        stats_interval_s: 0 asks only on request.
    """

    socket: Path
    free_page_reporting: bool = True
    free_page_hinting: bool = True
    deflate_on_oom: bool = True
    page_poison: bool = True
    packed: bool = True
    in_order: bool = True
    stats_interval_s: float = 5.0


@dataclass(frozen=True, slots=True)
class VmConfig:
    """[vm.NAME]; qmp is the absolute path of the VMM's QMP socket."""

    name: str
    qmp: Path | None = None
    balloon: BalloonConfig | None = None


@dataclass(frozen=True, slots=True)
class MetricsConfig:
    """[metrics]; host is an IP address, port 0 lets the kernel choose."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file. `log_format` None: console on a terminal, json elsewhere."""

    runtime_dir: Path = DEFAULT_RUNTIME_DIR
    state_dir: Path = DEFAULT_STATE_DIR
    log_format: LogFormat | None = None
    metrics: MetricsConfig | None = None
    vms: Mapping[str, VmConfig] = field(default_factory=dict)

    @property
    def control_socket(self) -> Path:
        return self.runtime_dir / CONTROL_SOCKET

    @property
    def control_read_only_socket(self) -> Path:
        return self.runtime_dir / CONTROL_READ_ONLY_SOCKET


def load(path: Path, *, runtime_dir: Path | None = None, state_dir: Path | None = None) -> Config:
    """Read a configuration file; the two directories override what it says.

    Raises:
        ConfigError: it can't be read, is no TOML, or holds mistakes; all of them are named.
    """
    mistakes = Mistakes(str(path))
    try:
        raw = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8, as TOML must be") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: holds a value Python can't read: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is not TOML: values are nested too deeply") from error
    config = _read(Table(raw, mistakes), runtime_dir, state_dir)
    mistakes.raise_if_any()
    return config


def _read(root: Table, runtime_dir: Path | None, state_dir: Path | None) -> Config:
    daemon = root.table("daemon")
    directories = {}
    for key, override, default in (
        ("runtime_dir", runtime_dir, DEFAULT_RUNTIME_DIR),
        ("state_dir", state_dir, DEFAULT_STATE_DIR),
    ):
        written = daemon.absolute_path(key) or default
        directories[key] = written if override is None else Path.cwd() / override
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
    vms: dict[str, VmConfig] = {}
    for name, table in root.tables("vm"):
        vms[name] = _vm(name, table, sockets)
    if not vms:
        root.mistake("vm", "no VM is described; write a table such as [vm.web.balloon]")
    root.end()
    return Config(
        runtime_dir=directories["runtime_dir"],
        state_dir=directories["state_dir"],
        log_format=None if log_format is None else ("json" if log_format == "json" else "console"),
        metrics=metrics,
        vms=vms,
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


def _vm(name: str, table: Table, sockets: _Sockets) -> VmConfig:
    _check_name(table, name)
    qmp = table.absolute_path("qmp")
    if qmp is not None and len(os.fsencode(qmp)) > SOCKET_PATH_MAX:
        table.mistake("qmp", f"a socket's path may have {SOCKET_PATH_MAX} bytes; shorten it")
    balloon = None
    if "balloon" in table:
        balloon = _balloon(name, table.table("balloon"), sockets)
    identifiers: set[str] = set()
    devices = "balloon" in table
    for kind, read in (("mem", _mem), ("pmem", _pmem)):
        for device in table.array(kind):
            devices = True
            _device_identifier(device, identifiers)
            sockets.read(device, f"{name}-{kind}.sock")
            read(device)
            device.end()
            device.mistake("", _NOT_SERVED)
    if not devices:
        table.mistake("", f"has no device; write a table [{table.where}.balloon]")
    table.end()
    return VmConfig(name, qmp, balloon)


def _balloon(name: str, table: Table, sockets: _Sockets) -> BalloonConfig:
    default = BalloonConfig(Path())
    socket = sockets.read(table, f"{name}-balloon.sock")
    config = BalloonConfig(
        socket=socket,
        free_page_reporting=table.boolean("free_page_reporting", default.free_page_reporting),
        free_page_hinting=table.boolean("free_page_hinting", default.free_page_hinting),
        deflate_on_oom=table.boolean("deflate_on_oom", default.deflate_on_oom),
        page_poison=table.boolean("page_poison", default.page_poison),
        packed=table.boolean("packed", default.packed),
        in_order=table.boolean("in_order", default.in_order),
        stats_interval_s=table.number("stats_interval_s", default.stats_interval_s),
    )
    interval_s = config.stats_interval_s
    if interval_s and not STATS_INTERVAL_MIN_S <= interval_s <= STATS_INTERVAL_MAX_S:
        table.mistake(
            "stats_interval_s",
            f"{interval_s:g} is out of range; write 0 (only on request) or"
            f" {STATS_INTERVAL_MIN_S:g} to {STATS_INTERVAL_MAX_S:g} seconds",
        )
    table.end()
    return config


def _device_identifier(table: Table, taken: set[str]) -> None:
    identifier = table.text("id", required=True)
    if identifier is None:
        return
    if not _NAME.fullmatch(identifier) or len(identifier) > VM_NAME_MAX:
        table.mistake("id", f"{identifier!r} is no name; write letters, digits and . _ -")
    elif identifier in taken:
        table.mistake("id", f"{identifier!r} is used twice in this VM; name another")
    taken.add(identifier)


def _window(table: Table, alignment: int, *, required: bool) -> None:
    address = table.size("window_address", required=required)
    if address is not None and (address % alignment or not 0 < address < GUEST_ADDRESS_MAX):
        table.mistake(
            "window_address",
            f"{address:#x} must be a multiple of {alignment:#x}, above 0 and below 2^52,"
            " because the guest maps it in such blocks",
        )


def _multiple(table: Table, key: str, size: int | None, alignment: int, smallest: int) -> None:
    if size is None:
        return
    if size % alignment or not smallest <= size <= DEVICE_SIZE_MAX:
        table.mistake(
            key, f"{size} must be a multiple of {alignment}, from {smallest} to {DEVICE_SIZE_MAX}"
        )


def _mem(table: Table) -> None:
    block_size = table.size("block_size", default=2 * MiB) or 0
    if block_size < MEM_BLOCK_SIZE_MIN or block_size & (block_size - 1):
        table.mistake(
            "block_size", f"{block_size} must be a power of two, {MEM_BLOCK_SIZE_MIN} or more"
        )
        block_size = 2 * MiB
    size = table.size("size", required=True)
    _multiple(table, "size", size, block_size, block_size)
    requested_size = table.size("requested_size", default=0)
    _multiple(table, "requested_size", requested_size, block_size, 0)
    if size is not None and requested_size is not None and requested_size > size:
        table.mistake("requested_size", f"{requested_size} is more than size, which is {size}")
    _window(table, block_size, required=True)
    node = table.number("node", 0)
    if node != int(node) or not 0 <= node <= 0xFFFF:
        table.mistake("node", f"{node:g} is no NUMA node; write 0 to 65535")


def _pmem(table: Table) -> None:
    table.absolute_path("file", required=True)
    _multiple(table, "size", table.size("size", required=True), PMEM_ALIGNMENT, PMEM_ALIGNMENT)
    mode = table.choice("mode", ("shmem", "window")) or "shmem"
    if mode == "shmem" and "window_address" in table:
        table.mistake("window_address", 'means nothing with mode = "shmem"; remove it')
    _window(table, PMEM_ALIGNMENT, required=mode == "window")
    table.boolean("readonly", False)
