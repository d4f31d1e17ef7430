"""Every hostile input: once with a full look at the program, many times with an eye on leaks."""

from __future__ import annotations

import pytest

from tests.fakes.balloon import BalloonDriver
from tests.fakes.machine import Machine
from tests.hostile import (
    attacks_balloon,
    attacks_chains,
    attacks_config,
    attacks_framing,
    attacks_memory,
    attacks_negotiation,
    attacks_queues,
    attacks_rings,
    attacks_transfer,
)
from tests.hostile.attack import Attack, Verdict, strike
from tests.hostile.oracle import GROWTH_MAX_SIZE, Oracle

MODULES = (
    attacks_framing,
    attacks_negotiation,
    attacks_memory,
    attacks_rings,
    attacks_transfer,
    attacks_queues,
    attacks_chains,
    attacks_balloon,
    attacks_config,
)
ATTACKS = [attack for module in MODULES for attack in module.ATTACKS]
WARM_UP = 16  # repeats before memory is measured
FRESH_SHARE = 8  # what needs a new connection, or a while to look: so many times fewer repeats
REPEAT_TIME_MAX_S = 1800


def label(attack: Attack) -> str:
    """Return the test id."""
    return attack.label


def test_labels_tell_attacks_apart() -> None:
    labels = [attack.label for attack in ATTACKS]
    assert len(labels) == len(set(labels))


@pytest.mark.parametrize("attack", ATTACKS, ids=label)
def test_program_is_unharmed_by(attack: Attack, oracle: Oracle) -> None:
    with Machine.boot(oracle.program.socket_path, attack.setup) as machine:
        strike(attack, BalloonDriver(machine))
    oracle.unharmed()


@pytest.mark.long  # every day: test_growth.py
@pytest.mark.timeout(REPEAT_TIME_MAX_S)
@pytest.mark.parametrize("attack", ATTACKS, ids=label)
def test_program_does_not_grow_from(attack: Attack, oracle: Oracle, repeats: int) -> None:
    if attack.verdict is Verdict.DROP:
        grown = growth_over_connections(attack, oracle, max(2, repeats // FRESH_SHARE))
    else:
        share = FRESH_SHARE if attack.watches else 1
        grown = growth_in_one_connection(attack, oracle, max(2, repeats // share))
    assert grown < GROWTH_MAX_SIZE, f"{grown >> 10} KiB more after {repeats} repeats"
    oracle.unharmed()


def growth_in_one_connection(attack: Attack, oracle: Oracle, repeats: int) -> int:
    """Repeat on one connection and return how much anonymous memory the program gained."""
    program = oracle.program
    with Machine.boot(program.socket_path, attack.setup) as machine:
        guest = BalloonDriver(machine)
        for _ in range(WARM_UP):
            strike(attack, guest)
        before_size, before_fds = program.resident_size(), len(program.fds())
        for _ in range(repeats):
            strike(attack, guest)
        assert len(program.fds()) <= before_fds + 1, "descriptors pile up within a connection"
        return program.resident_size() - before_size


def growth_over_connections(attack: Attack, oracle: Oracle, repeats: int) -> int:
    """Repeat on a connection each and return how much anonymous memory the program gained."""
    program = oracle.program
    before_size = 0
    for turn in range(WARM_UP + repeats):
        if turn == WARM_UP:
            before_size = program.resident_size()
        with Machine.boot(program.socket_path, attack.setup) as machine:
            strike(attack, BalloonDriver(machine))
    return program.resident_size() - before_size
