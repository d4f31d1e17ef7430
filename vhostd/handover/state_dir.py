"""What of a VM not even a reboot of the host undoes: one small file each in the state directory.

What is there was written by somebody who is long gone, so nothing is believed that is not whole, of
this VM and in our own hands: such a file is set aside, and the VM begins as it is configured. Must
not know what the devices' entries mean.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from vhostd.errors import HostError
from vhostd.log import LogEvent, get_logger

VERSION: Final = 1
FILE_SIZE_MAX: Final = 1 << 20
SET_ASIDE_MAX: Final = 100
"""Files of one VM; the last is replaced by each further one."""

JsonObject = dict[str, Any]


class _Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """devices: by id, what Device.lasting() says."""

    version: int
    vm: str
    devices: dict[str, JsonObject]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """crc32: of the content as it stands in the file."""

    vhostd_state: msgspec.Raw
    crc32: int


class _NotToBeTrusted(Exception):
    pass


class StateDir:
    """A directory, or none: then nothing lasts.

    Attributes:
        why_not: why there is none; None: there is one, or nobody wants one.
    """

    def __init__(self, path: Path | None, why_not: str | None = None) -> None:
        self._path = path
        self.why_not = why_not

    @classmethod
    def open(cls, path: Path, *, make: bool) -> StateDir:
        """A directory; make: unless it exists. Where it can't be used, that is logged."""
        try:
            if make:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.listdir(path)  # noqa: PTH208  # it is there, a directory, and for us
        except OSError as error:
            why_not = f"state directory {path}: {error.strerror}"
            get_logger().error(
                LogEvent.HOST_ERROR,
                error=why_not,
                consequence="sizes that are set do not outlive the host",
                remedy="make it, or name another one with --state-dir or state_dir",
            )
            return cls(None, why_not)
        return cls(path)

    def read(self, vm_name: str) -> dict[str, JsonObject]:
        """What lasts of a VM's devices, by id; none where there is no such file."""
        if self._path is None:
            return {}
        path = self._path / f"{vm_name}.json"
        try:
            return _decode(_read(path), vm_name)
        except FileNotFoundError:
            return {}
        except (OSError, _NotToBeTrusted) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            get_logger(vm=vm_name).error(
                LogEvent.STATE_SET_ASIDE,
                file=str(path),
                error=reason,
                moved_to=_set_aside(path),
                consequence="the VM begins as it is configured",
            )
            return {}

    def write(self, vm_name: str, devices: Mapping[str, JsonObject]) -> None:
        """Replace a VM's file; it is on the disk when this returns, or the old one is.

        Raises:
            HostError: it can't be.
        """
        if self._path is None:
            return
        path = self._path / f"{vm_name}.json"
        content = msgspec.json.encode(_Content(VERSION, vm_name, dict(devices)))
        data = msgspec.json.encode(_File(msgspec.Raw(content), zlib.crc32(content)))
        # Not a name that could be a VM's: those begin with a letter or digit.
        beside = self._path / f".{vm_name}.json.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(beside, flags, 0o600), "wb") as file:
                file.write(data + b"\n")
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
            directory = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise HostError(error.errno or 0, f"{path}: {error.strerror}") from error


def _read(path: Path) -> bytes:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise _NotToBeTrusted("it is no file")
        if status.st_uid not in {0, os.geteuid()}:
            raise _NotToBeTrusted(f"it belongs to user {status.st_uid}")
        if status.st_size > FILE_SIZE_MAX:
            raise _NotToBeTrusted(f"{status.st_size} bytes")
        return file.read()


def _decode(data: bytes, vm_name: str) -> dict[str, JsonObject]:
    try:
        file = msgspec.json.decode(data, type=_File)
        if zlib.crc32(bytes(file.vhostd_state)) != file.crc32:
            raise _NotToBeTrusted("its checksum is wrong: it was damaged, or edited")
        content = msgspec.json.decode(file.vhostd_state, type=_Content)
    except (msgspec.DecodeError, RecursionError) as error:
        raise _NotToBeTrusted(f"it is no state of vhostd: {error}") from error
    if content.version != VERSION:
        raise _NotToBeTrusted(f"version {content.version}, this release reads {VERSION}")
    if content.vm != vm_name:
        raise _NotToBeTrusted(f"it is of VM {content.vm!r}")
    return content.devices


def _set_aside(path: Path) -> str | None:
    """Move a file out of the way; where to, or None: it can't be."""
    for number in range(1, SET_ASIDE_MAX + 1):
        aside = path.with_name(f"{path.name}.unusable-{number}")
        if number < SET_ASIDE_MAX and os.path.lexists(aside):
            continue
        try:
            path.replace(aside)
        except OSError:
            return None  # what could be said of it is in the log
        return str(aside)
    return None
