"""Features that cancel each other: check-config refuses them, or says what is done instead."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from vhostd.config_pairs import PAIRS

from tests.daemon import PROGRAMS

MEM = '[[vm.web.mem]]\nid = "mem0"\nwindow_address = 0x240000000\nsize = "1GiB"\n'
DISK = '[[vm.web.pmem]]\nid = "disk0"\nfile = "/var/lib/images/disk0.img"\nsize = "1GiB"\n'
BALLOON = "[vm.web.balloon]\n"

EACH = (
    (MEM + 'on_violation = "stop"\n', 2, "needs qmp"),
    (BALLOON + MEM + "prealloc = true\n", 0, "mem0: prealloc and the balloon's"),
    (BALLOON + "page_poison = false\n", 0, "balloon: free_page_reporting without page_poison"),
    (DISK + 'readonly = true\nwriteback_limit = "1MiB"\n', 0, "disk0: readonly and writeback"),
)


def check(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    path = folder / "vhostd.toml"
    path.write_text(text)
    command = [str(PROGRAMS / "vhostd"), "check-config", str(path)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("text", "status", "says"), EACH)
def test_a_pair_is_refused_or_told(tmp_path: Path, text: str, status: int, says: str) -> None:
    done = check(tmp_path, text)
    said = done.stderr if status else done.stdout
    assert done.returncode == status, done.stderr
    (line,) = said.splitlines()
    assert line.startswith(f"{tmp_path}/vhostd.toml: vm.web")
    assert says in line


def test_each_pair_of_the_table_has_its_case() -> None:
    assert len(EACH) == len(PAIRS)


def test_one_of_a_pair_alone_is_no_news(tmp_path: Path) -> None:
    off = BALLOON + "free_page_reporting = false\npage_poison = false\n"
    done = check(tmp_path, off + MEM + "prealloc = true\n" + DISK + "readonly = true\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
