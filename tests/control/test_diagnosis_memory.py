"""What doctor says of a VM's memory, by its status alone."""

from __future__ import annotations

from typing import Any

import pytest
from vhostd.control.diagnosis import Check, daemon_checks


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


@pytest.mark.parametrize("finding", ["free", "unchecked"])
def test_memory_that_is_given_back_is_no_finding(finding: str) -> None:
    (check,) = found(discards={"allowed": True, "finding": finding, "why": None})
    assert check.verdict == "ok"
