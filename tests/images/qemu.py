"""QEMU as another user of an image: it has one of its disks, and never runs its CPU.

Knows command line options. Must not know whose image it is.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.vm import qemu
from tests.vm.cache import Cache, cache_root

TIMEOUT_S = 30.0


def command() -> tuple[str, ...]:
    """What starts QEMU; the test is skipped where there is none and `make stack` was not run."""
    found = qemu.find_installed()
    if found is None:
        tree = Cache(cache_root()).find("qemu", qemu.RECIPE)
        if tree is None:
            pytest.skip("no QEMU here; make stack fetches one")
        found = qemu.unpacked(tree)
    return found.command


def _arguments(image: Path, *, readonly: bool, share_rw: bool) -> list[str]:
    access = "on" if readonly else "off"
    sharing = "on" if share_rw else "off"
    return [
        *command(),
        *("-M", "q35", "-accel", "tcg", "-S", "-display", "none", "-nodefaults", "-qmp", "stdio"),
        *("-drive", f"if=none,id=d,format=raw,readonly={access},file={image}"),
        *("-device", f"virtio-blk-pci,drive=d,share-rw={sharing}"),
    ]


@contextmanager
def user_of(image: Path, *, readonly: bool = False, share_rw: bool = False) -> Iterator[None]:
    """Inside the block QEMU has the image."""
    with subprocess.Popen(
        _arguments(image, readonly=readonly, share_rw=share_rw),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            assert "QMP" in process.stdout.readline()
            # Commands are answered once all devices are there.
            process.stdin.write('{"execute": "qmp_capabilities"}\n')
            process.stdin.flush()
            answer = process.stdout.readline()
            if "return" not in answer:
                assert process.stderr is not None
                raise AssertionError(f"QEMU does not take it: {process.stderr.read()}")
            yield
        finally:
            process.kill()


def refusal(image: Path, *, readonly: bool = False) -> str:
    """What QEMU says when it ends because it can't have the image."""
    done = subprocess.run(
        _arguments(image, readonly=readonly, share_rw=False),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1, "QEMU took it"
    return done.stderr
