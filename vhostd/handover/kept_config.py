"""The text of the configuration that is served, kept for a successor.

When that starts, the file may be missing or broken, and guests need their devices all the same.
Must not know what the text says.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import MutableMapping
from typing import Final

from vhostd.errors import HostError
from vhostd.fds import OwnedFd

NAME: Final = "config"
"""In the manager's store."""

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


def pack(text: bytes) -> OwnedFd:
    """A memfd with the text. Raises HostError: no memory or descriptor for it."""
    try:
        fd = OwnedFd(os.memfd_create("vhostd-config", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        done = 0
        while done < len(text):
            done += os.pwrite(fd.fileno(), text[done:], done)
        fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        raise HostError(
            error.errno, f"the configuration cannot be kept: {error.strerror}"
        ) from error
    return fd


def take(passed: MutableMapping[str, list[OwnedFd]]) -> bytes | None:
    """Take a predecessor's text out of what was passed; None: there is none, or it is not whole."""
    fds = passed.pop(NAME, [])
    texts = [text for fd in fds if (text := _read(fd)) is not None]
    for fd in fds:
        fd.close()
    return texts[-1] if texts else None


def _read(fd: OwnedFd) -> bytes | None:
    try:
        if fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            return None
        return os.pread(fd.fileno(), os.fstat(fd.fileno()).st_size, 0)
    except OSError:
        return None
