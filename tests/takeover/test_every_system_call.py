"""The daemon is killed at any system call of a request; the request is answered once, and right."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.takeover.balloon_scene import Kind, MessageScene
from tests.takeover.calls import CallStepper
from tests.takeover.chain_scenes import CHAINS
from tests.takeover.connect_scene import ConnectScene
from tests.takeover.kept import Kept
from tests.takeover.message_kinds import MESSAGES
from tests.takeover.scene import Scene

pytestmark = pytest.mark.timeout(3600)


def ask_once(kept: Kept, scene: Scene, place: int | None) -> tuple[bool, int]:
    """Ask, and kill the daemon once it has gone by so many places; None: let it live.

    Returns:
        Whether it was killed, and how many places it went by.
    """
    scene.ready()
    stepper = CallStepper(kept.worker)
    scene.ask()
    killed = stepper.advance(place, lambda: scene.answered(woken=stepper.woken))
    if killed:
        kept.die(stepper.bury)
    else:
        stepper.release()
    try:
        scene.check()
    except Exception as error:
        at = f"killed at place {place}, {stepper.where}" if killed else "not killed"
        raise AssertionError(f"{at}: {type(error).__name__}: {error}") from error
    return killed, stepper.passed


async def sweep(scene: Scene, folder: Path, kills_most: int | None, name: str) -> None:
    """Kill at the chosen places, or at one after the other until the request is done before."""
    begun_s = time.monotonic()
    kills = 0
    async with Kept.start(folder, scene.configuration) as kept:
        scene.open(kept)
        try:
            _, found = ask_once(kept, scene, None)
            chosen: Sequence[int] = range(found)
            if kills_most is not None and found > kills_most:
                chosen = sorted(random.Random(name).sample(chosen, kills_most))
            for place in chosen:
                kills += ask_once(kept, scene, place)[0]
            place = found
            while kills_most is None and ask_once(kept, scene, place)[0]:
                kills, place = kills + 1, place + 1
            scene.finish()
        except BaseException:
            print(kept.log[-3000:])
            raise
        finally:
            scene.close()
        assert "Traceback" not in kept.log
    print(f"{name}: {found} places, {kills} kills, {time.monotonic() - begun_s:.0f} s")


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.name)
async def test_a_message_is_answered_once(
    kind: Kind, tmp_path: Path, kills_most: int | None
) -> None:
    await sweep(MessageScene(kind), tmp_path, kills_most, kind.name)


@pytest.mark.parametrize("name", CHAINS)
async def test_a_chain_is_served_once(name: str, tmp_path: Path, kills_most: int | None) -> None:
    await sweep(CHAINS[name](), tmp_path, kills_most, name)


async def test_a_vmm_that_connects_is_not_left_waiting(
    tmp_path: Path, kills_most: int | None
) -> None:
    await sweep(ConnectScene(), tmp_path, kills_most, "connect")
