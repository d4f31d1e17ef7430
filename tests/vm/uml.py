"""User Mode Linux: a second VMM that speaks vhost-user, by the driver virtio_uml of its kernel.

Debian's package is unpacked into the cache and run from there. Its kernel has virtio_balloon, and
neither virtio_pmem nor virtio_mem. The guest's root is a folder of the host, by which commands go
in and output comes out. This file must not know vhostd.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from tests.vm.cache import Cache, Recipe, StackError, cache_root, say
from tests.vm.debian import Archive, unpack
from tests.vm.initramfs import BUSYBOX_RECIPE

PACKAGE = "user-mode-linux"
RELEASE = "bookworm"
MODULES = ("virtio_balloon.ko",)
RECIPE: Recipe = {"version": 1, "package": PACKAGE, "release": RELEASE, "modules": list(MODULES)}
BOOT_TIMEOUT_S = 60.0
LOOK_AGAIN_S = 0.05  # nothing announces what a guest writes into a folder

INIT = """\
#!/bin/sh
export PATH=/bin
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t tmpfs tmpfs /tmp
for module in /lib/*.ko; do busybox insmod $module; done
number=0
while :; do
    while [ ! -e /commands/$number ]; do busybox sleep 0.1; done
    sh /commands/$number > /commands/$number.output 2>&1
    echo $? > /commands/$number.new
    busybox mv /commands/$number.new /commands/$number.status
    number=$((number + 1))
done
"""


class UmlFailed(Exception):
    """It ended, or a command in it failed; the text has the end of what it printed."""


def ensure() -> Path:
    """The folder with the kernel and its modules, fetched once. Raises StackError."""
    cache = Cache(cache_root())
    found = cache.find("uml", RECIPE)
    if found is not None:
        return found
    with cache.locked():
        return cache.build("uml", RECIPE, lambda folder: _fetch(cache.root / "apt-uml", folder))


def _fetch(apt: Path, folder: Path) -> None:
    archive = Archive(apt, RELEASE)
    archive.update()
    versions = archive.versions(PACKAGE)
    if not versions:
        raise StackError(f"no {PACKAGE} in Debian {RELEASE} of {archive.address}")
    say(f"downloading {PACKAGE} {versions[0]['Version']}")
    tree = folder / "tree"
    unpack(archive.download([(PACKAGE, versions[0]["Version"])]), tree)
    (tree / "usr/bin/linux.uml").rename(folder / "linux")
    for name in MODULES:
        next(tree.rglob(name)).rename(folder / name)
    shutil.rmtree(tree)
    shutil.rmtree(apt)


@dataclass
class UmlGuest:
    """A running User Mode Linux. Made by boot()."""

    process: subprocess.Popen[bytes]
    root: Path
    log_path: Path
    _number: int = 0

    async def run(self, command: str, timeout_s: float = 30) -> str:
        """Run a command with busybox' sh, return what it printed.

        Raises:
            UmlFailed: it exited with another status than 0, took too long, or the guest ended.
        """
        place = self.root / "commands" / str(self._number)
        self._number += 1
        status, output = place.with_suffix(".status"), place.with_suffix(".output")
        unfinished = place.with_suffix(".unfinished")
        unfinished.write_text(command + "\n")
        unfinished.rename(place)
        with trio.move_on_after(timeout_s):
            while not status.exists() and self.process.poll() is None:  # noqa: ASYNC110
                await trio.sleep(LOOK_AGAIN_S)
        text = output.read_text(errors="replace") if output.exists() else ""
        if not status.exists() or status.read_text().strip() != "0":
            raise UmlFailed(f"{command}: {text}\n{self.log()}")
        return text

    def log(self) -> str:
        """The end of what kernel and init printed."""
        return self.log_path.read_text(errors="replace")[-4000:]

    def memory_size(self) -> int:
        """Bytes of host memory that the file of the guest's RAM takes up."""
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            target = str(link.readlink())
            if target.startswith("/dev/shm/") and target.endswith("(deleted)"):
                return link.stat().st_blocks * 512
        raise UmlFailed(f"no memory file\n{self.log()}")


@asynccontextmanager
async def boot(
    kernel: Path, folder: Path, balloon: Path, memory: str = "256M"
) -> AsyncIterator[UmlGuest]:
    """A guest whose balloon is served at `balloon`; it ends with the block.

    Its RAM is a file in /dev/shm, which must be a tmpfs that allows PROT_EXEC.

    Raises:
        UmlFailed: it does not come up.
    """
    busybox = Cache(cache_root()).find("busybox", BUSYBOX_RECIPE)
    assert busybox is not None, "the stack was made, which has it"
    root = folder / "uml"
    for name in ("bin", "dev", "proc", "sys", "tmp", "lib", "commands"):
        (root / name).mkdir(parents=True)
    shutil.copy(busybox / "busybox", root / "bin/busybox")
    (root / "bin/sh").symlink_to("busybox")
    for name in MODULES:
        shutil.copy(kernel / name, root / "lib")
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    log_path = folder / "uml.log"
    command = [
        *("setpriv", "--pdeathsig", "KILL", "--"),
        *(sys.executable, "-m", "tests.vm.without_xstate", str(kernel / "linux")),
        *(f"mem={memory}", "con=null", "con0=null,fd:1", f"uml_dir={folder}"),
        *("root=/dev/root", "rootfstype=hostfs", f"rootflags={root}", "rw", "init=/init"),
        f"virtio_uml.device={balloon}:5",
    ]
    with log_path.open("wb") as log:
        process = subprocess.Popen(  # noqa: ASYNC220  # returns at once
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            process_group=0,
            env={**os.environ, "TMPDIR": "/dev/shm"},
        )
    guest = UmlGuest(process, root, log_path)
    try:
        await guest.run("true", BOOT_TIMEOUT_S)
        yield guest
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
