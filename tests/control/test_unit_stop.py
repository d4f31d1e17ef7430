"""What becomes of `systemctl stop`; how systemd plays along is in tests/systemd."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vhostd.control import unit_stop
from vhostd.control.unit_stop import Outcome, Stop, act, connected_vms

LOST = Stop(job="stop", host_ends=False, preserved=False, connected=("web",), confirmed=False)


@pytest.mark.parametrize(
    ("values", "outcome"),
    [
        ({}, Outcome.RESTART),
        ({"connected": None}, Outcome.RESTART),  # it hangs: nothing says that no guest is there
        ({"connected": ()}, Outcome.STOP),
        ({"preserved": True}, Outcome.GUESTS_WAIT),
        ({"preserved": True, "connected": None}, Outcome.GUESTS_WAIT),
        ({"confirmed": True}, Outcome.GUESTS_LOST),
        ({"host_ends": True}, Outcome.STOP),
        ({"job": "restart"}, Outcome.STOP),
        ({"job": ""}, Outcome.STOP),
    ],
    ids=str,
)
def test_a_stop_that_would_take_devices_away_becomes_a_restart(
    values: Mapping[str, Any], outcome: Outcome
) -> None:
    assert replace(LOST, **values).outcome() is outcome


def test_a_vm_counts_while_a_vmm_may_be_there() -> None:
    statuses: list[dict[str, Any]] = [
        {"vm": "none", "state": "waiting", "paused": None},
        {"vm": "runs", "state": "running", "paused": None},
        {"vm": "boots", "state": "connected", "paused": None},
        {"vm": "alone", "state": "waiting", "paused": "its record is damaged"},
    ]
    assert connected_vms(statuses) == ("runs", "boots", "alone")


def test_only_the_stop_that_would_lose_guests_queues_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def systemctl(*words: str, check: bool = False) -> str:
        asked.append(words)
        return ""

    monkeypatch.setattr(unit_stop, "_systemctl", systemctl)
    socket = tmp_path / "control.sock"
    confirmation = tmp_path / unit_stop.CONFIRMATION
    told = act(LOST, "vhostd.service", socket)
    assert told is not None and "web" in told and str(confirmation) in told
    assert asked == [("start", "--no-block", "vhostd.service")]
    confirmation.touch()
    told = act(replace(LOST, confirmed=True), "vhostd.service", socket)
    assert told is not None and "gone for good" in told
    assert not confirmation.exists()  # each stop is confirmed by itself
    assert len(asked) == 1
    assert act(replace(LOST, connected=()), "vhostd.service", socket) is None
