"""How a service is started again, ended, watched and replaced, and what the keeper ends with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.eventfd import wait_readable
from tests.fakes.fuse import FLUSH, hung_file
from tests.keeper.keeping import ROOT, TIMEOUT_S, Keeper, Service, closing, keeping


def test_the_keeper_imports_nothing_but_the_standard_library() -> None:
    script = "import sys, vhostd.keeper.supervisor; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-S", "-c", script],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    rooms = {name.split(".")[0] for name in result.stdout.split()}
    assert rooms - set(sys.stdlib_module_names) - {"__main__", "__mp_main__"} == {"vhostd"}
    ours = {name.split(".")[1] for name in result.stdout.split() if name.startswith("vhostd.")}
    assert ours == {"errors", "fds", "keeper", "systemd"}


def test_a_clean_end_ends_the_keeper(folder: Path) -> None:
    with keeping(folder) as keeper:
        keeper.next_service().send("exit", 0)
        assert keeper.wait_end() == 0
        assert "ended with 0 after" in keeper.log()
        assert [path.name for path in folder.iterdir()] == ["c"]  # NOTIFY_SOCKET is gone


def test_a_clean_end_with_something_stored_is_followed_by_a_successor(folder: Path) -> None:
    # kill -TERM of vhostd and not of the keeper: its guests are there.
    with closing(kept := os.eventfd(0)), keeping(folder) as keeper:
        service = keeper.next_service()
        service.store("kept", kept)
        os.kill(service.pid, signal.SIGTERM)
        assert keeper.next_service().passed == {"kept": 1}
        assert "ended with 0 after" in keeper.wait_line("restarted PID")


def test_sigterm_of_the_keeper_ends_both_and_tells_what_that_means(folder: Path) -> None:
    with closing(kept := os.eventfd(0)), keeping(folder) as keeper:
        keeper.next_service().store("kept", kept)
        keeper.signal(signal.SIGTERM)
        assert keeper.wait_end() == 0
        assert "stopping: SIGTERM; VMs that are still connected lose their devices" in keeper.log()


def test_a_wrong_configuration_ends_the_keeper(folder: Path) -> None:
    with keeping(folder) as keeper:
        keeper.next_service().send("exit", 2)
        assert keeper.wait_end() == 2


def test_a_configuration_that_goes_wrong_later_costs_no_descriptor(folder: Path) -> None:
    with closing(kept := os.eventfd(0)), keeping(folder) as keeper:
        service = keeper.next_service()
        service.store("kept", kept)
        service.ready()
        keeper.signal(signal.SIGHUP)
        keeper.next_service().send("exit", 2)
        assert keeper.next_service().passed == {"kept": 1}


def test_a_service_that_can_t_end_is_left_behind(folder: Path) -> None:
    """A thread of it waits for a file system of a VMM's own, which never answers."""
    with closing(kept := os.eventfd(0)), keeping(folder, stop_timeout_s=0.2) as keeper:
        service = keeper.next_service()
        service.store("kept", kept)
        service.ready()
        with hung_file() as hung:
            service.tell("hang", fds=[hung.fd])
            hung.wait_asked(FLUSH)
            keeper.signal(signal.SIGHUP)
            successor = keeper.next_service()
            assert successor.passed == {"kept": 1}
            assert f"PID {service.pid} waits for a file system" in keeper.wait_line("left behind")
        assert f"PID {service.pid}" in keeper.wait_line("has ended")
        with hung_file() as hung:
            successor.tell("hang", fds=[hung.fd])
            hung.wait_asked(FLUSH)
            keeper.signal(signal.SIGTERM)
            assert keeper.wait_end() == 128 + signal.SIGKILL


@pytest.mark.parametrize("code", [1, 3, 255])
def test_a_failure_is_followed_by_another_start(folder: Path, code: int) -> None:
    with keeping(folder) as keeper:
        keeper.next_service().send("exit", code)
        keeper.next_service()
        assert f"ended with {code} after" in keeper.wait_line("restarted PID")


