"""The sdist is whole: a wheel built from it alone has a working core and all programs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("c_src", "docs", "systemd", "vhostd", "LICENSE", "Makefile", "README.md")
BUILT = shutil.ignore_patterns("__pycache__", "*.so", "_core.c")
LOOK = "from vhostd._native import _core; print(_core.__file__)"


def build(kind: str, source: Path, into: Path) -> Path:
    """Build an sdist or a wheel as pip does (PEP 517), with nothing but the source."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(into)!r}))"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return into / finished.stdout.splitlines()[-1]


def test_a_wheel_from_the_sdist_works(tmp_path: Path) -> None:
    checkout, dist = tmp_path / "checkout", tmp_path / "dist"
    checkout.mkdir()
    dist.mkdir()
    for name in (*SOURCES, "pyproject.toml"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, checkout / name, ignore=BUILT)
        else:
            shutil.copy(ROOT / name, checkout / name)
    with tarfile.open(build("sdist", checkout, dist)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    held = {path.relative_to(unpacked) for path in unpacked.rglob("*") if path.is_file()}
    for folder in ("c_src", "docs", "systemd"):
        tracked = {path.relative_to(checkout) for path in (checkout / folder).rglob("*.*")}
        assert tracked <= held
    shutil.rmtree(checkout)

    installed = tmp_path / "installed"
    with zipfile.ZipFile(build("wheel", unpacked, dist)) as wheel:
        wheel.extractall(installed)
        (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        programs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
        told = wheel.read(entry_points).decode()
        assert all(f"{name} = {target}" in told for name, target in programs.items())
    looked = subprocess.run(
        [sys.executable, "-P", "-c", LOOK],
        env={"PYTHONPATH": str(installed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert looked.stdout.startswith(str(installed))
