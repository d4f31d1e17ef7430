"""The QMP client against the real QEMU, and against bytes no QEMU should send."""

import json
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from vhostd.qmp import MAX_LINE, QmpClient, QmpClosed, QmpError, open_qmp, qmp_over

from tests.vm.stack import ensure

VERSION = {"qemu": {"major": 11, "minor": 1, "micro": 3}}


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A QEMU without a guest: the path of its QMP socket, and its process number."""
    path = tmp_path / "qmp.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        # QEMU is handed the listening socket, so there is no moment at which it is not there yet.
        listener.bind(str(path))
        listener.listen()
        command = [
            *ensure(()).qemu.command,
            *("-machine", "none", "-nodefaults", "-display", "none", "-qmp", "chardev:qmp"),
            *("-chardev", f"socket,id=qmp,fd={listener.fileno()},server=on,wait=off"),
        ]
        process = subprocess.Popen(command, pass_fds=[listener.fileno()])
    yield path, process.pid
    process.kill()
    process.wait()


@asynccontextmanager
async def _fake(
    *, greeting: object = None, capabilities: bool = True
) -> AsyncIterator[tuple[QmpClient, trio.SocketStream]]:
    """A client, and the VMM's end of its connection after greeting and negotiation."""
    ours, theirs = (
        trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair()
    )
    greeting = {"QMP": {"version": VERSION, "capabilities": []}} if greeting is None else greeting
    await theirs.send_all(json.dumps(greeting).encode() + b"\r\n")
    if capabilities:
        await theirs.send_all(b'{"return": {}, "id": 1}\r\n')
    async with theirs, qmp_over(ours, greeting_timeout_s=5) as client:
        await theirs.receive_some()
        yield client, theirs


async def test_real_qemu_answers_commands_by_their_names(qemu: tuple[Path, int]) -> None:
    async with open_qmp(qemu[0]) as qmp:
        assert qmp.version == ensure(()).qemu.version
        assert (await qmp.execute("query-status"))["status"] == "running"
        names = await qmp.execute("qom-list", path="/")
        assert "machine" in [entry["name"] for entry in names]


async def test_real_qemus_refusal_names_its_class_and_reason(qemu: tuple[Path, int]) -> None:
    async with open_qmp(qemu[0]) as qmp:
        with pytest.raises(QmpError) as unknown:
            await qmp.execute("no-such-command")
        assert unknown.value.error_class == "CommandNotFound"
        with pytest.raises(QmpError, match=r"qom-list: Parameter 'path' is missing"):
            await qmp.execute("qom-list")
        assert (await qmp.execute("query-status"))["running"] is True


async def test_real_qemu_runs_commands_of_many_tasks_at_once(qemu: tuple[Path, int]) -> None:
    answers: dict[str, str] = {}

    async def ask(path: str) -> None:
        answers[path] = await qmp.execute("qom-get", path=path, property="type")

    async with open_qmp(qemu[0]) as qmp, trio.open_nursery() as nursery:
        for path in ("/machine", "/objects", "/chardevs") * 5:
            nursery.start_soon(ask, path)
    assert answers == {
        "/machine": "none-machine",
        "/objects": "container",
        "/chardevs": "container",
    }


async def test_real_qemu_runs_out_of_band_commands(qemu: tuple[Path, int]) -> None:
    async with open_qmp(qemu[0]) as qmp:
        assert qmp.out_of_band
        assert await qmp.execute_oob("yank", instances=[]) == {}
        with pytest.raises(QmpError, match="does not support OOB"):
            await qmp.execute_oob("query-status")


async def test_real_qemus_events_reach_those_who_asked(qemu: tuple[Path, int]) -> None:
    async with open_qmp(qemu[0]) as qmp:
        with qmp.events("STOP") as stops, qmp.events() as everything:
            await qmp.execute("stop")
            await qmp.execute("cont")
            await qmp.execute("stop")
            with trio.fail_after(10):
                assert [(await stops.receive()).name for _ in range(2)] == ["STOP", "STOP"]
                events = [await everything.receive() for _ in range(3)]
        assert [event.name for event in events] == ["STOP", "RESUME", "STOP"]
        assert abs(events[0].timestamp_s - time.time()) < 60


async def test_a_slow_reader_of_events_loses_the_newest_and_knows_how_many(
    qemu: tuple[Path, int],
) -> None:
    async with open_qmp(qemu[0]) as qmp:
        with qmp.events("STOP", "RESUME", buffer=3) as events:
            for _ in range(4):
                await qmp.execute("stop")
                await qmp.execute("cont")
            assert events.dropped == 5
            assert [(await events.receive()).name for _ in range(3)] == ["STOP", "RESUME", "STOP"]


