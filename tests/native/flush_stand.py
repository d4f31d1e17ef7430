"""A worker and a disk whose syncs are in a test's hands; the cases that need one, by name.

Knows vhostd._native and the fake guest; must not know the protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vhostd._native import Image

from tests.fakes.eventfd import wait_readable
from tests.fakes.sync_shim import SyncShim, WatchedFile
from tests.native.flush_rig import Disk, Posted, disk_on, open_image
from tests.native.rig import Host, Layout, wait_until

QUIET_S = 0.02  # the time to look at what must not happen


@dataclass
class Stand:
    """A worker, and a disk on it whose file's syncs are in our hands."""

    shim: SyncShim
    folder: Path
    layout: Layout
    host: Host
    file: WatchedFile
    disk: Disk

    def image(self, name: str) -> tuple[Image, WatchedFile]:
        """Another image."""
        image = open_image(self.folder / name)
        return image, self.shim.watch(self.folder / name)

    def hold(self, count: int = 1) -> list[Posted]:
        """Post flushes and wait until the sync for them is held."""
        began = len(self.file.calls())
        self.forget_calls()
        self.file.hold()
        posted = self.disk.post(count)
        self.file.wait_held(began + 1)
        return posted

    def forget_calls(self) -> None:
        """Forget those of answers that were seen in the ring before the guest was called."""
        with self.host.parked():
            self.disk.ring.driver.calls()

    def quiet(self, posted: list[Posted], disk: Disk | None = None) -> None:
        """None of these has an answer, and none comes."""
        disk = disk or self.disk
        assert disk.unanswered(posted)
        assert not wait_readable(disk.ring.driver.call_fd, QUIET_S), "the guest was called"
        assert disk.unanswered(posted)

    def wait_ended(self, count: int = 1) -> None:
        """Wait until so many syncs are over."""
        wait_until(lambda: sum(call.ended for call in self.file.calls()) == count)


CASES: dict[str, Callable[[Stand], None]] = {}


def case(function: Callable[[Stand], None]) -> Callable[[Stand], None]:
    """Make a function a case by its name."""
    CASES[function.__name__] = function
    return function


@contextmanager
def stand(layout: Layout, folder: Path) -> Iterator[Stand]:
    """Open everything, and look that nothing is kept in the end."""
    shim = SyncShim.inherited()
    with Host() as host:
        image = open_image(folder / "image")
        file = shim.watch(folder / "image")
        with disk_on(host, image, layout) as disk:
            yield Stand(shim, folder, layout, host, file, disk)
    kept = [name for name in open_files() if str(folder) in name]
    assert not kept, kept


def open_files() -> list[str]:
    """What the descriptors of this process point to."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the folder itself is closed by now
            found.append(str(link.readlink()))
    return found
