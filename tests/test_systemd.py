"""What the service manager is told, and what the files in systemd/ promise."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vhostd import systemd
from vhostd.balloon_main import CAPABILITIES
from vhostd.errors import ConfigError
from vhostd.fds import OwnedFd

from tests.transport.sockets import no_leak

UNITS = Path(__file__).parents[1] / "systemd"
EXPOSURE_MAX = "15"
"""systemd-analyze counts 0 to 100 here. 9 of it are TCP for [metrics] listen, 4 that it begins as
root; no more may come unseen. What else a host may need is in systemd/drop-ins."""


def test_notify_sends_one_datagram_of_assignments(tmp_path: Path) -> None:
    path = tmp_path / "notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        assert systemd.notify("READY=1", "STATUS=up", environment={"NOTIFY_SOCKET": str(path)})
        assert manager.recv(4096) == b"READY=1\nSTATUS=up"


def test_notify_without_a_service_manager_says_so() -> None:
    assert not systemd.notify("READY=1", environment={})


@contextmanager
def connected(folder: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A service manager's end of the protocol, and ours."""
    with manager(folder) as (end, environment):
        channel = systemd.connect(environment)
        assert channel is not None
        with channel:
            yield end, channel


@contextmanager
def manager(folder: Path) -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """A service manager's end of the protocol, and the environment that leads to it."""
    path = folder / "notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.settimeout(10)
        end.bind(str(path))
        yield end, {"NOTIFY_SOCKET": str(path)}


def receive(end: socket.socket) -> tuple[list[str], list[OwnedFd]]:
    data, fds, flags, _ = socket.recv_fds(end, 4096, 253)
    assert not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
    return data.decode().split("\n"), [OwnedFd(fd) for fd in fds]


def test_descriptors_go_into_the_store_by_name(tmp_path: Path) -> None:
    with connected(tmp_path) as (end, channel), OwnedFd(os.eventfd(5)) as fd:
        systemd.store_fds(channel, "vm.kick.0", [fd])
        assignments, (stored,) = receive(end)
        assert assignments == ["FDSTORE=1", "FDNAME=vm.kick.0"]
        assert os.eventfd_read(stored.fileno()) == 5
        assert not fd.closed
        systemd.store_fds(channel, "vm.kick.0", [fd], poll=False)
        assert receive(end)[0] == ["FDSTORE=1", "FDNAME=vm.kick.0", "FDPOLL=0"]
        systemd.forget_fds(channel, "vm.kick.0")
        assert receive(end) == (["FDSTOREREMOVE=1", "FDNAME=vm.kick.0"], [])


def test_many_descriptors_take_several_messages(tmp_path: Path) -> None:
    with connected(tmp_path) as (end, channel), OwnedFd(os.eventfd(0)) as fd:
        systemd.store_fds(channel, "many", [fd] * 600)
        messages = [receive(end) for _ in range(3)]
        assert [len(fds) for _, fds in messages] == [253, 253, 94]
        assert {tuple(assignments) for assignments, _ in messages} == {("FDSTORE=1", "FDNAME=many")}
        with pytest.raises(ValueError, match="254 descriptors"):
            systemd.send(channel, "X=1", fds=[fd] * 254)


def test_without_a_manager_nothing_is_stored_and_nobody_waits() -> None:
    assert systemd.connect({}) is None
    assert not systemd.barrier(10, environment={})


@pytest.mark.parametrize("name", ["a", "x" * 255, "vm.mem0.1", "a b~!", "web-1_2"])
def test_names_that_systemd_takes(name: str) -> None:
    assert systemd.is_fd_name(name)


@pytest.mark.parametrize("name", ["", "x" * 256, "a:b", "ä", "a\nFDPOLL=0", "\x7f", "\t"])
def test_names_that_it_does_not_take_are_not_sent(tmp_path: Path, name: str) -> None:
    with connected(tmp_path) as (end, channel), OwnedFd(os.eventfd(0)) as fd:
        with pytest.raises(ValueError, match="cannot name"):
            systemd.store_fds(channel, name, [fd])
        with pytest.raises(ValueError, match="cannot name"):
            systemd.forget_fds(channel, name)
        end.setblocking(False)
        with pytest.raises(BlockingIOError):
            end.recv(1)


def test_a_barrier_lasts_until_the_manager_comes_to_it(tmp_path: Path) -> None:
    with manager(tmp_path) as (end, environment), no_leak():
        with pytest.raises(TimeoutError):
            systemd.barrier(0.05, environment=environment)
        assignments, fds = receive(end)
        assert (assignments, len(fds)) == (["BARRIER=1"], 1)
        del fds
        waiting = threading.Thread(
            target=systemd.barrier, args=(10,), kwargs={"environment": environment}
        )
        waiting.start()
        _, (fd,) = receive(end)
        waiting.join(0.05)
        assert waiting.is_alive()
        fd.close()
        waiting.join(10)
        assert not waiting.is_alive()


