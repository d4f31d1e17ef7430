"""File descriptors with one owner. Knows no event loop, so pure code may hold one."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self


class OwnedFd:
    """A descriptor that is closed exactly once, by whoever holds this object last.

    Passing an OwnedFd passes the ownership: the receiver closes it. Dropping the object closes
    it too, so that no error path can leak a descriptor a peer sent.
    """

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        if fd < 0:
            raise ValueError(f"{fd} is no file descriptor")
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor, still owned by this object.

        Raises:
            ValueError: it was closed or taken.
        """
        if self._fd < 0:
            raise ValueError("file descriptor is closed")
        return self._fd

    @property
    def closed(self) -> bool:
        """True once close() or take() was called."""
        return self._fd < 0

    def take(self) -> int:
        """Give the bare descriptor away; the caller closes it."""
        fd = self.fileno()
        self._fd = -1
        return fd

    def close(self) -> None:
        """Close it; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"OwnedFd({self._fd})"
