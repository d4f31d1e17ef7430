"""Libraries that stand below a program by LD_PRELOAD: how they are built and put there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

FLAGS: Final = ("-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror")


def build_library(source: Path, folder: Path) -> Path:
    """Compile one C file into a library of the same name in the folder.

    Raises:
        subprocess.CalledProcessError: it does not compile.
    """
    library = folder / source.with_suffix(".so").name
    environment = {key: text for key, text in os.environ.items() if key != "LD_PRELOAD"}
    command: Sequence[str | Path] = ["gcc", *FLAGS, "-o", library, source, "-ldl"]
    subprocess.run(command, env=environment, check=True, timeout=60)
    return library


def preloading(library: Path) -> str:
    """Return the value of LD_PRELOAD with the library behind what is preloaded already.

    A sanitizer insists on being first.
    """
    return " ".join([*os.environ.get("LD_PRELOAD", "").split(), str(library)])


@contextmanager
def environment_of(changes: Mapping[str, str]) -> Iterator[None]:
    """Programs that are started inside the block have these in their environment."""
    before = {key: os.environ.get(key) for key in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for key, text in before.items():
            if text is None:
                del os.environ[key]
            else:
                os.environ[key] = text
