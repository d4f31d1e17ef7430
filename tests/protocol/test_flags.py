"""Masks remember no more values than they have members, whatever a VMM sends."""

from __future__ import annotations

import random

import pytest
from vhostd import flags
from vhostd.devices.balloon_features import BalloonFeature
from vhostd.protocol.features import ProtocolFeature, VirtioFeature
from vhostd.protocol.wire import HeaderFlag

from tests.tidy.test_sizes import PYTHON, name_of

VALUES = 2000


@pytest.mark.parametrize("kind", [HeaderFlag, BalloonFeature, ProtocolFeature, VirtioFeature])
def test_memory_of_values_has_a_bound(kind: type[flags.Flags]) -> None:
    values = random.Random(1)
    for _ in range(VALUES):
        value = values.getrandbits(64)
        assert int(kind(value)) == value
        assert kind(value) | 1 == value | 1
        assert kind(-1 - value) is not None
    assert len(kind._value2member_map_) <= len(kind) + (1 << flags.REMEMBERED_BITS_MAX)


def test_what_the_values_mean_is_unchanged() -> None:
    both = ProtocolFeature.MQ | ProtocolFeature.CONFIG
    assert list(both) == [ProtocolFeature.MQ, ProtocolFeature.CONFIG]
    assert ProtocolFeature(1 << 2) is ProtocolFeature.RARP
    assert HeaderFlag(9) is HeaderFlag(9)
    assert (
        repr(both | 1 << 60)
        == "<ProtocolFeature.MQ|CONFIG|1152921504606846976: 1152921504606847489>"
    )


def test_no_other_masks_are_used() -> None:
    users = {name_of(path) for path in PYTHON if "IntFlag" in path.read_text()}
    ours = {name for name in users if name.startswith("vhostd/")}
    assert ours == {"vhostd/flags.py"}
