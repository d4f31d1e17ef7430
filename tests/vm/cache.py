"""A folder of finished things: each one is there whole, or not at all.

A component is built in a scratch folder on the same file system, flushed, stamped and only then
renamed to its final name, so an interrupted build can never be mistaken for a finished one.
This file must not know what the components are.
"""

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

STAMP = "complete.json"

Recipe = dict[str, object]


class StackError(Exception):
    """The VM stack cannot be prepared; the text is one line for the person at the keyboard."""


def say(line: str) -> None:
    """Report progress: one short line, at once, on standard output."""
    print(f"vm: {line}", flush=True)


def cache_root() -> Path:
    """The cache folder: $VHOSTD_CACHE, else $XDG_CACHE_HOME/vhostd, else ~/.cache/vhostd."""
    own = os.environ.get("VHOSTD_CACHE")
    if own:
        return Path(own).absolute()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache").absolute() / "vhostd"


def fingerprint(*files: Path) -> str:
    """SHA-256 over the contents of `files`, in order: goes into recipes that depend on sources."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _flush_file_system(folder: Path) -> None:
    # syncfs reaches every file of a tree of thousands in one call; os.fsync would need them all.
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if libc.syncfs(fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(folder))
    finally:
        os.close(fd)


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` with `text` so that a reader sees the old contents or the new, never a mix."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.rename(path)


class Cache:
    """The cache folder and what is finished in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StackError(f"cannot create the cache folder {root}: {error.strerror}") from error
        if not os.access(root, os.W_OK | os.X_OK):
            raise StackError(f"the cache folder {root} is not writable; set VHOSTD_CACHE")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's build lock; a second run waits here until the first is done."""
        with (self.root / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("another run is filling the cache folder; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def place(self, name: str, recipe: Recipe) -> Path:
        """The folder that component `name` built by `recipe` has or will have."""
        text = json.dumps(recipe, sort_keys=True)
        return self.root / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def find(self, name: str, recipe: Recipe) -> Path | None:
        """The finished component's folder, or None if it has yet to be built."""
        place = self.place(name, recipe)
        return place if (place / STAMP).is_file() else None

    def build(self, name: str, recipe: Recipe, fill: Callable[[Path], None]) -> Path:
        """The finished component's folder; `fill` puts it together in a scratch folder if need be.

        The caller holds the lock. Whatever `fill` raises passes through and leaves nothing behind.
        """
        place = self.place(name, recipe)
        if (place / STAMP).is_file():
            return place
        scratch = self.root / f".building-{name}"
        for leftover in (scratch, place):
            if leftover.exists():
                shutil.rmtree(leftover)
        scratch.mkdir()
        try:
            fill(scratch)
            _flush_file_system(scratch)
            write_atomically(scratch / STAMP, json.dumps(recipe, sort_keys=True) + "\n")
            scratch.rename(place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        _flush_file_system(self.root)
        return place