def test_a_program_that_is_not_there_is_a_mistake_of_the_command_line(folder: Path) -> None:
    with keeping(folder, ["no-such-program"]) as keeper:
        assert keeper.wait_end() == 2
        assert "vhostd-keeper: no-such-program cannot be started" in keeper.log()


def test_a_service_starts_with_all_signals_as_they_are_by_default(folder: Path) -> None:
    # Of grep itself: a shell blocks signals for a moment whenever it waits.
    script = "exec grep -E 'Sig(Ign|Blk)' /proc/self/status >&2"
    with keeping(folder, ["/bin/sh", "-c", script]) as keeper:
        assert keeper.wait_end() == 0
        masks = [line.split() for line in keeper.log().splitlines() if line.startswith("Sig")]
        # Two signals are the C library's own, which nobody can set: whoever started us may have.
        ours = sum(1 << (number - 1) for number in signal.valid_signals())
        found = [(name, int(mask, 16) & ours) for name, mask in masks]
        assert found == [("SigBlk:", 0), ("SigIgn:", 0)]


@pytest.mark.alone
def test_quick_deaths_are_spread_out_and_the_first_is_not(folder: Path) -> None:
    with keeping(folder, quick_death_s=60) as keeper:
        deaths_s = []
        starts_s = []
        for _ in range(5):
            service = keeper.next_service()
            starts_s.append(service.hello["started_s"])
            deaths_s.append(time.monotonic())
            service.kill()
        gaps_s = [
            start_s - death_s for start_s, death_s in zip(starts_s[1:], deaths_s[:-1], strict=True)
        ]
        for gap_s, at_least_s in zip(gaps_s, [0.0, 0.1, 0.2, 0.4], strict=True):
            assert at_least_s <= gap_s < at_least_s + 2
        assert "next start in 0.1 s" not in keeper.wait_line("restarted PID").split("restarted")[0]


def test_one_that_lived_long_enough_starts_the_count_anew(folder: Path) -> None:
    with keeping(folder, quick_death_s=0.5) as keeper:
        service = keeper.successor_of(keeper.next_service())
        assert not service.ends(0.6)
        keeper.successor_of(keeper.successor_of(service))
        keeper.signal(signal.SIGTERM)
        assert keeper.wait_end() == 0
        assert "next start" not in keeper.log()


def test_sigterm_acts_while_nothing_runs(folder: Path) -> None:
    with keeping(folder, ["/bin/false"], quick_death_s=60) as keeper:
        keeper.wait_line("next start in 0.8 s")
        asked_s = time.monotonic()
        keeper.signal(signal.SIGTERM)
        assert keeper.wait_end() == 0
        assert time.monotonic() - asked_s < 0.7


def test_sighup_starts_at_once_while_nothing_runs(folder: Path) -> None:
    with keeping(folder, ["/bin/false"], quick_death_s=60) as keeper:
        keeper.wait_line("next start in 1.6 s")
        asked_s = time.monotonic()
        keeper.signal(signal.SIGHUP)
        keeper.wait_line("next start in 3.2 s")
        assert time.monotonic() - asked_s < 1.5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_service_s_code_is_the_keeper_s(
    folder: Path, number: signal.Signals
) -> None:
    with keeping(folder) as keeper:
        keeper.next_service().tell("on_signal", number, 7)
        keeper.signal(number)
        assert keeper.wait_end() == 7
        assert f"stopping: {number.name}" in keeper.log()


def test_one_that_does_not_end_is_killed(folder: Path) -> None:
    with keeping(folder, stop_timeout_s=0.2) as keeper:
        keeper.next_service().tell("on_signal", signal.SIGTERM, None)
        keeper.signal(signal.SIGTERM)
        assert keeper.wait_end() == 128 + signal.SIGKILL


