"""An upgrade from the build of a commit before this one: its VM is taken over whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.daemon import VhostdProcess
from tests.fakes.balloon import BalloonDriver, BalloonQueue
from tests.fakes.machine import Machine
from tests.hostile.attack import serves

ROOT = Path(__file__).parents[2]
VM = "web"
CONFIGURATION = f"[vm.{VM}.balloon]\nstats_interval_s = 0\n"
NEEDED = "vhostd/takeover.py"
BUILD_TIMEOUT_S = 240

pytestmark = pytest.mark.timeout(600)


def git(*words: str) -> subprocess.CompletedProcess[bytes]:
    """Run git on this tree; a copy without history has none."""
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, check=False)


def last_commit() -> str:
    """The commit before this one."""
    # With changes that are not committed, it is the last commit that an operator would have.
    changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    return "HEAD" if changed else "HEAD~1"


@pytest.fixture(
    scope="module",
    params=["last", "e01e944", pytest.param("e65fd8a", marks=pytest.mark.long)],
    ids=["last", "layout 2", "layout 3"],
)
def previous(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a commit before this one is installed, for PYTHONPATH.

    The others left worker's memory of another layout: c_src/shared_before.c.
    """
    commit = last_commit() if request.param == "last" else request.param
    if git("cat-file", "-e", f"{commit}:{NEEDED}").returncode != 0:
        pytest.skip(f"{commit} is not there, or knows no take-over")
    folder = tmp_path_factory.mktemp("previous")
    source, target = folder / "source", folder / "installed"
    source.mkdir()
    archive = git("archive", commit)
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive.stdout, check=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run(
        [*install, str(target), "--no-build-isolation", str(source)],
        check=True,
        timeout=BUILD_TIMEOUT_S,
    )
    return target


async def test_a_vm_of_the_previous_build_is_taken_over(previous: Path, tmp_path: Path) -> None:
    release = tmp_path / "release"
    release.symlink_to(previous)
    environment = {"PYTHONPATH": str(release)}
    async with VhostdProcess.start(
        tmp_path, CONFIGURATION, "--keep", environment=environment
    ) as daemon:
        with Machine.boot(tmp_path / f"{VM}-balloon.sock") as machine:
            guest = BalloonDriver(machine)
            await trio.to_thread.run_sync(serves, guest)
            await daemon.ctl("balloon", "set", VM, "32M")
            assert loaded_from(daemon.worker) == previous
            before = await daemon.status(VM)
            worker = daemon.worker
            release.unlink()
            release.symlink_to(ROOT)
            daemon.process.send_signal(signal.SIGHUP)
            await daemon.replaced(worker, VM)
            assert loaded_from(daemon.worker) == ROOT
            assert machine.front.get_features() == machine.offer.features
            after = await daemon.status(VM)
            for key in ("target", "actual", "inflated", "features"):
                assert after["balloon"][key] == before["balloon"][key], key
            for index in (BalloonQueue.INFLATE, BalloonQueue.DEFLATE):
                await trio.to_thread.run_sync(serves, guest, index)
            machine.restart_afresh()
            await trio.to_thread.run_sync(serves, guest)


def loaded_from(pid: int) -> Path:
    """Where a daemon's native part is from."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        path = line.partition("/")[2]
        if "vhostd/_native/" in path:
            return Path(os.sep + path).parents[2]
    raise AssertionError("it has loaded no native part")
