"""The guest's whole user space: busybox, our agent and memory tool, and one kernel's modules.

Writes the cpio archive itself: device nodes and owners need no root that way, and nothing but
gcc has to be installed. This file must not know how guests are started.
"""

import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tests.vm import e2fsprogs
from tests.vm.cache import Recipe, StackError, fingerprint, say
from tests.vm.debian import Archive, unpack
from tests.vm.e2fsprogs import E2fsprogs

HERE = Path(__file__).parent
SOURCES = {name: HERE / f"{name}.c" for name in ("agent", "guesttool", "disktool")}

BUSYBOX = "busybox-static"
BUSYBOX_RECIPE: Recipe = {"version": 1, "package": BUSYBOX}

_FLAGS = ("-static", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
_FOLDERS = (
    *("bin", "dev", "etc", "lib", "lib64", "lib/modules", "mnt", "proc", "root", "run", "sys"),
    "tmp",
)

INIT = """\
#!/bin/busybox sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
# Built in from Linux 6.12 on, a module in 6.1; the devices under test stay untouched either way.
modprobe virtio_pci
exec /bin/agent /dev/ttyS1
"""


def fetch_busybox(archive: Archive, folder: Path) -> None:
    """Fill `folder` with a static `busybox`. Raises StackError."""
    versions = archive.versions(BUSYBOX)
    if not versions:
        raise StackError(f"no {BUSYBOX} in Debian {archive.release} of {archive.address}")
    say(f"downloading {BUSYBOX} {versions[0]['Version']}")
    archive.discard_downloads()
    tree = folder / "tree"
    unpack(archive.download([(BUSYBOX, versions[0]["Version"])]), tree)
    archive.discard_downloads()
    # Where /bin and /usr/bin are not merged yet, the package has it in /bin.
    next(path for path in tree.glob("**/bin/busybox")).rename(folder / "busybox")
    shutil.rmtree(tree)


def programs_recipe() -> Recipe:
    """What the compiled programs are made of."""
    return {"version": 1, "sources": fingerprint(*SOURCES.values())}


def compile_programs(folder: Path) -> None:
    """Fill `folder` with the agent and the tools, static. Raises StackError."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise StackError("no C compiler: install gcc and libc6-dev")
    for name, source in SOURCES.items():
        result = subprocess.run(
            [compiler, *_FLAGS, "-o", folder / name, source],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode != 0:
            first = next(iter(result.stderr.splitlines()), "no output")
            raise StackError(f"cannot compile {source.name} with {compiler} -static: {first}")


class _Cpio:
    """Writes the "newc" format of the kernel's Documentation/driver-api/early-userspace."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._inode = 0

    def add(
        self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        """Append one entry; `mode` holds type and permissions, links carry their target as data."""
        self._inode += 1
        encoded = name.encode() + b"\0"
        # magic, ino, mode, uid, gid, nlink, mtime, size, dev, rdev, name size, checksum
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._padded(header + encoded)
        self._padded(data)

    def _padded(self, data: bytes) -> None:
        self._file.write(data + bytes(-len(data) % 4))

    def folder(self, name: str) -> None:
        """Append a folder."""
        self.add(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, mode: int = 0o755) -> None:
        """Append a regular file."""
        self.add(name, stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        """Append a symbolic link."""
        self.add(name, stat.S_IFLNK | 0o777, target.encode())

    def finish(self) -> None:
        """Append the entry that ends the archive."""
        self.add("TRAILER!!!", 0)


@dataclass(frozen=True)
class Parts:
    """Finished components an initramfs is put together from."""

    kernel: Path
    programs: Path
    busybox: Path
    e2fsprogs: Path


def recipe(series: str, parts: Parts) -> Recipe:
    """What the initramfs of one kernel is made of."""
    return {
        "version": 2,
        "series": series,
        "init": INIT,
        "kernel": parts.kernel.name,
        "programs": parts.programs.name,
        "busybox": parts.busybox.name,
        "e2fsprogs": parts.e2fsprogs.name,
    }


def _add_e2fsprogs(archive: _Cpio, parts: Parts) -> None:
    for name, path in E2fsprogs(parts.e2fsprogs).files():
        place = "lib" if ".so" in name else "etc"
        if name in e2fsprogs.PROGRAMS:
            place = "bin"
        elif name == e2fsprogs.LOADER:
            place = "lib64"
        archive.file(f"{place}/{name}", path.read_bytes())
    archive.link("bin/mkfs.ext4", "mke2fs")
    archive.link("bin/fsck.ext4", "e2fsck")


def write(parts: Parts, folder: Path) -> None:
    """Fill `folder` with `initramfs.cpio`. Uncompressed: unpacking costs an emulated guest more."""
    release = (parts.kernel / "release").read_text().strip()
    busybox = parts.busybox / "busybox"
    listing = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        raise StackError(f"{busybox} does not run on this machine")
    with (folder / "initramfs.cpio").open("wb") as file:
        archive = _Cpio(file)
        for name in _FOLDERS:
            archive.folder(name)
        for link in ("sbin", "usr"):
            archive.link(link, "bin" if link == "sbin" else ".")
        archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
        archive.add("dev/null", stat.S_IFCHR | 0o666, device=(1, 3))
        archive.file("init", INIT.encode())
        archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n", 0o644)
        archive.file("etc/group", b"root:x:0:\n", 0o644)
        archive.file("bin/busybox", busybox.read_bytes())
        for applet in listing.stdout.split():
            if applet != "busybox" and applet not in e2fsprogs.PROGRAMS:
                archive.link(f"bin/{applet}", "busybox")
        for name in SOURCES:
            archive.file(f"bin/{name}", (parts.programs / name).read_bytes())
        _add_e2fsprogs(archive, parts)
        modules = f"lib/modules/{release}"
        archive.folder(modules)
        for module in sorted((parts.kernel / "modules").iterdir()):
            archive.file(f"{modules}/{module.name}", module.read_bytes(), 0o644)
        archive.finish()
