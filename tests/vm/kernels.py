"""Guest kernels: find the newest package of a series, keep its image and the modules tests use.

Package names come out of the archive's own indexes (the linux-image-cloud-amd64 metapackage and
what it depends on), so a point release that replaces the last one needs no change here.
This file must not know how guests are started.
"""

import lzma
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.vm.cache import Recipe, StackError, say
from tests.vm.debian import Archive, Paragraph, unpack

METAPACKAGE = "linux-image-cloud-amd64"
# From Linux 7 on Debian splits image and modules; older kernels have everything in linux-image-*.
_PARTS = re.compile(r"linux-(?:image|binary|modules)-\d")
# What a test may load. Those a kernel has built in, or does not have at all, are left out.
MODULES = (
    "virtio_pci",
    "virtio_balloon",
    "virtio_mem",
    "virtio_pmem",
    "nd_pmem",
    "nd_btt",
    "dax_pmem",
    "device_dax",
    "kmem",
    "ext4",
    "zram",
    "loop",
    "virtio_blk",
)


def recipe(series: str) -> Recipe:
    """What a kernel component is made of; a change here makes every cache build it anew."""
    return {"version": 1, "series": series, "package": METAPACKAGE, "modules": list(MODULES)}


def belongs(version: str, series: str) -> bool:
    """Whether package version "6.12.107-1" is of series "6.12" (or "6", but not "6.1")."""
    wanted = series.split(".")
    return re.split(r"[.\-+~]", version)[: len(wanted)] == wanted


def find_newest(archives: Iterable[Archive], series: str) -> tuple[Archive, str] | None:
    """The first archive that carries `series`, and the newest metapackage version of it there."""
    for archive in archives:
        for entry in archive.versions(METAPACKAGE):
            if belongs(entry["Version"], series):
                return archive, entry["Version"]
    return None


def _kernel_dependencies(entry: Paragraph) -> Iterable[tuple[str, str | None]]:
    for clause in re.split(r"\s*[,|]\s*", entry.get("Depends", "").replace("\n", " ")):
        match = re.match(r"(?P<name>[^ (:]+)(?:\s*\(=\s*(?P<version>[^)]+)\))?", clause)
        if match is not None and _PARTS.match(match["name"]):
            yield match["name"], match["version"]


def _packages(archive: Archive, version: str) -> list[tuple[str, str]]:
    """The real packages behind the metapackage: (name, version) pairs."""
    found: dict[str, str] = {}
    waiting = [archive.record(METAPACKAGE, version)]
    while waiting:
        entry = waiting.pop()
        for name, exact in _kernel_dependencies(entry):
            if name in found:
                continue
            record = archive.record(name, exact or entry["Version"])
            found[name] = record["Version"]
            waiting.append(record)
    return sorted(found.items())


def fetch(archive: Archive, series: str, version: str, folder: Path) -> None:
    """Fill `folder` with the kernel: `vmlinuz`, `release`, `modules/` and maybe `config`.

    Raises StackError if the packages cannot be had or do not look like a kernel.
    """
    packages = _packages(archive, version)
    say(f"kernel {series}: downloading {METAPACKAGE} {version}")
    archive.discard_downloads()
    tree = folder / "tree"
    unpack(archive.download(packages), tree)
    archive.discard_downloads()
    # boot/vmlinuz-RELEASE up to Linux 6, usr/lib/modules/RELEASE/vmlinuz from 7 on.
    images = [*tree.glob("boot/vmlinuz-*"), *tree.glob("**/lib/modules/*/vmlinuz")]
    libraries = list(tree.glob("**/lib/modules/*"))
    if len(images) != 1 or len(libraries) != 1:
        names = " ".join(name for name, _ in packages)
        raise StackError(f"kernel {series}: no single boot image and module folder in {names}")
    library = libraries[0]
    images[0].rename(folder / "vmlinuz")
    (folder / "release").write_text(library.name + "\n")
    for config in [*tree.glob("boot/config-*"), *library.glob("config")]:
        config.rename(folder / "config")
    keep_modules(library, folder / "modules", MODULES)
    shutil.rmtree(tree)


def _module_name(file: Path) -> str:
    return file.name.split(".ko")[0].replace("-", "_")


def _module_bytes(file: Path) -> bytes:
    data = file.read_bytes()
    if file.suffix == ".xz":
        return lzma.decompress(data)
    if file.suffix == ".zst":
        return subprocess.run(["zstd", "-dc"], input=data, capture_output=True, check=True).stdout
    return data


def _dependencies(module: bytes) -> list[str]:
    """What the `depends` entry of the module's .modinfo section names."""
    match = re.search(rb"\0depends=([^\0]*)\0", module)
    names = match[1].decode().split(",") if match is not None else []
    return [name.replace("-", "_") for name in names if name]


def keep_modules(library: Path, destination: Path, wanted: Iterable[str]) -> None:
    """Copy `wanted` modules and all they depend on, uncompressed and flat, with a modules.dep.

    `library` is a kernel's /lib/modules/RELEASE without depmod's files (packages carry none:
    their maintainer script runs depmod). Busybox cannot load compressed modules.
    """
    files = {_module_name(file): file for file in library.glob("kernel/**/*.ko*")}
    destination.mkdir()
    needs: dict[str, list[str]] = {}
    waiting = [name for name in wanted if name in files]
    while waiting:
        name = waiting.pop()
        if name in needs:
            continue
        data = _module_bytes(files[name])
        (destination / f"{name}.ko").write_bytes(data)
        needs[name] = [need for need in _dependencies(data) if need in files]
        waiting += needs[name]

    def closure(name: str) -> list[str]:
        # Nearest first, each once: modprobe loads the list from its end.
        order: list[str] = []
        for need in needs[name]:
            for item in (need, *closure(need)):
                if item in order:
                    order.remove(item)
                order.append(item)
        return order

    lines = [
        f"{name}.ko: {' '.join(f'{need}.ko' for need in closure(name))}".rstrip()
        for name in sorted(needs)
    ]
    (destination / "modules.dep").write_text("".join(f"{line}\n" for line in lines))
    for listing in ("modules.builtin", "modules.order"):
        if (library / listing).is_file():
            shutil.copy(library / listing, destination / listing)
