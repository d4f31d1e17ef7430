"""Builds the C core with the sanitizers beside the ordinary one and runs these tests on it.

    python -m tests.native.sanitize [pytest arguments]

The copy lies in build/sanitize and is built anew each time; the installed extension is not
touched. Leaks are not looked for: the interpreter itself never frees all it has.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
COPY: Final = ROOT / "build" / "sanitize"
SANITIZERS: Final = "address,undefined"
BUILD_LIMIT_S: Final = 600
C_PROGRAMS: Final = ("--ignore=tests/native/test_ring_c.py",)  # built with sanitizers anyway
PARTS: Final = ("c_src", "vhostd", "tests/__init__.py", "tests/fakes", "tests/native")


def copy_tree() -> None:
    """Copy what is built and run, without what an ordinary build left there."""
    shutil.rmtree(COPY, ignore_errors=True)
    (COPY / "tests").mkdir(parents=True)
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            ignored = shutil.ignore_patterns("_core*.so", "_core.c", "__pycache__")
            shutil.copytree(source, COPY / part, ignore=ignored)
        else:
            shutil.copy2(source, COPY / part)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, COPY / name)


def build() -> None:
    """Compile the copy's extension in place.

    Raises:
        subprocess.CalledProcessError: it does not compile.
    """
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()"]
    environment = os.environ | {"VHOSTD_SANITIZE": SANITIZERS}
    subprocess.run(
        [*command, "--quiet", "build_ext", "--inplace"],
        cwd=COPY,
        env=environment,
        check=True,
        timeout=BUILD_LIMIT_S,
    )


def runtime(library: str) -> str:
    """The path of one of gcc's sanitizer libraries."""
    found = subprocess.run(
        ["gcc", f"-print-file-name={library}"], check=True, capture_output=True, text=True
    )
    return found.stdout.strip()


def run(arguments: list[str]) -> int:
    """Run the copy's tests; return pytest's exit status."""
    # libstdc++ must be there when the sanitizer looks for __cxa_throw, which it does at its start.
    libraries = [runtime("libasan.so"), runtime("libstdc++.so.6")]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:handle_sigbus=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": str(COPY),
    }
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/native", *C_PROGRAMS, *arguments],
        cwd=COPY,
        env=environment,
        check=False,
    )
    return tests.returncode


def main() -> int:
    """Copy, build, run."""
    copy_tree()
    build()
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
