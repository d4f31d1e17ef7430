"""Neither VMMs that come and go nor daemons that die make anything grow."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.fakes.balloon import BalloonDriver
from tests.fakes.machine import Machine
from tests.fakes.memory import MIB, PAGE_SIZE
from tests.keeper.keeping import loaded_spare
from tests.native.rig import wait_until
from tests.takeover.balloon_scene import BALLOON, BalloonVm
from tests.takeover.kept import Kept, Usage

pytestmark = pytest.mark.timeout(3600)

WARM_UP_ROUNDS, WARM_UP_TAKEOVERS = 50, 3
RESIDENT_SLACK_SIZE = 2048
"""KiB: what the allocator of Python may do by itself."""
MAPPINGS_SLACK = 4
"""It makes arenas when it likes; a leak shows over many rounds."""


def used(kept: Kept) -> tuple[Usage, Usage]:
    """What the daemon and the keeper have, with the spare process that is there between deaths."""
    loaded_spare(kept.keeper, kept.worker)
    return Usage.of(kept.worker), Usage.of(kept.keeper)


def flat(now: Usage, before: Usage) -> bool:
    """Nothing has become more; resident memory may a little."""
    return (
        now.fds <= before.fds  # the control API's own connection may have been one
        and now.mappings <= before.mappings + MAPPINGS_SLACK
        and now.threads <= before.threads
        and now.resident_size <= before.resident_size + RESIDENT_SLACK_SIZE
    )


def assert_flat(kept: Kept, before: tuple[Usage, Usage]) -> None:
    """Wait until what is let go of later is gone: threads without work, for one."""
    try:
        wait_until(lambda: all(map(flat, used(kept), before)), 20)
    except TimeoutError:
        raise AssertionError(f"before {before}, now {used(kept)}") from None


def settled(kept: Kept) -> tuple[Usage, Usage]:
    """What they have once there is no VMM, and the keeper has heard of it."""
    wait_until(lambda: bool(kept.status()["state"] == "waiting"))
    return used(kept)


def one_round(kept: Kept, number: int) -> None:
    """A VMM comes, its guest gives up a page, and it goes."""
    page = 16 * MIB + number % 1024 * PAGE_SIZE
    with Machine.boot(kept.socket("balloon")) as machine:
        machine.memory.touch(page, PAGE_SIZE)
        BalloonDriver(machine).inflate([page // PAGE_SIZE])
        assert not machine.memory.page_present(page)


async def test_vmms_that_come_and_go(tmp_path: Path, rounds: int) -> None:
    async with Kept.start(tmp_path, BALLOON) as kept:
        begun_s = time.monotonic()
        before = settled(kept)
        for number in range(rounds):
            if number == WARM_UP_ROUNDS:
                before = settled(kept)
            one_round(kept, number)
        settled(kept)
        assert_flat(kept, before)
        assert kept.status()["connections"] == rounds
        elapsed_s = time.monotonic() - begun_s
        print(f"{rounds} rounds in {elapsed_s:.0f} s: {before} -> {used(kept)}")


async def test_daemons_that_die(tmp_path: Path, takeovers: int) -> None:
    async with Kept.start(tmp_path, BALLOON) as kept:
        with closing(BalloonVm(kept)) as vm:
            begun_s = time.monotonic()
            for _ in range(WARM_UP_TAKEOVERS):
                kept.die()
                vm.works()
            before = used(kept)
            for _ in range(takeovers):
                kept.die()
                vm.works()
            assert_flat(kept, before)
            gap_s = (time.monotonic() - begun_s) / (takeovers + WARM_UP_TAKEOVERS)
            print(f"{takeovers} take-overs of {gap_s:.2f} s: {before} -> {used(kept)}")