async def test_an_orderly_quit_ends_events_and_later_commands(qemu: tuple[Path, int]) -> None:
    async with open_qmp(qemu[0]) as qmp:
        with qmp.events() as events:
            await qmp.execute("quit")
            with trio.fail_after(10):
                assert [event.name async for event in events] == ["SHUTDOWN"]
                assert await qmp.wait_closed() == "the VMM closed the QMP connection"
        with pytest.raises(QmpClosed, match="query-status: the VMM closed"):
            await qmp.execute("query-status")
        with qmp.events() as late:
            assert [event async for event in late] == []
            with pytest.raises(QmpClosed):
                await late.receive()


async def test_a_killed_qemu_wakes_who_waits_for_an_answer(qemu: tuple[Path, int]) -> None:
    path, pid = qemu
    async with open_qmp(path) as qmp:
        os.kill(pid, signal.SIGSTOP)
        async with trio.open_nursery() as nursery:

            async def wait_in_vain() -> None:
                with pytest.raises(QmpClosed, match="query-status: the VMM closed"):
                    await qmp.execute("query-status")

            nursery.start_soon(wait_in_vain)
            await trio.testing.wait_all_tasks_blocked()
            os.kill(pid, signal.SIGKILL)


async def test_a_second_client_is_told_that_the_monitor_is_taken(qemu: tuple[Path, int]) -> None:
    async with open_qmp(qemu[0]):
        with pytest.raises(QmpClosed, match=r"no QMP greeting within 0\.2 s: is another client"):
            async with open_qmp(qemu[0], greeting_timeout_s=0.2):
                pytest.fail("it was let in")


async def test_no_listener_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(QmpClosed, match=r"cannot connect to QMP at .*no\.sock: No such file"):
        async with open_qmp(tmp_path / "no.sock"):
            pytest.fail("it connected")


async def test_what_the_body_raises_comes_out_as_it_was(qemu: tuple[Path, int]) -> None:
    with pytest.raises(LookupError, match="mine"):
        async with open_qmp(qemu[0]):
            raise LookupError("mine")


async def test_a_cancelled_commands_late_answer_is_thrown_away() -> None:
    async with _fake() as (client, vmm):
        with trio.move_on_after(0.05):
            await client.execute("slow")
        sent = json.loads(await vmm.receive_some())
        await vmm.send_all(json.dumps({"return": "late", "id": sent["id"]}).encode() + b"\n")
        async with trio.open_nursery() as nursery:

            async def answer() -> None:
                request = json.loads(await vmm.receive_some())
                assert request["execute"] == "quick"
                assert request["arguments"] == {"job-id": "j"}
                reply = json.dumps({"return": "now", "id": request["id"]}).encode()
                for byte in reply + b"\n":  # however the stream cuts it
                    await vmm.send_all(bytes([byte]))

            nursery.start_soon(answer)
            assert await client.execute("quick", **{"job-id": "j"}) == "now"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json\n", "no QMP message"),
        (b"[1, 2]\n", "no QMP message"),
        (b"[" * 100_000 + b"\n", "no QMP message"),
        (b'{"event": 5}\n', "no answer, error or event"),
        (b'{"neither": 1}\n', "no answer, error or event"),
        (b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\n', "to no command"),
        (b"x" * (MAX_LINE + 100_000), "more than"),
    ],
    ids=["garbage", "array", "deep", "event-name", "neither", "no-id", "endless-line"],
)
async def test_a_vmm_that_breaks_the_protocol_ends_the_conversation(
    line: bytes, reason: str
) -> None:
    async with _fake() as (client, vmm), trio.open_nursery() as nursery:
        nursery.start_soon(vmm.send_all, line)
        with trio.fail_after(20), pytest.raises(QmpClosed, match=reason):
            await client.execute("query-status")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "greeting", [{"hello": 1}, {"QMP": 5}, {"QMP": {"version": {"qemu": {}}, "capabilities": []}}]
)
async def test_a_greeting_that_is_none_is_refused(greeting: object) -> None:
    with pytest.raises(QmpClosed, match="greeting"):
        async with _fake(greeting=greeting, capabilities=False):
            pytest.fail("it was believed")


async def test_events_with_odd_fields_are_still_events() -> None:
    async with _fake() as (client, vmm):
        with client.events() as events:
            await vmm.send_all(
                b'{"event": "A", "timestamp": {"seconds": -1, "microseconds": -1}}\n'
                b'{"event": "B", "data": {"x": 1}, "timestamp": {"seconds":2,"microseconds":5}}\n'
            )
            first, second = await events.receive(), await events.receive()
        assert (first.name, first.data) == ("A", {})
        assert math.isnan(first.timestamp_s)
        assert (second.name, second.data, second.timestamp_s) == ("B", {"x": 1}, 2.000005)
