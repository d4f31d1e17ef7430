"""Records, holds and fails the syncs of a program's files, from below: the end tests hold.

sync_shim.c, loaded into the program by LD_PRELOAD, is the other end. Orders and the record lie in
a file both map. Must not know what the program is.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

from tests.fakes.preload import build_library, environment_of, preloading

FOR_EVER: Final = (1 << 32) - 1
FILES_MAX: Final = 4
CALLS_MAX: Final = 16384
LOOK_AGAIN_S: Final = 0.001  # nothing announces what another process wrote to memory
CONTROL_VARIABLE: Final = "SYNC_SHIM"
SOURCE: Final = Path(__file__).with_suffix(".c")


class SyncKind(IntEnum):
    """The system calls that are watched."""

    FSYNC = 1
    FDATASYNC = 2
    SYNC_FILE_RANGE = 3


class _Call(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("ended", ctypes.c_uint32),
        ("error", ctypes.c_uint32),
        ("injected", ctypes.c_uint32),
        ("begin", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("begin_ns", ctypes.c_uint64),
        ("end_ns", ctypes.c_uint64),
    )


class _File(ctypes.Structure):
    _fields_ = (
        ("device", ctypes.c_uint64),
        ("inode", ctypes.c_uint64),
        ("gate", ctypes.c_uint32),
        ("passes", ctypes.c_uint32),
        ("waiting", ctypes.c_uint32),
        ("failures", ctypes.c_uint32),
        ("error", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("calls", _Call * CALLS_MAX),
    )


class _Control(ctypes.Structure):
    _fields_ = (("sequence", ctypes.c_uint64), ("files", _File * FILES_MAX))


@dataclass(frozen=True, slots=True)
class SyncCall:
    """One call that was made.

    Attributes:
        begin, end: places in one order of everything all files' calls did; end is 0 before.
        begin_ns, end_ns: of CLOCK_MONOTONIC, as time.monotonic_ns() tells it.
        error: the errno the program was told, 0: success.
        injected: it was failed without being made.
    """

    kind: SyncKind
    ended: bool
    error: int
    injected: bool
    begin: int
    end: int
    begin_ns: int
    end_ns: int


class WatchedFile:
    """The syncs of one file."""

    def __init__(self, raw: _File) -> None:
        self._raw = raw

    def calls(self) -> list[SyncCall]:
        """All calls so far in the order they began, those under way included."""
        count = self._raw.count
        assert count <= CALLS_MAX, f"{count} calls, the record has room for {CALLS_MAX}"
        begun = (self._raw.calls[number] for number in range(count))
        return [_plain(raw) for raw in begun if raw.kind]

    def syncs(self) -> list[SyncCall]:
        """Those that make something durable."""
        return [call for call in self.calls() if call.kind is not SyncKind.SYNC_FILE_RANGE]

    @property
    def held(self) -> int:
        """How many syncs wait at the gate, or pass it just now."""
        waiting: int = self._raw.waiting
        return waiting

    def hold(self) -> None:
        """Let the next syncs wait until they are released."""
        self._raw.gate = 1

    def release(self) -> None:
        """Let those that wait go on, and all later ones."""
        self._raw.gate = 0

    def release_one(self) -> None:
        """Let one go on; the gate stays shut for the others."""
        self._raw.passes += 1

    def wait_held(self, began: int = 1, timeout_s: float = 10.0) -> None:
        """Wait until so many calls ever began, and the last of them waits at the gate.

        Raises:
            TimeoutError: it did not come.
        """
        deadline_s = time.monotonic() + timeout_s
        while not (len(self.calls()) >= began and self.held and not self.calls()[-1].ended):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{len(self.calls())} syncs began, {self.held} wait")
            time.sleep(LOOK_AGAIN_S)

    def fail(self, error: int, calls: int = FOR_EVER) -> None:
        """Fail the next calls with this errno; the file itself is not synced then."""
        self._raw.error = error
        self._raw.failures = calls

    def heal(self) -> None:
        """Fail no more."""
        self._raw.failures = 0

    def covered(self, published_ns: int, seen_ns: int) -> bool:
        """Whether a sync that began after a request was published had gone well before its answer
        was seen: of times by time.monotonic_ns()."""
        return any(
            call.ended
            and call.error == 0
            and published_ns <= call.begin_ns
            and call.end_ns <= seen_ns
            for call in self.syncs()
        )


class SyncShim:
    """A control file, and the library that obeys it."""

    def __init__(self, control: Path, library: Path | None = None) -> None:
        """Map what is there; library: None where it is loaded already."""
        self._path = control
        self._library = library
        with control.open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), ctypes.sizeof(_Control))
        self._raw = _Control.from_buffer(mapped)

    @classmethod
    def build(cls, folder: Path) -> SyncShim:
        """Compile the library into a folder, and make a control file there.

        Raises:
            subprocess.CalledProcessError: it does not compile.
        """
        library, control = build_library(SOURCE, folder), folder / "sync_shim.control"
        with control.open("wb") as file:
            file.truncate(ctypes.sizeof(_Control))
        return cls(control, library)

    @classmethod
    def inherited(cls) -> SyncShim:
        """The one this very process was started under."""
        return cls(Path(os.environ[CONTROL_VARIABLE]))

    def environment(self) -> Mapping[str, str]:
        """What a program must have in its environment."""
        assert self._library is not None, "not the builder's end"
        return {
            "LD_PRELOAD": preloading(self._library),
            CONTROL_VARIABLE: str(self._path),
        }

    @contextmanager
    def preloaded(self) -> Iterator[None]:
        """Programs that are started inside the block obey."""
        with environment_of(self.environment()):
            yield

    def watch(self, path: Path) -> WatchedFile:
        """Record the syncs of a file that is there; they are neither held nor failed at first."""
        status = path.stat()
        for raw in self._raw.files:
            if (raw.device, raw.inode) == (status.st_dev, status.st_ino):
                return WatchedFile(raw)
            if raw.inode == 0:
                raw.device, raw.inode = status.st_dev, status.st_ino
                return WatchedFile(raw)
        raise ValueError(f"more than {FILES_MAX} files")

    def forget(self) -> None:
        """Watch no file any more, and forget what was recorded."""
        for raw in self._raw.files:
            used = min(raw.count, CALLS_MAX) * ctypes.sizeof(_Call)
            ctypes.memset(ctypes.byref(raw), 0, _File.calls.offset + used)


def _plain(raw: _Call) -> SyncCall:
    ended = bool(raw.ended)  # before the rest: what it says is whole then
    return SyncCall(
        SyncKind(raw.kind),
        ended,
        raw.error,
        bool(raw.injected),
        raw.begin,
        raw.end if ended else 0,
        raw.begin_ns,
        raw.end_ns if ended else 0,
    )