PASSED = """
import json, os, sys
from vhostd import systemd
from vhostd.errors import ConfigError
if "LISTEN_PID" not in os.environ:
    os.environ["LISTEN_PID"] = str(os.getpid())
before = [(fd, os.get_inheritable(fd)) for fd in (3, 4, 5)]
try:
    passed = systemd.passed_fds(os.environ, os.getpid())
except ConfigError as error:
    print(json.dumps([str(error), before == [(fd, os.get_inheritable(fd)) for fd in (3, 4, 5)]]))
else:
    print(json.dumps({name: [(fd.fileno(), os.get_inheritable(fd.fileno())) for fd in fds]
                      for name, fds in passed.items()}))
"""


def passed(**environment: str) -> object:
    """What a program with descriptors 3 to 5 takes over; of a mistake, the text and "untouched"."""
    script = f"exec 3</dev/null 4<&3 5<&3; exec {sys.executable} -S -c '{PASSED}'"
    result = subprocess.run(
        ["/bin/sh", "-c", script],
        env={"PYTHONPATH": str(UNITS.parent), **environment},
        capture_output=True,
        check=True,
    )
    answer: object = json.loads(result.stdout)
    return answer


def test_descriptors_are_taken_over_by_name_and_close_on_exec() -> None:
    assert passed(LISTEN_FDS="3", LISTEN_FDNAMES="b:a:b") == {
        "b": [[3, False], [5, False]],
        "a": [[4, False]],
    }


def test_descriptors_without_names_are_called_as_systemd_calls_them() -> None:
    assert passed(LISTEN_FDS="3") == {"unknown": [[3, False], [4, False], [5, False]]}
    assert passed(LISTEN_FDS="2", LISTEN_FDNAMES="a:") == {
        "a": [[3, False]],
        "unknown": [[4, False]],
    }


def test_descriptors_of_somebody_else_are_left_alone() -> None:
    assert passed(LISTEN_FDS="3", LISTEN_PID="1") == {}
    assert passed(LISTEN_FDS="nonsense", LISTEN_PID="1") == {}
    assert passed() == {}
    assert passed(LISTEN_FDS="0", LISTEN_FDNAMES="") == {}
    assert systemd.passed_fds({}, os.getpid()) == {}


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"LISTEN_FDS": "three"}, "LISTEN_FDS: 'three' is no number"),
        ({"LISTEN_FDS": "-1"}, "LISTEN_FDS: '-1' is no number"),
        ({"LISTEN_FDS": "1" * 60}, "LISTEN_FDS: '" + "1" * 40 + "' is no number"),
        ({"LISTEN_FDS": "3", "LISTEN_PID": "me"}, "LISTEN_PID: 'me' is no number"),
        ({"LISTEN_FDS": "3", "LISTEN_FDNAMES": "a:b"}, "LISTEN_FDNAMES: 2 names for 3 descriptors"),
        ({"LISTEN_FDS": "4"}, "LISTEN_FDS: 4, but 6 is no descriptor"),
    ],
)
def test_nonsense_is_said_and_touches_nothing(environment: dict[str, str], text: str) -> None:
    assert passed(**environment) == [text, True]


def test_the_watchdog_s_interval_is_ours_or_none() -> None:
    assert systemd.watchdog_interval_s({}, 7) is None
    assert systemd.watchdog_interval_s({"WATCHDOG_USEC": "2500000"}, 7) == 2.5
    ours = {"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "7"}
    assert systemd.watchdog_interval_s(ours, 7) == 0.5
    assert systemd.watchdog_interval_s(ours, 8) is None
    for key, value in (("WATCHDOG_USEC", "0"), ("WATCHDOG_USEC", "1s"), ("WATCHDOG_PID", "")):
        with pytest.raises(ConfigError, match=key):
            systemd.watchdog_interval_s({**ours, key: value}, 7)


def test_the_discovery_file_names_the_type_that_the_program_reports() -> None:
    discovery = json.loads((UNITS / "50-vhostd-balloon.json").read_text())
    assert discovery["type"] == CAPABILITIES["type"]
    assert Path(discovery["binary"]).name == "vhostd-balloon"


@pytest.mark.parametrize("unit", ["vhostd.service", "vhostd@.service"])
def test_the_unit_s_sandbox_is_tight(unit: str) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    result = subprocess.run(
        [analyze, "security", "--offline=yes", f"--threshold={EXPOSURE_MAX}", str(UNITS / unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
