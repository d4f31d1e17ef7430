"""Offers, and which queue is which: both numberings, every feature subset, every order."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from vhostd.devices.balloon_features import (
    BalloonFeature,
    BalloonOptions,
    balloon_feature_names,
    offered_features,
    resolve_roles,
)
from vhostd.devices.base import Role

STATS, HINT, REPORT = Role.STATISTICS, Role.FREE_PAGE_HINT, Role.REPORTING
BASE = {0: Role.INFLATE, 1: Role.DEFLATE}

# Negotiated bits of {1, 3, 5} -> Linux's indexes, the specification's indexes.
TABLE: list[tuple[set[int], dict[int, Role], dict[int, Role]]] = [
    (set(), {}, {}),
    ({1}, {2: STATS}, {2: STATS}),
    ({3}, {2: HINT}, {3: HINT}),
    ({5}, {2: REPORT}, {4: REPORT}),
    ({1, 3}, {2: STATS, 3: HINT}, {2: STATS, 3: HINT}),
    ({1, 5}, {2: STATS, 3: REPORT}, {2: STATS, 4: REPORT}),
    ({3, 5}, {2: HINT, 3: REPORT}, {3: HINT, 4: REPORT}),
    ({1, 3, 5}, {2: STATS, 3: HINT, 4: REPORT}, {2: STATS, 3: HINT, 4: REPORT}),
]
CASES = [
    pytest.param(sum(1 << bit for bit in bits), roles, id=f"{sorted(bits)}-{name}")
    for bits, linux, literal in TABLE
    for name, roles in (("linux", linux), ("literal", literal))
]


@pytest.mark.parametrize(("features", "roles"), CASES)
def test_all_queues_started_have_their_roles(features: int, roles: dict[int, Role]) -> None:
    assert resolve_roles(features, {0, 1, *roles}) == {**BASE, **roles}


@pytest.mark.parametrize(("features", "roles"), CASES)
def test_no_queue_ever_has_a_wrong_role_while_they_start_one_by_one(
    features: int, roles: dict[int, Role]
) -> None:
    """A hint queue served as a reporting queue would discard memory in use."""
    final = {**BASE, **roles}
    for order in itertools.permutations(final):
        for count in range(len(order) + 1):
            assert resolve_roles(features, order[:count]).items() <= final.items()


def test_a_literal_driver_that_starts_all_five_queues_is_recognised() -> None:
    features = BalloonFeature.PAGE_REPORTING
    assert resolve_roles(features, range(5)) == {**BASE, 4: REPORT}


def test_optional_queues_without_their_feature_have_no_role() -> None:
    assert resolve_roles(BalloonFeature.STATS_VQ, {0, 1, 4}) == BASE
    assert resolve_roles(0, range(5)) == BASE


def test_everything_is_offered_by_default_and_nothing_undone() -> None:
    names = balloon_feature_names(offered_features(BalloonOptions()))
    assert names == [
        "must_tell_host",
        "stats_vq",
        "deflate_on_oom",
        "free_page_hint",
        "page_poison",
        "page_reporting",
        "ring_indirect_desc",
        "ring_event_idx",
        "version_1",
        "ring_packed",
        "in_order",
    ]
    assert offered_features(BalloonOptions()) == 0x3F | 1 << 28 | 1 << 29 | 1 << 32 | 3 << 34


@pytest.mark.parametrize(
    ("option", "bit"),
    [
        ("deflate_on_oom", 2),
        ("free_page_hinting", 3),
        ("page_poison", 4),
        ("free_page_reporting", 5),
        ("packed", 34),
        ("in_order", 35),
    ],
)
def test_an_option_switched_off_takes_exactly_its_bit_away(option: str, bit: int) -> None:
    changes: dict[str, Any] = {option: False}
    off = offered_features(replace(BalloonOptions(), **changes))
    assert offered_features(BalloonOptions()) ^ off == 1 << bit
