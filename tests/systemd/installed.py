"""vhostd installed in a machine as an operator does: a venv, the programs in PATH, the units.

Knows where Python finds its library. Must not import the daemon's own code.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Final

from tests.systemd.machine import Machine

REPOSITORY: Final = Path(__file__).parents[2]
UNITS: Final = REPOSITORY / "systemd"
PYTHON: Final = f"python{sys.version_info.major}.{sys.version_info.minor}"
VENV: Final = "/opt/vhostd"
SITE_PACKAGES: Final = f"{VENV}/lib/{PYTHON}/site-packages"
UNIT: Final = "vhostd.service"
PROGRAMS: Final = {"vhostd": "vhostd.__main__", "vhostctl": "vhostd.control.cli"}


def install(machine: Machine, configuration: str) -> None:
    """Put vhostd and its configuration into a machine that is yet to be booted."""
    _install_python(machine)
    machine.write(f"{VENV}/pyvenv.cfg", "home = /opt/python/bin\n")
    programs = machine.folder / "files" / VENV.lstrip("/") / "bin"
    programs.mkdir(parents=True)
    (programs / "python3").symlink_to(f"/opt/python/bin/{PYTHON}")
    # The environment of the tests has all that vhostd needs, for this very Python.
    machine.binds.append((Path(sysconfig.get_path("purelib")), "/opt/dependencies", False))
    machine.write(f"{SITE_PACKAGES}/dependencies.pth", "/opt/dependencies\n")
    package = machine.folder / "files" / SITE_PACKAGES.lstrip("/") / "vhostd"
    shutil.copytree(REPOSITORY / "vhostd", package, ignore=shutil.ignore_patterns("_core.c"))
    for name, module in PROGRAMS.items():
        text = f"#!{VENV}/bin/python3\nimport sys\nfrom {module} import main\nsys.exit(main())\n"
        machine.write(f"/usr/local/bin/{name}", text, 0o755)
    for unit in UNITS.rglob("*.service"):
        machine.write(f"/etc/systemd/system/{unit.relative_to(UNITS)}", unit.read_text())
    wanted = machine.folder / "files/etc/systemd/system/multi-user.target.wants"
    wanted.mkdir()
    (wanted / UNIT).symlink_to(f"../{UNIT}")  # systemctl enable
    machine.write("/etc/vhostd/vhostd.toml", configuration)
    machine.write("/etc/group", _group())


def _install_python(machine: Machine) -> None:
    prefix = Path(sys.base_prefix)
    program = prefix / "bin" / PYTHON
    machine.binds.append((program.resolve(), f"/opt/python/bin/{PYTHON}", False))
    machine.binds.append((prefix / "lib" / PYTHON, f"/opt/python/lib/{PYTHON}", False))
    machine.write("/etc/ld.so.conf.d/00-vhostd-test.conf", "/opt/python/lib\n")
    for library in (prefix / "lib").glob(f"lib{PYTHON}.so*"):
        machine.binds.append((library.resolve(), f"/opt/python/lib/{library.name}", False))


def _group() -> str:
    """The host's groups, and the one that QEMU is in."""
    text = Path("/etc/group").read_text()
    return text if "\nkvm:" in text else text + "kvm:x:1999:\n"
