"""The control server against hostile clients, dead predecessors and live rivals."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import trio
from vhostd.config import MetricsConfig
from vhostd.control import http as http_server
from vhostd.control.http import CONNECTIONS_PER_USER_MAX
from vhostd.control.seats import CONNECTIONS_MAX
from vhostd.control.server import serve_control
from vhostd.errors import ConfigError, HostError

from tests.control.daemon import RunningDaemon, SmallDaemon, running_daemon


@contextmanager
def client(path: Path) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(uds=str(path))
    with httpx.Client(transport=transport, base_url="http://vhostd", timeout=20) as http:
        yield http


def connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    # With a timeout set first, a full backlog would be an error instead of a wait.
    connection.connect(str(path))
    connection.settimeout(20)
    return connection


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline
        pause.wait(0.02)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (a Path for each would open more)


def test_half_open_clients_use_up_one_sockets_limit_and_nothing_else(
    served: RunningDaemon,
) -> None:
    """An unprivileged user on the read-only socket must not take descriptors from VMs."""
    before = open_descriptors()
    with ExitStack() as stack:
        for _ in range(CONNECTIONS_MAX + 100):
            stack.enter_context(connect(served.addresses.read_only))
        with client(served.addresses.control) as http:
            assert http.get("/v1/vms/web").status_code == 200
        # Ours are open in this process, too; what the server accepted is bounded.
        assert open_descriptors() - before <= 2 * CONNECTIONS_MAX + 110
    with client(served.addresses.read_only) as http:
        assert http.get("/v1/vms/web").status_code == 200


CONNECT_MANY = """
import os, socket, sys
if os.getuid() == 0:
    os.setuid(65534)
clients = []
for _ in range(int(sys.argv[2])):
    client = socket.socket(socket.AF_UNIX)
    client.connect(sys.argv[1])
    client.settimeout(20)
    clients.append(client)
dropped = 0
for client in reversed(clients):
    client.settimeout(20 if dropped < int(sys.argv[3]) else 0)
    try:
        dropped += client.recv(1) == b""
    except BlockingIOError:
        break
print(dropped)
"""


def test_one_unprivileged_user_cannot_keep_the_others_out(tmp_path: Path) -> None:
    """Connections beyond a user's share are closed at once."""
    surplus = 20
    with (
        tempfile.TemporaryDirectory() as folder,
        running_daemon(Path(folder)) as running,
    ):
        Path(folder).chmod(0o755)
        count = CONNECTIONS_PER_USER_MAX + surplus
        arguments = (str(running.addresses.read_only), str(count), str(surplus))
        counted = subprocess.run(
            [sys.executable, "-I", "-c", CONNECT_MANY, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    assert int(counted.stdout) == surplus


def test_a_client_that_sends_no_request_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "IDLE_TIMEOUT_S", 0.2)
    with (
        running_daemon(tmp_path) as running,
        connect(running.addresses.read_only) as silent,
        connect(running.addresses.read_only) as halting,
    ):
        halting.sendall(b"GET /v1/vms HTTP/1.1\r\nHost: ")
        assert silent.recv(1) == b""
        assert halting.recv(1) == b""


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\0" * 4096,
        b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096,
        b"PUT /v1/vms/web/balloon HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"PUT /v1/vms/web/balloon HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/vms HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"GET /v1/vms HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nHTTP2-Settings: \xff\r\n\r\n",
    ],
)
def test_bytes_that_are_no_request_end_that_connection_only(
    served: RunningDaemon, request_bytes: bytes
) -> None:
    with connect(served.addresses.read_only) as hostile:
        try:
            hostile.sendall(request_bytes)
            hostile.shutdown(socket.SHUT_WR)
            while hostile.recv(65536):
                pass
        except (ConnectionResetError, BrokenPipeError):
            pass  # dropped while we were still sending
    with client(served.addresses.control) as http:
        assert http.get("/v1/vms/web").status_code == 200