def test_an_upgrade_keeps_the_descriptors_whatever_the_old_one_ends_with(folder: Path) -> None:
    options: dict[str, Any] = {"stop_timeout_s": 0.2, "quick_death_s": 60}
    with closing(kept := os.eventfd(0)), keeping(folder, **options) as keeper:
        service = keeper.next_service()
        service.store("kept", kept)
        for code in (0, 2, 5, 5, 5, None):
            service.tell("on_signal", signal.SIGTERM, code)
            keeper.signal(signal.SIGHUP)
            service = keeper.next_service()
            assert service.passed == {"kept": 1}
        keeper.signal(signal.SIGTERM)
        assert keeper.wait_end() == 0
        assert "next start" not in keeper.log()  # these were no deaths


@pytest.mark.parametrize("spare", [False, True], ids=["bare", "spare"])
def test_an_upgrade_asked_for_just_before_a_clean_end_is_one(folder: Path, spare: bool) -> None:
    with keeping(folder, spare=spare) as keeper:
        service = keeper.next_service()
        keeper.signal(signal.SIGSTOP)
        with closing(process := os.pidfd_open(service.pid)):
            service.send("exit", 0)
            assert wait_readable(process, TIMEOUT_S)
        keeper.signal(signal.SIGHUP)
        keeper.signal(signal.SIGCONT)
        keeper.next_service()


def test_sigterm_during_an_upgrade_ends_the_keeper(folder: Path) -> None:
    with keeping(folder, stop_timeout_s=0.3) as keeper:
        keeper.next_service().tell("on_signal", signal.SIGTERM, None)
        keeper.signal(signal.SIGHUP)
        keeper.wait_line("upgrading")
        keeper.signal(signal.SIGTERM)
        assert keeper.wait_end() == 128 + signal.SIGKILL


def watched(keeper: Keeper) -> Service:
    service = keeper.next_service()
    assert service.hello["environment"]["WATCHDOG_PID"] == str(service.pid)
    return service


def test_a_silent_service_is_aborted_once_it_was_ready(folder: Path) -> None:
    with closing(kept := os.eventfd(0)), keeping(folder, watchdog_s=1.5) as keeper:
        service = watched(keeper)
        service.store("kept", kept)
        assert service.hello["environment"]["WATCHDOG_USEC"] == "1500000"
        service.tell("notify", "WATCHDOG=1")
        assert not service.ends(1.8)  # not ready yet: it may take its time
        service.ready()
        for _ in range(5):
            service.tell("notify", "WATCHDOG=1")
            assert not service.ends(0.4)
        assert service.ends()
        assert keeper.next_service().passed == {"kept": 1}
        assert f"died by signal {signal.SIGABRT:d}" in keeper.wait_line("restarted")


def test_a_service_may_pull_the_trigger_itself(folder: Path) -> None:
    with keeping(folder) as keeper:
        service = keeper.next_service()
        service.tell("on_signal", signal.SIGABRT, 0)  # another is started even if it ends cleanly
        service.send("notify", "WATCHDOG=trigger")
        keeper.next_service()


def test_a_stopped_process_is_killed_by_the_watchdog(folder: Path) -> None:
    with keeping(folder, watchdog_s=0.3, stop_timeout_s=0.2) as keeper:
        service = watched(keeper)
        service.ready()
        os.kill(service.pid, signal.SIGSTOP)
        keeper.next_service()
        assert f"died by signal {signal.SIGKILL:d}" in keeper.wait_line("restarted")


def test_one_that_says_it_stops_is_not_watched_but_must_end(folder: Path) -> None:
    with keeping(folder, watchdog_s=0.2, stop_timeout_s=0.6) as keeper:
        service = watched(keeper)
        service.ready()
        service.tell("notify", "STOPPING=1")
        assert not service.ends(0.4)
        assert service.ends()
        assert f"died by signal {signal.SIGKILL:d}" in keeper.wait_line("restarted")


def test_what_it_says_when_ready_is_shown(folder: Path) -> None:
    with keeping(folder) as keeper:
        service = keeper.next_service()
        service.tell("notify", "READY=1", "STATUS=serving 3\x1b[2J VMs", "MAINPID=1", "X_NEW=1")
        service.tell("notify", "RELOADING=1")
        service.tell("notify", "READY=1")
        log = keeper.wait_line("VMs")
        assert "serving 3?[2J VMs" in log
        assert log.count("ready after") == 1
