"""Which files become guest memory: a disk never does, in whatever order the two come."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from vhostd._native import Mapping
from vhostd.errors import HostError
from vhostd.fds import OwnedFd
from vhostd.memory import registry as registry_module
from vhostd.memory.image_files import SEARCH_TIMEOUT_S
from vhostd.memory.registry import HeldRegion, MemoryRegistry, RegionRequest, UnmappedRegion

from tests.fakes.memory import MIB, open_memfd

MEMORY_FOLDER = "/dev/shm"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory, where a file could be mapped as a guest's."""
    with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER) as made:
        yield Path(made)


def make_file(path: Path) -> Path:
    """A file of one MiB."""
    path.write_bytes(b"\xab" * MIB)
    return path


def request(path: Path) -> RegionRequest:
    """A VMM names all of a file as memory."""
    return RegionRequest(0, MIB, 0, OwnedFd(os.open(path, os.O_RDWR)))


def is_mapped(path: Path) -> bool:
    """Whether this process has it mapped."""
    inode = str(path.stat().st_ino)
    lines = Path("/proc/self/maps").read_text().splitlines()
    return any(line.split()[4] == inode for line in lines)


@pytest.mark.parametrize("disk_of", ["web", "db"])
async def test_a_configured_disk_is_no_memory_before_any_vmm_has_it(
    folder: Path, disk_of: str
) -> None:
    image = make_file(folder / "disk.img")
    os.link(image, folder / "link")
    registry = MemoryRegistry()
    registry.images.expect(disk_of, [image])
    for name in ("disk.img", "link"):  # at once: nobody has looked for the disks yet
        held = await registry.hold("web", request(folder / name))
        assert isinstance(held, UnmappedRegion)
        assert held.is_image
    assert not is_mapped(image)


async def test_a_disk_made_after_the_start_is_no_memory(folder: Path) -> None:
    image = folder / "disk.img"
    registry = MemoryRegistry()
    registry.images.expect("web", [image])
    await registry.images.look("web")
    make_file(image)
    assert isinstance(await registry.hold("web", request(image)), UnmappedRegion)
    assert not is_mapped(image)


async def test_a_file_that_becomes_a_disk_while_it_is_mapped_is_no_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_file(folder / "ram")
    status = file.stat()
    registry = MemoryRegistry()

    def map_late(fd: int) -> Mapping:
        mapping = Mapping(fd)
        trio.from_thread.run_sync(registry.images.opened, (status.st_dev, status.st_ino))
        return mapping

    monkeypatch.setattr(registry_module, "Mapping", map_late)
    assert isinstance(await registry.hold("web", request(file)), UnmappedRegion)
    assert not is_mapped(file)


async def test_memory_that_is_to_be_a_disk_is_known_by_its_owner(folder: Path) -> None:
    file = make_file(folder / "ram")
    registry = MemoryRegistry()
    held = await registry.hold("web", request(file))
    assert isinstance(held, HeldRegion)
    assert registry.memory_owner((held.device, held.inode)) == "web"
    held.release()
    assert registry.memory_owner((held.device, held.inode)) is None


async def test_a_disk_that_a_predecessor_had_mapped_is_not_mapped_again(folder: Path) -> None:
    image = make_file(folder / "disk.img")
    registry = MemoryRegistry()
    registry.images.expect("db", [image])
    await registry.adopt("web", OwnedFd(os.open(image, os.O_RDWR)), None)
    assert not is_mapped(image)
    status = image.stat()
    assert registry.hold_known("web", (status.st_dev, status.st_ino), 0, MIB, 0) is None


@pytest.mark.parametrize(
    ("size", "why"), [(0, "truncated"), (MIB // 2, "changed the size")], ids=["all", "half"]
)
async def test_memory_truncated_before_a_take_over_is_one_plain_error(size: int, why: str) -> None:
    registry = MemoryRegistry()
    fd = open_memfd(64 * MIB)
    held = await registry.hold("web", RegionRequest(0, 64 * MIB, 0, OwnedFd(os.dup(fd))))
    assert isinstance(held, HeldRegion)
    bitmap = OwnedFd(os.dup(held.region.mapping.given_up_fd))
    os.ftruncate(fd, size)
    with pytest.raises(HostError, match=why):
        await MemoryRegistry().adopt("web", OwnedFd(fd), bitmap)
    held.release()


async def test_a_file_on_a_disks_file_system_is_left_alone(tmp_path: Path) -> None:
    file = make_file(tmp_path / "ram")
    held = await MemoryRegistry().hold("web", request(file))
    assert isinstance(held, UnmappedRegion)
    assert not held.is_image
    assert not is_mapped(file)


class HungStorage:
    """Has os.stat() of a path not come back, as on storage that is gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.asked = 0
        self._path = path
        self._answers = threading.Event()
        self._stat = os.stat
        monkeypatch.setattr(os, "stat", self._hang)

    def _hang(self, path: Any, *arguments: Any, **more: Any) -> os.stat_result:  # noqa: ANN401
        if path == self._path:
            self.asked += 1
            self._answers.wait()
        return self._stat(path, *arguments, **more)

    def answer(self) -> None:
        """Let all who wait go on."""
        self._answers.set()


@pytest.mark.parametrize("disk_of", ["web", "db"])
async def test_storage_that_never_answers_costs_one_short_wait(
    disk_of: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_file(folder / "hangs")
    hung = HungStorage(monkeypatch, image)
    registry = MemoryRegistry()
    registry.images.expect(disk_of, [image])
    registry.images.expect("third", [make_file(folder / "answers")])
    started_s = trio.current_time()
    try:
        first = await registry.hold("web", request(make_file(folder / "ram")))
        others = [
            await registry.hold("web", request(make_file(folder / f"more{number}")))
            for number in range(5)
        ]
        assert trio.current_time() - started_s < 1.5 * SEARCH_TIMEOUT_S
        known = await registry.hold("web", request(folder / "answers"))
        assert isinstance(known, UnmappedRegion)
        assert hung.asked == 1
    finally:
        hung.answer()
    for held in [first, *others]:
        assert isinstance(held, HeldRegion)
        held.release()
    with trio.fail_after(SEARCH_TIMEOUT_S):
        while isinstance(held := await registry.hold("web", request(image)), HeldRegion):
            held.release()
            await trio.lowlevel.checkpoint()
    assert not is_mapped(image)
