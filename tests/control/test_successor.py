"""What waits for a guest goes on with the daemon's successor, and says so when none comes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.control.program import PROGRAM
from tests.control.served import WAITED_FOR, Served, serving

IMPATIENT = (
    sys.executable,
    "-c",
    "from vhostd.control import cli, client; client.SUCCESSOR_TIMEOUT_S = 1; cli.main()",
)
WAITS = {
    "balloon": (("balloon", "set", "web", "1M", "--wait"), "reach 1 MiB"),
    "mem": (("mem", "resize", "web", "64M", "--wait"), "plug 64 MiB"),
    "memory": (("memory", "set", "web", "1023M", "--wait"), "reach 1 MiB"),
    "statistics": (("balloon", "stats", "web", "--fresh", "--timeout", "30"), "statistics"),
}
ENDS: dict[str, Callable[[Served], None]] = {"killed": Served.kill, "stopped": Served.stop}

ends = pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())


@contextmanager
def vhostctl(
    folder: Path, arguments: tuple[str, ...], program: tuple[str, ...] = PROGRAM
) -> Iterator[subprocess.Popen[str]]:
    """Run it in the background."""
    command = [*program, "--socket", str(folder / "control.sock"), *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@ends
@pytest.mark.parametrize(("arguments", "done"), WAITS.values(), ids=WAITS.keys())
def test_a_wait_goes_on_with_the_successor(
    tmp_path: Path, arguments: tuple[str, ...], done: str, end: Callable[[Served], None]
) -> None:
    with serving(tmp_path, "mute") as first, vhostctl(tmp_path, arguments) as waiting:
        first.do(WAITED_FOR)
        end(first)
        with serving(tmp_path, "mute", "request 64 MiB") as second:
            second.do(WAITED_FOR)
            assert waiting.poll() is None
            second.do(done)
            _, stderr = waiting.communicate(timeout=30)
    assert waiting.returncode == 0, stderr
    assert "control.sock: the daemon ended; waiting for its successor\n" in stderr
    assert "Traceback" not in stderr


@ends
def test_a_wait_that_no_successor_ends_says_so(
    tmp_path: Path, end: Callable[[Served], None]
) -> None:
    for arguments, _ in (*WAITS.values(), (("events", "--follow"), "")):
        with (
            serving(tmp_path, "mute") as first,
            vhostctl(tmp_path, arguments, IMPATIENT) as waiting,
        ):
            first.do(WAITED_FOR)
            end(first)
            _, stderr = waiting.communicate(timeout=30)
        assert waiting.returncode == 3, (arguments, stderr)
        ended, lost = stderr.splitlines()
        assert ended.startswith("vhostctl: ") and lost.startswith("vhostctl: ")
        assert "the daemon ended, and none came back within 1 s" in lost


def test_a_wait_whose_time_is_over_says_where_the_successors_guest_is(tmp_path: Path) -> None:
    arguments = ("mem", "resize", "web", "64M", "--wait", "--timeout", "1.5")
    with serving(tmp_path) as first, vhostctl(tmp_path, arguments) as waiting:
        first.do(WAITED_FOR)
        first.kill()
        with serving(tmp_path, "request 64 MiB"):
            _, stderr = waiting.communicate(timeout=30)
    assert waiting.returncode == 4, stderr
    assert "timed out: mem0 is at 0 bytes of 67108864" in stderr


@ends
def test_followed_events_go_on_with_the_successors(
    tmp_path: Path, end: Callable[[Served], None]
) -> None:
    with (
        serving(tmp_path, "mute") as first,
        vhostctl(tmp_path, ("--json", "events", "--follow")) as following,
    ):
        assert following.stdout is not None
        first.do(WAITED_FOR)
        seen = [json.loads(following.stdout.readline())["id"]]
        first.do("statistics")
        seen.append(json.loads(following.stdout.readline())["id"])
        end(first)
        # The successor remembers the latest event, which was told, and another happens before its
        # first client comes.
        with serving(tmp_path, "request 64 MiB", first_event=seen[-1]) as second:
            seen.append(json.loads(following.stdout.readline())["id"])
            second.do(WAITED_FOR)
            second.do("reach 1 MiB")
            last = json.loads(following.stdout.readline())
            seen.append(last["id"])
    assert seen == list(range(seen[0], seen[0] + 4))
    assert (last["event"], last["actual"]) == ("balloon_actual", 1 << 20)
