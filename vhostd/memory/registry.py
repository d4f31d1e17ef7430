"""Which VM owns which guest memory file, and the one mapping of it.

Knows files and mappings. Must not know sockets, rings or what a region is used for.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Final

import trio

from vhostd._native import FileIdentity, Mapping, Region, identify_file
from vhostd.errors import FrontendError, HostError
from vhostd.fds import OwnedFd
from vhostd.handover.fd_store import VM_WIDE, FdStore, NoStore
from vhostd.memory.image_files import ImageFiles
from vhostd.units import BALLOON_PAGE_SIZE

_MAPPING_THREADS_MAX = 64

FILES_PER_VM_MAX: Final = 128
"""A VM's quota: a successor gets each file, and its bitmap. QEMU has one for each DIMM, node and
window."""

ADOPT_TIMEOUT_S: Final = 0.25
"""How long a take-over waits until disks are known: no other VM's storage may hold it up. A disk
that is found later, and is memory by then, is refused as a disk."""

_WHY_NOT_AGAIN: Final = {
    errno.ENODATA: "the VMM has truncated its file to nothing",
    errno.EPROTO: "the VMM has changed the size of its file",
}
"""What Mapping says of a file that a predecessor had mapped."""


@dataclass(frozen=True, slots=True)
class RegionRequest:
    """A slot of guest RAM as a VMM announced it, with its file.

    All numbers are bytes. `file` stays the caller's.
    """

    guest_addr: int
    size: int
    file_offset: int
    file: OwnedFd


@dataclass(slots=True, eq=False)
class _MemoryFile:
    """A mapped file; users is how many regions hold it."""

    identity: tuple[int, int]
    owner: str
    mapping: Mapping
    users: int = 0

    def name(self, role: str) -> str:
        """What it, or its bitmap, is called in the store."""
        device, inode = self.identity
        return f"{self.owner}/{VM_WIDE}/{role}.{device:x}.{inode:x}"


class HeldRegion:
    """A region whose file stays mapped until release().

    Attributes:
        region: what the native side needs to know of it.
        device, inode: st_dev and st_ino of its file.
    """

    def __init__(self, registry: MemoryRegistry, file: _MemoryFile, region: Region) -> None:
        self._registry = registry
        self._file: _MemoryFile | None = file
        self.region = region
        self.device, self.inode = file.identity
        file.users += 1

    def share(self) -> HeldRegion:
        """Hold the same region once more, for work that must not lose it meanwhile."""
        assert self._file is not None, "a released region"
        return HeldRegion(self._registry, self._file, self.region)

    def release(self) -> None:
        """Let go; the last holder of a file unmaps it. A second call does nothing.

        The region may be in no native memory table any more.
        """
        file, self._file = self._file, None
        if file is not None:
            self._registry.drop(file)


class UnmappedRegion:
    """A region whose file is left alone: a disk image, or a file of neither shmem nor hugetlbfs.

    No ring may lie in it, no page of it may be discarded, and what happens to the file must not
    happen to us: it may shrink, or lie on a file system that the VMM runs itself and that never
    answers.

    Attributes:
        device, inode: st_dev and st_ino of its file.
        is_image: that is known to be a disk image.
    """

    def __init__(self, identity: tuple[int, int], *, is_image: bool) -> None:
        self.device, self.inode = identity
        self.is_image = is_image

    def release(self) -> None:
        """Nothing is held."""


class MemoryRegistry:
    """All guest memory files of this process, each owned by one VM.

    A file that another VM already owns is refused: two guests that share RAM would have their
    discards hit each other (and an attacker's VMM could pass a neighbour's file).

    Attributes:
        images: files that are never mapped here.
    """

    def __init__(self, store: FdStore | None = None) -> None:
        """store: where a successor finds the files; None: there will be none."""
        self._store = NoStore() if store is None else store
        self._adopted: list[_MemoryFile] = []
        self._files: dict[tuple[int, int], _MemoryFile] = {}
        self.images = ImageFiles()
        # Mapping a large file takes a moment: its VM waits then, not the event loop.
        self._threads = trio.CapacityLimiter(_MAPPING_THREADS_MAX)

    def __len__(self) -> int:
        """Files mapped now."""
        return len(self._files)

    def memory_owner(self, identity: tuple[int, int]) -> str | None:
        """The VM whose guest memory this file is; None: it is not mapped."""
        file = self._files.get(identity)
        return None if file is None else file.owner

    async def hold(self, owner: str, request: RegionRequest) -> HeldRegion | UnmappedRegion:
        """Map the region's file for the VM `owner`, unless it is mapped, and keep it mapped.

        A disk image is left alone, and so is a file that is no memory.

        Raises:
            FrontendError: the descriptor is of no file that may be guest memory, the region lies
                outside its file or is not aligned to its pages, or another VM owns the file.
        """
        found = _identify(request.file)
        identity = (found.device, found.inode)
        if identity not in self._files:
            await self.images.look(owner)  # before it is mapped
        if identity in self.images:
            return UnmappedRegion(identity, is_image=True)
        if not stat.S_ISREG(found.mode) or found.size == 0:
            raise FrontendError("memory region: its descriptor is no memory file")
        file = self._files.get(identity)
        if file is None:
            file = await self._map(owner, identity, request.file)
        if file is None:
            return UnmappedRegion(identity, is_image=identity in self.images)
        if file.owner != owner:
            raise FrontendError(f"memory region: its file is the memory of VM {file.owner!r}")
        try:
            region = _checked_region(request, file.mapping)
            return HeldRegion(self, file, region)
        finally:
            if file.users == 0:
                self._forget(file)

    async def _map(self, owner: str, identity: tuple[int, int], fd: OwnedFd) -> _MemoryFile | None:
        """Map a file; None: it is of neither shmem nor hugetlbfs, or has become a disk."""
        if sum(file.owner == owner for file in self._files.values()) >= FILES_PER_VM_MAX:
            raise FrontendError(
                f"memory region: this VM has {FILES_PER_VM_MAX} memory files already, and no more"
                " are kept of one VM"
            )
        try:
            mapping = await trio.to_thread.run_sync(Mapping, fd.fileno(), limiter=self._threads)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return None
            reason = os.strerror(error.errno or 0)
            raise FrontendError(f"memory region: its file cannot be mapped: {reason}") from error
        if identity in self.images:
            mapping.close()
            return None
        # Another device of the same VM may have mapped it while we were in the thread.
        file = self._files.setdefault(identity, _MemoryFile(identity, owner, mapping))
        if file.mapping is not mapping:
            mapping.close()
        else:
            self._store.keep(file.name("memory"), fd.fileno())
            self._store.keep(file.name("bitmap"), mapping.given_up_fd)
        return file

    async def adopt(self, owner: str, fd: OwnedFd, bitmap: OwnedFd | None) -> None:
        """Map a file that a predecessor had for the VM `owner`; settle() lets go of it.

        One that is a disk is not mapped again.

        Args:
            fd: the file; bitmap: its pages in the balloon, None: not known any more. Both are
                closed.

        Raises:
            HostError: it can't be mapped any more.
        """
        await self.images.look(owner, at_most_s=ADOPT_TIMEOUT_S)
        with fd, nullcontext() if bitmap is None else bitmap:
            identity, mapping = await self._map_again(fd, bitmap)
        file = _MemoryFile(identity, owner, mapping, users=1)
        if identity in self.images:
            self._store.forget(owner, [file.name("memory"), file.name("bitmap")])
            mapping.close()
            return
        self._files[identity] = file
        self._store.keep(
            file.name("bitmap"), mapping.given_up_fd
        )  # a new one where it is converted
        self._adopted.append(file)

    async def _map_again(
        self, fd: OwnedFd, bitmap: OwnedFd | None
    ) -> tuple[tuple[int, int], Mapping]:
        given_up = -1 if bitmap is None else bitmap.fileno()
        try:
            found = identify_file(fd.fileno())
            mapping = await trio.to_thread.run_sync(
                lambda: Mapping(fd.fileno(), given_up), limiter=self._threads
            )
        except OSError as error:
            reason = _WHY_NOT_AGAIN.get(error.errno or 0) or os.strerror(error.errno or 0)
            raise HostError(error.errno, f"guest memory can't be mapped again: {reason}") from error
        return (found.device, found.inode), mapping

    def settle(self, owner: str) -> None:
        """What was adopted for this VM and nobody holds by now is let go of."""
        settled = [file for file in self._adopted if file.owner == owner]
        self._adopted = [file for file in self._adopted if file.owner != owner]
        for file in settled:
            self.drop(file)

    def hold_known(
        self, owner: str, identity: tuple[int, int], guest_addr: int, size: int, file_offset: int
    ) -> HeldRegion | None:
        """Hold a region of a file that is mapped already; None: it is not, or not this VM's."""
        file = self._files.get(identity)
        if file is None or file.owner != owner:
            return None
        return HeldRegion(self, file, Region(guest_addr, size, file_offset, file.mapping))

    def drop(self, file: _MemoryFile) -> None:
        """One holder less; the last one unmaps the file."""
        file.users -= 1
        if file.users == 0:
            self._forget(file)

    def _forget(self, file: _MemoryFile) -> None:
        del self._files[file.identity]
        self._store.forget(file.owner, [file.name("memory"), file.name("bitmap")])
        file.mapping.close()


def _identify(file: OwnedFd) -> FileIdentity:
    try:
        return identify_file(file.fileno())
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise FrontendError(f"memory region: its file cannot be looked at: {reason}") from error


def _checked_region(request: RegionRequest, mapping: Mapping) -> Region:
    # The offset must fit the file's own (maybe huge) pages, or no discard would ever hit a whole
    # one; where the region begins and ends in guest addresses only needs the smallest page.
    for what, value, page_size in (
        ("guest address", request.guest_addr, BALLOON_PAGE_SIZE),
        ("size", request.size, BALLOON_PAGE_SIZE),
        ("file offset", request.file_offset, mapping.page_size),
    ):
        if value % page_size:
            raise FrontendError(
                f"memory region: {what} {value:#x} is not a multiple of {page_size} byte pages"
            )
    if request.file_offset + request.size > mapping.size:
        raise FrontendError(
            f"memory region: {request.file_offset:#x}+{request.size:#x} is beyond the end of its"
            f" file ({mapping.size:#x} bytes)"
        )
    return Region(request.guest_addr, request.size, request.file_offset, mapping)
