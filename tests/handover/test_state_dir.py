"""Files of the state directory: what is whole and ours is believed, and nothing else."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import pytest
import structlog.testing
from vhostd.handover.state_dir import FILE_SIZE_MAX, StateDir

DEVICES = {"balloon": {"target": 1 << 20}, "mem0": {"configured": 0, "requested_size": 1 << 30}}
VM = "web"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file that holds DEVICES."""
    StateDir.open(tmp_path, make=True).write(VM, DEVICES)
    return tmp_path / f"{VM}.json"


def is_set_aside(path: Path) -> str:
    """Nothing is believed, the file is kept under another name, and one line says why."""
    with structlog.testing.capture_logs() as logs:
        assert StateDir(path.parent).read(VM) == {}
    assert [line["event"] for line in logs] == ["state_set_aside"]
    assert not os.path.lexists(path)
    moved_to = Path(logs[0]["moved_to"])
    assert os.path.lexists(moved_to) and moved_to.parent == path.parent
    assert StateDir(path.parent).read(VM) == {}, "and that is all there is to it"
    error: str = logs[0]["error"]
    assert "\n" not in error
    return error


def test_what_was_written_is_read(written: Path) -> None:
    assert StateDir(written.parent).read(VM) == DEVICES
    assert written.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_it_is_replaced_and_other_vms_have_their_own(written: Path) -> None:
    state = StateDir(written.parent)
    state.write(VM, {})
    state.write("db", DEVICES)
    assert state.read(VM) == {}
    assert state.read("db") == DEVICES
    assert state.read("unheard-of") == {}


def test_an_edited_file_is_set_aside(written: Path) -> None:
    written.write_text(written.read_text().replace("1048576", "2097152"))
    assert "checksum" in is_set_aside(written)


def test_another_vms_file_is_set_aside(written: Path) -> None:
    StateDir(written.parent).write("db", DEVICES)
    (written.parent / "db.json").replace(written)
    assert "'db'" in is_set_aside(written)


@pytest.mark.parametrize("size", [0, 1, 10, 60, 100])
def test_a_file_cut_short_is_set_aside(written: Path, size: int) -> None:
    os.truncate(written, size)
    is_set_aside(written)


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 100,
        b"[]",
        b"{}",
        b'{"vhostd_state": {}, "crc32": 2745614147}',  # of "{}"
        b"[" * 100_000,
        b" " * (FILE_SIZE_MAX + 1),
        '{"crc32": "\ud800"}'.encode(errors="surrogatepass"),
    ],
    ids=["zeros", "list", "empty", "no state", "deep", "large", "not UTF-8"],
)
def test_nonsense_is_set_aside(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / f"{VM}.json"
    path.write_bytes(data)
    is_set_aside(path)


def test_another_versions_file_is_set_aside(written: Path) -> None:
    state = json.dumps({"version": 2, "vm": VM, "devices": {}})
    crc = zlib.crc32(state.encode())
    written.write_text(f'{{"vhostd_state": {state}, "crc32": {crc}}}')
    assert "version 2" in is_set_aside(written)


def test_what_is_no_file_of_ours_is_set_aside(written: Path) -> None:
    elsewhere = written.parent / "elsewhere"
    written.rename(elsewhere)
    written.symlink_to(elsewhere)
    is_set_aside(written)
    os.mkfifo(written)
    assert "no file" in is_set_aside(written)
    written.mkdir()
    is_set_aside(written)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_file_is_set_aside(written: Path) -> None:
    os.chown(written, 12345, -1)
    assert "12345" in is_set_aside(written)


def test_without_a_directory_nothing_lasts(tmp_path: Path) -> None:
    """The default one is made by whoever installs us, and not by a trial run. It is told."""
    with structlog.testing.capture_logs() as logs:
        state = StateDir.open(tmp_path / "none", make=False)
    assert [line["consequence"] for line in logs] == ["sizes that are set do not outlive the host"]
    assert "No such file or directory" in str(state.why_not)
    state.write(VM, DEVICES)
    assert state.read(VM) == {}
    assert not (tmp_path / "none").exists()


def test_one_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with structlog.testing.capture_logs() as logs:
        state = StateDir.open(tmp_path / "file" / "state", make=True)
    assert [line["log_level"] for line in logs] == ["error"]
    assert state.read(VM) == {}
