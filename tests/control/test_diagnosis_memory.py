"""What doctor says of a VM's memory, by its status alone."""

from __future__ import annotations

from typing import Any

import pytest
from vhostd.control.diagnosis import Check, daemon_checks

WELL: dict[str, dict[str, Any]] = {
    "mem": {"state": "running", "window": True, "violations": 0, "page_size": 4096}
    | {"prealloc": False},
    "pmem": {"state": "running", "mapped": True, "failed": None, "refused": None}
    | {"removed": False, "free": None},
}


def status(**changes: object) -> dict[str, Any]:
    """A VM without a device that runs well."""
    well: dict[str, Any] = {"vm": "web", "state": "running", "faults": {}, "mem": [], "pmem": []}
    return well | changes


def found(**changes: object) -> list[Check]:
    """What is said of it."""
    return daemon_checks("/run/control.sock", [status(**changes)])[1:]


@pytest.mark.parametrize("finding", ["unknown", "pinned", "encrypted"])
def test_memory_that_is_not_given_back_is_a_warning_with_the_reason(finding: str) -> None:
    discards = {"allowed": False, "finding": finding, "why": "cannot connect to /run/web.qmp"}
    (check,) = found(discards=discards)
    assert (check.name, check.verdict, check.found) == ("web memory", "warning", discards["why"])
    assert check.remedy


def test_a_vm_that_is_not_there_is_not_asked_whether_its_memory_is_pinned() -> None:
    discards = {"allowed": False, "finding": "unknown", "why": "the VMM has not answered"}
    (check,) = found(discards=discards, state="waiting")
    assert check.verdict == "ok"


def test_memory_that_is_not_shared_is_told_in_place_of_the_driver_s_fault() -> None:
    unshared = "disk0: guest address 0x140000000 is in no memory that the VMM shares"
    (check,) = found(unshared=unshared, faults={"disk0/0": "address"}, state="quarantined")
    assert (check.name, check.verdict, check.found) == ("web memory", "failed", unshared)
    assert check.remedy is not None
    assert "share=on" in check.remedy
    (_, fault) = found(unshared=unshared, faults={"disk0/0": "loop"}, state="quarantined")
    assert "loop" in fault.found


@pytest.mark.parametrize("id", ["mem0", "disk0"])
def test_a_guest_that_can_not_be_told_is_named_by_its_device(id: str) -> None:
    device = {"id": id, "untold": "the guest can't be told of a change: lost"}
    kind = "mem" if id == "mem0" else "pmem"
    checks = found(**{kind: [WELL[kind] | device]})
    (check,) = [check for check in checks if check.name == f"web {id}"]
    assert (check.verdict, check.found) == ("failed", device["untold"])
    assert check.remedy is not None
    assert "boots again" in check.remedy


@pytest.mark.parametrize("finding", ["free", "unchecked"])
def test_memory_that_is_given_back_is_no_finding(finding: str) -> None:
    (check,) = found(discards={"allowed": True, "finding": finding, "why": None})
    assert check.verdict == "ok"
