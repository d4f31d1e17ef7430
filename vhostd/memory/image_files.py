"""Which files are disk images: open ones, and those that the configuration names.

A disk image is never guest memory, whoever names it as such and whenever: it would be mapped, and
on tmpfs the balloon would punch holes into it. Knows paths and files. Must not know what an image
is for.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias

import trio

from vhostd._native import identify_file

Identity: TypeAlias = tuple[int, int]
"""st_dev and st_ino."""

SEARCH_TIMEOUT_S: Final = 2.0
"""How long a search is waited for. Storage that takes longer is no memory file system, and a file
of another one is never mapped anyway."""


TURNS_MAX: Final = 32
"""Searches that have a turn at the same time: a thousand VMs need no thousand threads."""

TURN_S: Final = 0.1
"""A search that takes longer goes on, but others have their turn: storage may hang for ever."""


class _Search:
    """Of one VM's files, waiting for its turn or under way."""

    def __init__(self) -> None:
        self.begun = trio.Event()
        self.started_s = 0.0
        self.ended = trio.Event()

    def begin(self) -> None:
        """It is its turn."""
        self.started_s = trio.current_time()
        self.begun.set()

    async def wait(self) -> None:
        """Wait for its end, but not longer than SEARCH_TIMEOUT_S since its turn came."""
        await self.begun.wait()
        with trio.move_on_at(self.started_s + SEARCH_TIMEOUT_S):
            await self.ended.wait()


class ImageFiles:
    """The disk images of all VMs of this process."""

    def __init__(self) -> None:
        """Know none yet."""
        self._open: Counter[Identity] = Counter()
        self._paths: dict[str, Sequence[Path]] = {}
        self._found: dict[str, frozenset[Identity]] = {}
        self._kept: dict[str, frozenset[Identity]] = {}
        self._searches: dict[str, _Search] = {}
        self._turns = trio.Semaphore(TURNS_MAX)

    def __contains__(self, identity: Identity) -> bool:
        if identity in self._open:
            return True
        return any(identity in of_vm for of_vm in (*self._found.values(), *self._kept.values()))

    def opened(self, identity: Identity) -> None:
        """This file is open as a disk; several devices may have it."""
        self._open[identity] += 1

    def closed(self, identity: Identity) -> None:
        """One device less that has it."""
        self._open[identity] -= 1
        if self._open[identity] == 0:
            del self._open[identity]

    def expect(self, vm_name: str, paths: Sequence[Path], kept: Iterable[int] = ()) -> None:
        """The configuration names these as disks of a VM, served or not.

        kept: descriptors of disks that a predecessor had open; only looked at.
        """
        self.forget(vm_name)
        self._kept[vm_name] = frozenset(_kept_identities(kept))
        if paths:
            self._paths[vm_name] = paths

    def forget(self, vm_name: str) -> None:
        """The configuration has no such VM any more."""
        self._paths.pop(vm_name, None)
        self._found.pop(vm_name, None)
        self._kept.pop(vm_name, None)

    async def look(self, vm_name: str, *, at_most_s: float = math.inf) -> None:
        """Know which files the VM's disks are now, and which ones those of others were once.

        Storage that does not answer costs SEARCH_TIMEOUT_S of waiting, once. at_most_s: don't wait
        longer than that, even if it is not known then.
        """
        with trio.move_on_after(at_most_s):
            await self._look(vm_name)

    async def _look(self, vm_name: str) -> None:
        searches = [self._begin(name) for name in self._paths.keys() - self._found.keys()]
        if vm_name in self._found:  # once more, from now on
            if (running := self._searches.get(vm_name)) is not None:
                await running.wait()
            searches.append(self._begin(vm_name))
        for search in searches:
            await search.wait()

    def _begin(self, vm_name: str) -> _Search:
        if vm_name not in self._searches:
            search = self._searches[vm_name] = _Search()
            trio.lowlevel.spawn_system_task(self._take_turn, vm_name, search)
        return self._searches[vm_name]

    async def _take_turn(self, vm_name: str, search: _Search) -> None:
        async with self._turns:
            search.begin()
            trio.lowlevel.spawn_system_task(self._find, vm_name, search)
            with trio.move_on_after(TURN_S):
                await search.ended.wait()

    async def _find(self, vm_name: str, search: _Search) -> None:
        paths = self._paths.get(vm_name, ())
        # A thread of its own: what hangs is this VM's storage alone.
        found = await trio.to_thread.run_sync(
            _identities, paths, limiter=trio.CapacityLimiter(1), abandon_on_cancel=True
        )
        if self._paths.get(vm_name) == paths:
            # What a path led to before may still be in a guest's hands.
            self._found[vm_name] = self._found.get(vm_name, frozenset()) | found
        del self._searches[vm_name]
        search.ended.set()


def _kept_identities(fds: Iterable[int]) -> Iterator[Identity]:
    for fd in fds:
        with suppress(OSError):  # its storage is gone, and no memory lies there
            found = identify_file(fd)
            yield found.device, found.inode


def _identities(paths: Sequence[Path]) -> frozenset[Identity]:
    found = set()
    for path in paths:
        try:
            status = os.stat(path)  # noqa: PTH116 - what is asked is the kernel
        except (OSError, ValueError):
            continue  # not there, or not for us: then it can't be opened as a disk either
        found.add((status.st_dev, status.st_ino))
    return frozenset(found)
