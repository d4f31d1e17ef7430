"""A device with ever more chains has its turns, and other VMs theirs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
from vhostd.backend import chains
from vhostd.backend.chains import TURN_S, ChainServer
from vhostd.devices.base import Chain, Effects, Role

CHAIN_S = TURN_S / 4
ROUNDS = 20


class Flood:
    """A native device whose queues never run empty, and a device that takes its time."""

    def __init__(self, clock: trio.testing.MockClock, queues: int) -> None:
        self.clock = clock
        self.queues = queues
        self.now_s = 0.0
        self.served: list[int] = []

    def take_chain(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(
            token=0,
            position=0,
            data=b"",
            readable_size=0,
            writable_count=0,
            writable_size=0,
            writable_addr=0,
        )

    def on_chain(self, chain: Chain, now_s: float) -> Effects:
        self.now_s += CHAIN_S
        self.served.append(chain.queue_index)
        return []

    def roles(self) -> dict[int, Role]:
        return dict.fromkeys(range(self.queues), Role.STATISTICS)

    def perform(self, effects: Effects) -> None:
        pass


@pytest.mark.parametrize("queues", [1, 3])
async def test_one_turn_is_bounded_and_followed_by_a_pause_as_long(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock, queues: int
) -> None:
    flood: Any = Flood(autojump_clock, queues)
    monkeypatch.setattr(chains, "time", SimpleNamespace(perf_counter=lambda: flood.now_s, time=int))
    server = ChainServer(flood, flood, flood, flood.roles, flood)
    turns = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_left)
        for _ in range(ROUNDS):
            before = len(flood.served)
            server.serve()  # the worker says that there is more, as often as it likes
            server.serve()
            await trio.sleep(TURN_S)
            await trio.testing.wait_all_tasks_blocked()
            turns.append(len(flood.served) - before)
        nursery.cancel_scope.cancel()
    assert max(turns[1:]) <= TURN_S / CHAIN_S
    assert sum(turns) >= ROUNDS * TURN_S / CHAIN_S - 4
    assert set(flood.served) == set(range(queues))
