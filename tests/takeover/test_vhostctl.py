"""vhostctl goes on over a real take-over: nothing is told twice, and a wait ends as it should."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import trio

from tests.control.program import PROGRAM
from tests.fakes.machine import Setup
from tests.fakes.mem import MemAnswer, MemDriver
from tests.native.rig import wait_until
from tests.takeover.kept import VM, Kept

BLOCKS = 32
SIZE = BLOCKS << 21
CONFIGURATION = (
    f'[[vm.{VM}.mem]]\nid = "mem0"\nwindow_address = 0x100000000\nsize = "512MiB"\n'
    'block_size = "2MiB"\n'
)


@pytest.mark.timeout(120)
async def test_a_resize_and_its_events_go_on_with_the_successor(tmp_path: Path) -> None:
    async with Kept.start(tmp_path, CONFIGURATION) as kept:

        def vhostctl(*arguments: str) -> subprocess.Popen[str]:
            return subprocess.Popen(
                [*PROGRAM, "--socket", str(tmp_path / "control.sock"), "--json", *arguments],
                stdout=subprocess.PIPE,
                text=True,
            )

        def work() -> None:
            with (
                MemDriver.boot(kept.socket("mem0"), Setup()) as guest,
                vhostctl("events", "--follow") as following,
                vhostctl("mem", "resize", VM, str(SIZE), "--wait") as waiting,
            ):
                assert waiting.stdout is not None
                wait_until(lambda: bool(kept.status()["mem"][0]["requested"] == SIZE))
                events: list[dict[str, object]] = []

                def read_until(name: str) -> None:
                    assert following.stdout is not None
                    event: dict[str, object] = {}
                    while event.get("event") != name:
                        event = json.loads(following.stdout.readline())
                        events.append(event)

                for _ in range(2):
                    kept.die()
                    read_until("vm_taken_over")
                assert waiting.poll() is None
                assert guest.plug(0, BLOCKS) is MemAnswer.ACK
                assert waiting.wait(30) == 0
                assert json.loads(waiting.stdout.read())["plugged"] == SIZE
                read_until("mem_plugged")
                following.kill()
                ids = [int(str(event["id"])) for event in events]
                assert ids == sorted(set(ids)), "an event was told twice"
                told = [event["event"] for event in events]
                assert told.count("mem_requested") == 1
                assert told.count("vm_taken_over") == 2

        await trio.to_thread.run_sync(work)