def test_a_gigabyte_of_json_is_refused_before_it_is_stored(served: RunningDaemon) -> None:
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    head = b"PUT /v1/vms/web/balloon HTTP/1.1\r\nHost: x\r\nContent-Length: 1073741824\r\n\r\n"
    sent = 0
    with connect(served.addresses.control) as hostile:
        hostile.sendall(head)
        try:
            while sent < 1 << 30:
                sent += hostile.send(b" " * 65536)
        except OSError:
            pass  # refused and closed
    assert sent < 1 << 28
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 32 * 1024


def test_a_listener_that_does_not_read_holds_up_neither_events_nor_the_end(
    tmp_path: Path,
) -> None:
    with running_daemon(tmp_path) as running, connect(running.addresses.control) as stuck:
        stuck.sendall(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        stuck.recv(1)
        text = "x" * 100_000

        def flood() -> None:
            for _ in range(300):
                running.daemon.events.publish("web", "flood", {"text": text})

        running.do(flood)
        with client(running.addresses.control) as http:
            assert http.get("/v1/vms/web").status_code == 200
        began = time.monotonic()
        running.stop()
        assert time.monotonic() - began < 1.5


def test_the_end_closes_idle_and_listening_clients_and_removes_the_sockets(
    tmp_path: Path,
) -> None:
    with (
        running_daemon(tmp_path) as running,
        client(running.addresses.control) as http,
        http.stream("GET", "/v1/events") as events,
    ):
        lines = events.iter_lines()
        next(lines)
        began = time.monotonic()
        running.stop()
        assert time.monotonic() - began < 1
        assert [line for line in lines if line] == []
    assert not running.addresses.control.exists()
    assert not running.addresses.read_only.exists()


async def refused(runtime_dir: Path) -> str:
    """What serve_control says when it can't start."""
    with pytest.raises((ConfigError, HostError)) as caught:
        await serve_control(SmallDaemon(), runtime_dir)
    text = str(caught.value)
    assert "\n" not in text
    return text


async def test_a_second_daemon_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_control, SmallDaemon(), tmp_path)
        assert "another vhostd" in await refused(tmp_path)
        with client(tmp_path / "control.sock") as http:
            answer = await trio.to_thread.run_sync(http.get, "/v1/vms/web")
        assert answer.status_code == 200
        nursery.cancel_scope.cancel()


async def test_the_sockets_of_a_killed_daemon_are_taken_over(tmp_path: Path) -> None:
    for name in ("control.sock", "control-ro.sock"):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(tmp_path / name))
    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(serve_control, SmallDaemon(), tmp_path)
        assert addresses.control.stat().st_mode & 0o777 == 0o600
        nursery.cancel_scope.cancel()


async def test_a_live_server_and_things_that_are_no_socket_are_left_alone(
    tmp_path: Path,
) -> None:
    path = tmp_path / "control-ro.sock"
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(path))
        live.listen()
        assert "live server" in await refused(tmp_path)
        assert path.exists()
    path.unlink()
    target = tmp_path / "precious"
    target.write_text("data")
    path.symlink_to(target)
    assert "is in the way and no socket" in await refused(tmp_path)
    assert target.read_text() == "data"
    assert path.is_symlink()


async def test_a_path_too_long_for_a_socket_is_one_line(tmp_path: Path) -> None:
    assert "too long" in await refused(tmp_path / ("d" * 120))


def test_a_metrics_port_that_is_taken_is_one_line_and_stops_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with running_daemon(tmp_path, MetricsConfig("127.0.0.1", port)) as running:
            assert running.addresses.metrics_port == 0
            with client(running.addresses.read_only) as http:
                assert "vhostd_vm_state" in http.get("/metrics").text
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "host_error" in line]
    assert f"metrics.listen: 127.0.0.1 port {port}: Address already in use" in line
    assert "ss -ltnp" in line


def test_the_metrics_port_answers_metrics_and_nothing_else(tmp_path: Path) -> None:
    with running_daemon(tmp_path, MetricsConfig("127.0.0.1", 0)) as running:
        base = f"http://127.0.0.1:{running.addresses.metrics_port}"
        with httpx.Client(base_url=base, timeout=20, trust_env=False) as http:
            assert "vhostd_vm_state" in http.get("/metrics").text
            assert http.get("/v1/vms").status_code == 404
            assert http.put("/v1/vms/web/balloon", json={"target": 0}).status_code == 404
