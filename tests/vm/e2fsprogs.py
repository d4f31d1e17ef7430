"""mke2fs and e2fsck of Debian with the libraries they need, for guests and for the host.

This file must not know what an initramfs is, or which image is checked.
"""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.vm.cache import Recipe, StackError, say
from tests.vm.debian import Archive, unpack

PACKAGE = "e2fsprogs"
PROGRAMS = ("mke2fs", "e2fsck", "debugfs")
LOADER = "ld-linux-x86-64.so.2"
RECIPE: Recipe = {"version": 1, "package": PACKAGE, "programs": list(PROGRAMS)}


@dataclass(frozen=True)
class E2fsprogs:
    """The programs in the finished component `folder`."""

    folder: Path

    def files(self) -> Iterator[tuple[str, Path]]:
        """Name and path of every file: programs, libraries, loader, configuration."""
        for path in sorted(self.folder.iterdir()):
            if path.is_file():
                yield path.name, path

    def run(self, program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run one of them on the host; its exit status is the caller's business."""
        loader, file = str(self.folder / LOADER), str(self.folder / program)
        return subprocess.run(
            [loader, "--library-path", str(self.folder), file, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )


def _needed(file: Path) -> set[str]:
    """Names of the libraries an ELF file asks its loader for."""
    listing = subprocess.run(
        ["objdump", "-p", file], capture_output=True, text=True, check=False
    ).stdout
    return {line.split()[1] for line in listing.splitlines() if line.split()[:1] == ["NEEDED"]}


def fetch(archive: Archive, folder: Path) -> None:
    """Fill `folder` with the programs and all they need. Raises StackError."""
    say(f"downloading {PACKAGE}")
    archive.discard_downloads()
    tree = folder / "tree"
    unpack(archive.download_with_dependencies((PACKAGE,), archive.release), tree)
    archive.discard_downloads()
    # Real files only: sbin/mkfs.ext4 and the like are links to these.
    found = {path.name: path for path in tree.rglob("*") if path.is_file()}
    waiting = [*PROGRAMS, LOADER, "mke2fs.conf"]
    taken: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in taken:
            continue
        if name not in found:
            raise StackError(f"{PACKAGE} of {archive.address} comes without {name}")
        shutil.copy(found[name], folder / name)
        taken.add(name)
        waiting += _needed(folder / name)
    shutil.rmtree(tree)
