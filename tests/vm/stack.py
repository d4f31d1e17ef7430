"""Prepare everything a test guest needs, once: QEMU, guest kernels, one initramfs a kernel.

`python -m tests.vm.stack --kernels 6.1,6.12,7` fills the cache folder from the host's own Debian
mirror, without root and without touching the system; a second run finds everything there.
This file must not know how a guest is started (guest.py does).
"""

import argparse
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.vm import e2fsprogs, initramfs, kernels, qemu
from tests.vm.cache import Cache, StackError, cache_root, say
from tests.vm.debian import Archive

DEFAULT_KERNELS = ("6.12",)
# Where kernels are looked for, in this order; an archive is asked only when one is missing.
RELEASES = (qemu.RELEASE, "bookworm")


@dataclass(frozen=True)
class Kernel:
    """A guest kernel: its series as asked for ("6.12"), its full release, and what boots it."""

    series: str
    release: str
    image: Path
    initramfs: Path
    config: Path | None


@dataclass(frozen=True)
class Stack:
    """What is ready in the cache folder."""

    cache: Path
    qemu: qemu.Qemu
    e2fsprogs: e2fsprogs.E2fsprogs
    kernels: dict[str, Kernel]

    def kernel(self, series: str) -> Kernel:
        """The kernel of `series`. Raises StackError if it was not among those asked for."""
        if series not in self.kernels:
            raise StackError(f"kernel {series} was not prepared: ensure() it first")
        return self.kernels[series]


class _Archives:
    """The Debian releases, each opened and updated when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, Archive] = {}

    def open(self, release: str) -> Archive:
        if release not in self._open:
            archive = Archive(self._folder / release, release)
            say(f"reading the package index of {release} from {archive.address}")
            archive.update()
            self._open[release] = archive
        return self._open[release]

    def with_kernel(self, series: str) -> tuple[Archive, str]:
        found = kernels.find_newest(map(self.open, RELEASES), series)
        if found is None:
            raise StackError(
                f"no {kernels.METAPACKAGE} {series}.x in Debian {' or '.join(RELEASES)}"
            )
        return found


class _Preparation:
    """One ensure(): finds what is finished, builds the rest."""

    def __init__(self, cache: Cache, wanted: Sequence[str]) -> None:
        self.cache = cache
        self.wanted = wanted
        self.installed = qemu.find_installed()

    def find(self) -> Stack | None:
        """The stack, if every part of it is finished."""
        machine = self.installed
        if machine is None:
            tree = self.cache.find("qemu", qemu.RECIPE)
            if tree is None:
                return None
            machine = qemu.unpacked(tree)
        programs = self.cache.find("programs", initramfs.programs_recipe())
        busybox = self.cache.find("busybox", initramfs.BUSYBOX_RECIPE)
        filesystem = self.cache.find("e2fsprogs", e2fsprogs.RECIPE)
        if programs is None or busybox is None or filesystem is None:
            return None
        found: dict[str, Kernel] = {}
        for series in self.wanted:
            kernel = self._find_kernel(series, programs, busybox, filesystem)
            if kernel is None:
                return None
            found[series] = kernel
        return Stack(self.cache.root, machine, e2fsprogs.E2fsprogs(filesystem), found)

    def _find_kernel(
        self, series: str, programs: Path, busybox: Path, filesystem: Path
    ) -> Kernel | None:
        folder = self.cache.find(f"kernel-{series}", kernels.recipe(series))
        if folder is None:
            return None
        parts = initramfs.Parts(folder, programs, busybox, filesystem)
        root = self.cache.find(f"initramfs-{series}", initramfs.recipe(series, parts))
        if root is None:
            return None
        config = folder / "config"
        return Kernel(
            series=series,
            release=(folder / "release").read_text().strip(),
            image=folder / "vmlinuz",
            initramfs=root / "initramfs.cpio",
            config=config if config.is_file() else None,
        )

    def build(self) -> None:
        """Build what is missing. The caller holds the cache's lock."""
        apt = self.cache.root / "apt"
        archives = _Archives(apt)
        programs = self.cache.build(
            "programs", initramfs.programs_recipe(), initramfs.compile_programs
        )
        busybox = self.cache.build(
            "busybox",
            initramfs.BUSYBOX_RECIPE,
            lambda folder: initramfs.fetch_busybox(archives.open(qemu.RELEASE), folder),
        )
        filesystem = self.cache.build(
            "e2fsprogs",
            e2fsprogs.RECIPE,
            lambda folder: e2fsprogs.fetch(archives.open(qemu.RELEASE), folder),
        )
        if self.installed is None:
            self.cache.build(
                "qemu",
                qemu.RECIPE,
                lambda folder: qemu.fetch(archives.open(qemu.RELEASE), folder),
            )
        for series in self.wanted:
            self._build_kernel(archives, series, programs, busybox, filesystem)
        # The indexes are of no use once everything is there; kept, they would only grow stale.
        shutil.rmtree(apt, ignore_errors=True)

    def _build_kernel(
        self, archives: _Archives, series: str, programs: Path, busybox: Path, filesystem: Path
    ) -> None:
        def fetch(folder: Path) -> None:
            archive, version = archives.with_kernel(series)
            kernels.fetch(archive, series, version, folder)

        kernel = self.cache.build(f"kernel-{series}", kernels.recipe(series), fetch)
        parts = initramfs.Parts(kernel, programs, busybox, filesystem)
        self.cache.build(
            f"initramfs-{series}",
            initramfs.recipe(series, parts),
            lambda folder: initramfs.write(parts, folder),
        )


def ensure(wanted: Sequence[str] = DEFAULT_KERNELS) -> Stack:
    """Make sure that QEMU and the `wanted` kernel series are ready, fetching what is missing.

    A series is "6.12" or just "7" for the newest 7.x. Takes well under a second when everything
    is there. Raises StackError, one line, when something cannot be had.
    """
    for series in wanted:
        if not re.fullmatch(r"\d+(\.\d+)?", series):
            raise StackError(f"'{series}' is no kernel series: write 6.12, or 7 for the newest 7.x")
    preparation = _Preparation(Cache(cache_root()), wanted)
    stack = preparation.find()
    if stack is not None:
        return stack
    with preparation.cache.locked():
        preparation.build()
    stack = preparation.find()
    if stack is None:
        raise StackError(f"{preparation.cache.root} changed while it was filled: run again")
    return stack


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: prepare and say what is ready; exit 1 with one line on stderr if impossible."""
    parser = argparse.ArgumentParser(prog="python -m tests.vm.stack", description=__doc__)
    parser.add_argument(
        "--kernels",
        default=",".join(DEFAULT_KERNELS),
        help="kernel series, separated by commas (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        stack = ensure(tuple(options.kernels.split(",")))
    except StackError as error:
        print(f"vm: {error}", file=sys.stderr)
        return 1
    say(f"QEMU {stack.qemu.version}")
    for kernel in stack.kernels.values():
        say(f"kernel {kernel.series}: {kernel.release}")
    say(f"ready in {time.monotonic() - started:.1f} s: {stack.cache}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
