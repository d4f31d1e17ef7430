"""Trees of files with a systemd in them: this machine's own, or a Debian release from scratch.

Must not know vhostd.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

from tests.vm.cache import Cache, Recipe, cache_root, say
from tests.vm.debian import host_sources

SYSTEMD: Final = Path("lib/systemd/systemd")
INCLUDED: Final = "systemd,systemd-sysv,dbus,procps,python3"
"""python3 for the libraries a Python needs."""

INSTALL_TIMEOUT_S: Final = 900


class NoTree(Exception):
    """It can't be had; the text says why."""


def of_this_machine() -> Path:
    """The root directory, with a systemd in it.

    Raises:
        NoTree: it has none, and it can't be installed.
    """
    root = Path("/")
    if not (root / SYSTEMD).exists():
        _install("systemd")
    return root


def of_debian(release: str) -> Path:
    """A Debian release in the cache folder, made there the first time.

    Raises:
        NoTree: it can't be made.
    """
    cache = Cache(cache_root())
    recipe: Recipe = {"release": release, "packages": INCLUDED}
    name = f"systemd-{release}"
    found = cache.find(name, recipe)
    if found is None:
        if shutil.which("debootstrap") is None:
            _install("debootstrap")
        with cache.locked():
            found = cache.build(name, recipe, lambda folder: _bootstrap(folder, release))
    return found / "root"


def _install(package: str) -> None:
    if shutil.which("apt-get") is None:
        raise NoTree(f"{package} is not installed, and there is no apt-get to install it with")
    say(f"installing {package}")
    command = ["apt-get", "install", "-y", "--no-install-recommends", package]
    if _run(command).returncode == 0:
        return
    _run(["apt-get", "update"])
    done = _run(command)
    if done.returncode != 0:
        raise NoTree(f"{package} cannot be installed: {done.stdout.strip().splitlines()[-1]}")


def _bootstrap(folder: Path, release: str) -> None:
    source, _ = host_sources()
    mirror = source["Uris"].split()[0]
    say(f"debootstrap of {release} from {mirror}")
    done = _run(
        [
            *("debootstrap", "--variant=minbase", f"--include={INCLUDED}"),
            *(release, str(folder / "root"), mirror),
        ]
    )
    if done.returncode != 0:
        raise NoTree(f"debootstrap {release}: {done.stdout.strip().splitlines()[-1]}")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=INSTALL_TIMEOUT_S,
        env={
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "DEBIAN_FRONTEND": "noninteractive",
        },
    )
