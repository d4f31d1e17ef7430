"""QEMU: the user's own where it is new enough, else Debian's from backports, run in place.

The fetched tree is never installed: it runs through its own dynamic loader, so the host's libc
does not matter. This file must not know what is started with it.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.vm.cache import Recipe, StackError, say
from tests.vm.debian import Archive, unpack

PROGRAM = "qemu-system-x86_64"
NEEDED_DEVICE = "vhost-user-test-device-pci"
OLDEST = (11, 1)
PACKAGE = "qemu-system-x86"
RECIPE: Recipe = {"version": 1, "packages": [PACKAGE]}
RELEASE = "trixie"


@dataclass(frozen=True)
class Qemu:
    """How to start QEMU: `command` is what goes before its options."""

    command: tuple[str, ...]
    version: str


def _ask(command: tuple[str, ...], *options: str) -> str:
    try:
        result = subprocess.run(
            [*command, *options], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout


def _version(command: tuple[str, ...]) -> str | None:
    match = re.search(r"QEMU emulator version (\d+\.\d+\.\d+)", _ask(command, "--version"))
    return match[1] if match is not None else None


def _is_new_enough(version: str) -> bool:
    return tuple(int(part) for part in version.split(".")[:2]) >= OLDEST


def find_installed() -> Qemu | None:
    """The QEMU in PATH, if it is new enough and has the generic vhost-user device."""
    path = shutil.which(PROGRAM)
    if path is None:
        return None
    version = _version((path,))
    if version is None or not _is_new_enough(version):
        return None
    if f'"{NEEDED_DEVICE}"' not in _ask((path,), "-device", "help"):
        return None
    return Qemu((path,), version)


def _command(tree: Path) -> tuple[str, ...]:
    library = tree / "usr/lib/x86_64-linux-gnu"
    # --library-path is not inherited through the environment: helpers QEMU starts are the host's.
    return (
        str(library / "ld-linux-x86-64.so.2"),
        "--library-path",
        str(library),
        str(tree / "usr/bin" / PROGRAM),
        *("-L", str(tree / "usr/share/qemu")),
        *("-L", str(tree / "usr/share/seabios")),
        *("-L", str(tree / "usr/lib/ipxe/qemu")),
    )


def unpacked(folder: Path) -> Qemu:
    """The QEMU in the finished component `folder`."""
    return Qemu(_command(folder / "tree"), (folder / "qemu-version").read_text().strip())


def fetch(archive: Archive, folder: Path) -> None:
    """Fill `folder` with QEMU and its libraries. Raises StackError."""
    suite = f"{archive.release}-backports"
    say(f"QEMU: downloading {PACKAGE} and what it needs from {suite}")
    archive.discard_downloads()
    packages = archive.download_with_dependencies((PACKAGE,), suite)
    tree = folder / "tree"
    unpack(packages, tree)
    archive.discard_downloads()
    for unused in ("doc", "man", "locale", "info"):
        shutil.rmtree(tree / "usr/share" / unused, ignore_errors=True)
    command = _command(tree)
    version = _version(command)
    if version is None:
        raise StackError(f"the QEMU of {archive.address} does not run on this machine")
    if not _is_new_enough(version):
        raise StackError(
            f"{archive.release}-backports of {archive.address} carries QEMU {version}, "
            f"not >= {OLDEST[0]}.{OLDEST[1]}: install a newer one in PATH"
        )
    (folder / "qemu-version").write_text(version + "\n")
