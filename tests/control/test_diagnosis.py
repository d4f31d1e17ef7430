"""vhostctl doctor: what it finds on this host, in guests and in VMs, and what it says to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vhostd.control import diagnosis
from vhostd.control.qemu_args import DEVICE_MODEL
from vhostd.devices.pmem import ImageView
from vhostd.units import GiB, MiB

from tests.control.daemon import RunningDaemon, SmallDaemon
from tests.control.program import Finished, run

GOOD_QEMU = f"""#!/bin/sh
case "$1" in
--version) echo 'QEMU emulator version 11.1.3 (Debian)'; echo 'Copyright' ;;
-device) echo 'name "{DEVICE_MODEL}", bus PCI' ;;
esac
"""
OLD_QEMU = """#!/bin/sh
case "$1" in
--version) echo 'QEMU emulator version 7.2.9 (Debian)' ;;
-device) echo 'name "vhost-user-device-pci", bus PCI' ;;
esac
"""
BROKEN_QEMU = """#!/bin/sh
exit 127
"""
NO_TEXT_QEMU = """#!/bin/sh
printf 'QEMU \\377\\n'
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """The only folder in PATH; a QEMU that is new enough is in it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    install(folder, GOOD_QEMU)
    return folder


def install(folder: Path, script: str) -> None:
    program = folder / diagnosis.QEMU
    program.write_text(script)
    program.chmod(0o755)


@pytest.fixture
def doctor(served: RunningDaemon, programs: Path) -> Callable[..., Finished]:
    """Run it, for JSON, on the served daemon."""
    socket = str(served.addresses.control)
    return lambda *arguments: run(
        "--json", "--socket", socket, "doctor", *arguments, PATH=str(programs)
    )


def checks_of(finished: Finished) -> dict[str, dict[str, Any]]:
    """What it found, by name."""
    assert finished.stderr == ""
    found = json.loads(finished.stdout)
    assert all(list(check) == ["name", "verdict", "found", "remedy"] for check in found)
    assert all(check["remedy"] for check in found if check["verdict"] != "ok")
    return {check["name"]: check for check in found}


# -- the host --------------------------------------------------------------------------------------


def test_all_is_well(doctor: Callable[..., Finished], served: RunningDaemon) -> None:
    done = doctor()
    checks = checks_of(done)
    assert done.returncode == 0
    assert list(checks) == ["kernel", "KVM", "QEMU", "daemon", "web", "idle"]
    assert checks["kernel"]["found"] == os.uname().release
    assert checks["QEMU"]["found"] == "QEMU emulator version 11.1.3 (Debian)"
    assert checks["daemon"]["found"] == f"serves 2 VMs at {served.addresses.control}"
    assert (checks["web"]["found"], checks["idle"]["found"]) == ("running", "waiting")
    assert {checks[name]["verdict"] for name in checks if name != "KVM"} <= {"ok", "warning"}


@pytest.mark.parametrize(
    ("script", "found"),
    [
        (OLD_QEMU, f"QEMU emulator version 7.2.9 (Debian) has no {DEVICE_MODEL}"),
        (BROKEN_QEMU, "does not run"),
        ("no program", "does not run"),
        (NO_TEXT_QEMU, f"has no {DEVICE_MODEL}"),
    ],
    ids=["old", "broken", "no-program", "no-text"],
)
def test_a_qemu_that_is_of_no_use_is_a_failure(
    doctor: Callable[..., Finished], programs: Path, script: str, found: str
) -> None:
    install(programs, script)
    done = doctor()
    check = checks_of(done)["QEMU"]
    assert (done.returncode, check["verdict"]) == (1, "failed")
    assert found in check["found"]


def test_no_qemu_is_a_warning_because_guests_may_run_elsewhere(
    doctor: Callable[..., Finished], programs: Path
) -> None:
    (programs / diagnosis.QEMU).unlink()
    done = doctor()
    check = checks_of(done)["QEMU"]
    assert (done.returncode, check["verdict"]) == (0, "warning")
    assert check["remedy"] == "install QEMU 11.1 or newer"


@pytest.mark.parametrize(
    ("release", "verdict"), [("6.4.0-1-amd64", "warning"), ("6.5", "ok"), ("10.0.1+", "ok")]
)
def test_a_kernel_that_can_t_tell_page_caches_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, release: str, verdict: str
) -> None:
    monkeypatch.setenv("PATH", "")
    fields = ("Linux", "host", release, "", "x86_64")
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(fields))
    (check,) = (check for check in diagnosis.host_checks() if check.name == "kernel")
    assert (check.verdict, release in check.found) == (verdict, True)


# -- guests ----------------------------------------------------------------------------------------

BALLOON, REPORTING, MEM = "virtio-balloon", "free page reporting", "virtio-mem"
WINDOW, SHMEM = 'virtio-pmem, mode = "window"', 'virtio-pmem, mode = "shmem"'


@pytest.mark.parametrize(
    ("release", "too_old"),
    [
        ("7.2", set()),
        ("6.12.117-amd64", set()),
        ("6.9", set()),
        ("6.8.12", {SHMEM}),
        ("6.1", {SHMEM}),
        ("5.16", {SHMEM, MEM}),
        ("5.6", {SHMEM, MEM, REPORTING}),
        ("5.2", {SHMEM, MEM, REPORTING, WINDOW}),
    ],
)
def test_what_a_guest_of_a_kernel_can_use(release: str, too_old: set[str]) -> None:
    checks = diagnosis.guest_checks(release)
    warned = {check.name for check in checks if check.verdict == "warning"}
    assert warned == {f"guest: {name}" for name in too_old}
    assert len(checks) == 5
    assert all(check.remedy for check in checks if check.name in warned)


def test_a_guest_too_old_for_shared_memory_is_told_what_to_use(
    doctor: Callable[..., Finished],
) -> None:
    done = doctor("--guest-kernel", "6.1")
    check = checks_of(done)[f"guest: {SHMEM}"]
    assert done.returncode == 0, "nothing is broken"
    assert check == {
        "name": f"guest: {SHMEM}",
        "verdict": "warning",
        "found": "Linux 6.1 is too old",
        "remedy": 'use mode = "window"',
    }


@pytest.mark.parametrize("release", ["six", "", "6", "v6.1"])
def test_what_is_no_version_is_exit_2(doctor: Callable[..., Finished], release: str) -> None:
    done = doctor("--guest-kernel", release)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--guest-kernel" in done.stderr and "such as 6.12" in done.stderr


# -- without a daemon, and for people --------------------------------------------------------------


def test_without_a_daemon_the_host_is_looked_at_all_the_same(
    tmp_path: Path, programs: Path
) -> None:
    absent = tmp_path / "absent.sock"
    done = run("--json", "--socket", str(absent), "doctor", PATH=str(programs))
    checks = checks_of(done)
    assert (done.returncode, list(checks)) == (3, ["kernel", "KVM", "QEMU", "daemon"])
    assert checks["daemon"]["verdict"] == "failed"
    assert f"{absent}: the daemon can't be reached" in checks["daemon"]["found"]
    assert "--socket" in checks["daemon"]["remedy"]
    install(programs, OLD_QEMU)
    worse = run("--json", "--socket", str(absent), "doctor", PATH=str(programs))
    assert worse.returncode == 3, "without a daemon nothing else matters"


def test_people_read_a_line_for_each_check_and_a_remedy_below(
    served: RunningDaemon, programs: Path
) -> None:
    served.daemon.web.disk.break_down()
    socket = str(served.addresses.control)
    done = run("--socket", socket, "doctor", PATH=str(programs))
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (1, "")
    at = lines.index("failed web disk0 flushes fail: sync: Input/output error")
    assert lines[at + 1] == "-> see to it, then vhostctl pmem clear"
    assert "ok QEMU QEMU emulator version 11.1.3 (Debian)" in lines
    assert "\x1b" not in done.stdout


# -- VMs -------------------------------------------------------------------------------------------

Change = Callable[[SmallDaemon], object]


def fail(daemon: SmallDaemon) -> None:
    daemon.web.disk.break_down()


def lose(daemon: SmallDaemon) -> None:
    daemon.web.disk.pmem.on_region("the VMM refused it (1)")


def turn_away(daemon: SmallDaemon) -> None:
    daemon.idle.disk.pmem.refused_image = "/images/disk0.img: is not there; make it with: x"


def refuse(daemon: SmallDaemon) -> None:
    disk = daemon.idle.disk.pmem
    disk.options = replace(disk.options, size=3 * GiB)


def refuse_the_next(daemon: SmallDaemon) -> None:
    disk = daemon.web.disk.pmem
    disk.options = replace(disk.options, size=3 * GiB)


def remove(daemon: SmallDaemon) -> None:
    daemon.web.disk.pmem.image = ImageView(removed=True)


def fill(daemon: SmallDaemon) -> None:
    daemon.web.disk.pmem.image = ImageView(allocated=MiB, free=GiB - 1)


def quarantine(daemon: SmallDaemon) -> None:
    daemon.web.state = "quarantined"


@pytest.mark.parametrize(
    ("change", "name", "verdict", "found", "remedy"),
    [
        (fail, "web disk0", "failed", "flushes fail: sync: Input/output error", "pmem clear"),
        (lose, "web disk0", "failed", "the VMM refused it (1)", "qemu-args"),
        (turn_away, "idle disk0", "failed", "/images/disk0.img: is not there", "turned away"),
        (refuse, "idle disk0", "failed", "3221225472 is no power of two", "is turned away"),
        (refuse_the_next, "web disk0", "warning", "3221225472 is no power of two", "the next VMM"),
        (remove, "web disk0", "failed", "/images/disk0.img was removed", "copy the data"),
        (fill, "web disk0", "warning", "its file system has 1024 MiB left", "make room"),
        (quarantine, "web queue 3", "failed", "quarantined: loop", "set up anew"),
    ],
)
def test_what_is_wrong_with_a_vm_comes_with_a_remedy(
    change: Change, name: str, verdict: str, found: str, remedy: str
) -> None:
    daemon = SmallDaemon()
    change(daemon)
    statuses = [vm.status() for vm in daemon.vms().values()]
    _daemon, *checks = diagnosis.daemon_checks("/run/control.sock", statuses)
    (check,) = (check for check in checks if check.verdict != "ok")
    assert (check.name, check.verdict) == (name, verdict)
    assert found in check.found
    assert check.remedy is not None and remedy in check.remedy


def test_little_room_is_nothing_to_an_image_that_has_all_of_its_own() -> None:
    daemon = SmallDaemon()
    daemon.web.disk.pmem.image = ImageView(allocated=64 * MiB, free=0)
    checks = diagnosis.daemon_checks("", [daemon.web.status()])
    assert [check.verdict for check in checks] == ["ok", "ok"]


def test_a_failure_and_a_removal_are_both_told() -> None:
    daemon = SmallDaemon()
    fail(daemon)
    remove(daemon)
    checks = diagnosis.daemon_checks("", [daemon.web.status()])
    assert [check.verdict for check in checks] == ["ok", "failed", "failed"]
