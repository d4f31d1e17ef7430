"""Compiles c_src/ into vhostd._native._core; the cdef is API of c_src/ itself, to the letter.

Run by setuptools through pyproject.toml. VHOSTD_SANITIZE=address,undefined adds the sanitizers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import cffi
from setuptools.command.build_ext import build_ext

C_SOURCE: Final = Path("c_src")
API: Final = ("vhd_api.h", "vhd_image_api.h")
SHIPPED: Final = (C_SOURCE, Path("docs"), Path("systemd"))
"""What a source distribution has beside Python: what a wheel is built from, and what an operator
reads and installs."""
MODULE: Final = "vhostd._native._core"


class BuildExt(build_ext):
    """Generates the extension's C file before it is compiled with the core."""

    def run(self) -> None:
        """Generate, then compile."""
        generated = Path("vhostd/_native/_core.c")
        ffi = cffi.FFI()
        for name in API:
            ffi.cdef((C_SOURCE / name).read_text())
        ffi.set_source(MODULE, '#include "vhd.h"\n')
        ffi.emit_c_code(str(generated))
        for extension in self.extensions:
            if extension.name == MODULE:
                headers = sorted(map(str, C_SOURCE.glob("*.h")))
                sources = sorted(map(str, C_SOURCE.glob("*.c")))
                extension.sources = [str(generated), *sources]
                extension.depends = headers
                self._sanitize(extension.extra_compile_args, extension.extra_link_args)
        super().run()

    def get_source_files(self) -> list[str]:
        """What a source distribution has for the extension, and beside it."""
        shipped = (path for folder in SHIPPED for path in folder.rglob("*") if path.is_file())
        return ["Makefile", *sorted(str(path) for path in shipped if path.suffix != ".pyc")]

    @staticmethod
    def _sanitize(compile_args: list[str], link_args: list[str]) -> None:
        wanted = os.environ.get("VHOSTD_SANITIZE", "")
        if wanted:
            flag = f"-fsanitize={wanted}"
            compile_args += [flag, "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", "-g"]
            link_args.append(flag)
