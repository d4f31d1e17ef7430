"""The balloon's config space to the byte, its target, its poison rule, and its saved state."""

from __future__ import annotations

import json
from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vhostd.devices.balloon import Balloon
from vhostd.devices.balloon_features import BalloonFeature, BalloonOptions
from vhostd.devices.base import (
    Chain,
    Complete,
    ConfigureDataPlane,
    DataPlane,
    DeviceEvent,
    Event,
    NotifyConfig,
    PublishConfig,
    Refused,
    ResetDataPlane,
    Role,
)
from vhostd.devices.verdict import Finding, Verdict
from vhostd.errors import GuestError
from vhostd.units import GiB, MiB

ALL = 0x3F
COUNTERS = {
    "inflated_pages": 3,
    "reported_size": 4 * MiB,
    "discarded_size": 5 * MiB,
    "withheld_size": 6 * MiB,
}


def config(pages: int = 0, actual: int = 0, command: int = 0, poison: int = 0) -> bytes:
    return pack("<IIII", pages, actual, command, poison)


def test_the_config_space_has_sixteen_bytes_and_the_driver_owns_eight() -> None:
    balloon = Balloon()
    assert balloon.config() == bytes(16)
    assert balloon.config_writable == bytes(4) + b"\xff" * 4 + bytes(4) + b"\xff" * 4
    assert (balloon.device_id, balloon.queue_count, balloon.config_size) == (5, 5, 16)


def test_a_target_is_published_in_pages_before_the_driver_is_told() -> None:
    balloon = Balloon()
    effects = balloon.set_target(512 * MiB)
    assert list(effects) == [
        PublishConfig(0, bytes.fromhex("00000200")),
        NotifyConfig(),
        Event(
            DeviceEvent.BALLOON_TARGET,
            {"target": 512 * MiB, "actual": 0, "reached": False},
        ),
    ]
    assert balloon.config() == config(pages=0x20000)


def test_the_same_target_again_tells_the_driver_again() -> None:
    """Linux deflates on out of memory and inflates again only at the next config change."""
    balloon = Balloon()
    balloon.set_target(MiB)
    assert NotifyConfig() in balloon.set_target(MiB)


def test_a_target_is_rounded_down_to_whole_pages() -> None:
    balloon = Balloon()
    balloon.set_target(3 * 4096 - 1)
    assert balloon.target == 2 * 4096


def test_a_target_above_guest_ram_is_refused_and_changes_nothing() -> None:
    balloon = Balloon()
    balloon.set_guest_memory(GiB)
    balloon.set_target(256 * MiB)
    with pytest.raises(Refused, match="1 GiB of RAM"):
        balloon.set_target(GiB + 4096)
    assert balloon.target == 256 * MiB
    balloon.set_target(GiB)
    assert balloon.target == GiB


@pytest.mark.parametrize("size", [-1, 2**44, 2**64])
def test_a_target_that_32_bits_of_pages_cannot_hold_is_refused(size: int) -> None:
    with pytest.raises(Refused, match="pages of 4 KiB"):
        Balloon().set_target(size)


def test_a_target_set_before_ram_was_known_shrinks_to_it() -> None:
    balloon = Balloon()
    balloon.set_target(4 * GiB)
    effects = balloon.set_guest_memory(GiB)
    assert PublishConfig(0, pack("<I", GiB // 4096)) in effects
    assert NotifyConfig() in effects
    assert balloon.target == GiB
    assert balloon.set_guest_memory(2 * GiB) == []


def test_actual_is_what_the_guest_says_even_when_it_lies() -> None:
    balloon = Balloon()
    effects = balloon.on_config_written(config(actual=0xFFFF_FFFF))
    assert effects == [
        Event(
            DeviceEvent.BALLOON_ACTUAL,
            {"target": 0, "actual": 0xFFFF_FFFF * 4096, "reached": False},
        )
    ]
    assert balloon.status(COUNTERS, 0)["actual"] == 0xFFFF_FFFF * 4096
    assert balloon.status(COUNTERS, 0)["inflated"] == 3 * 4096


def test_stale_fields_of_a_config_write_change_nothing() -> None:
    """QEMU sends the whole space with every write; the device's own fields may be old in it."""
    balloon = Balloon()
    balloon.set_target(MiB)
    balloon.on_config_written(config(pages=77, actual=1, command=99))
    assert balloon.config() == config(pages=256, actual=1)
    assert balloon.on_config_written(config(pages=0, actual=1)) == []


@pytest.mark.parametrize(("actual_pages", "reached"), [(241, True), (240, False), (271, True)])
def test_a_guest_with_large_pages_reaches_its_target_nearly(
    actual_pages: int, reached: bool
) -> None:
    balloon = Balloon()
    balloon.set_target(MiB)
    balloon.on_config_written(config(actual=actual_pages))
    assert balloon.reached is reached


@pytest.mark.parametrize("negotiated", [False, True])
def test_the_data_plane_minds_the_poison_value_if_the_driver_does(negotiated: bool) -> None:
    features = ALL if negotiated else ALL & ~BalloonFeature.PAGE_POISON
    (effect,) = Balloon().on_features(features)
    flags = DataPlane.MUST_TELL_HOST | (DataPlane.PAGE_POISON if negotiated else DataPlane(0))
    assert effect == ConfigureDataPlane(flags)


def test_the_next_vmm_s_guest_has_no_poison_value() -> None:
    balloon = Balloon()
    balloon.on_config_written(config(poison=0xAA))
    balloon.on_disconnected()
    assert balloon.config()[-4:] == bytes(4)


def test_a_new_driver_starts_with_an_empty_balloon_and_the_old_target() -> None:
    balloon = Balloon()
    balloon.set_target(MiB)
    balloon.on_config_written(config(actual=256, poison=0xAA))
    effects = balloon.on_driver_reset()
    assert ResetDataPlane() in effects
    assert PublishConfig(4, bytes(4)) in effects
    assert balloon.config() == config(pages=256, actual=0, poison=0xAA)


def test_a_new_drivers_statistics_are_not_its_predecessors() -> None:
    balloon = Balloon()
    data = pack("<HQ", 4, 1)
    balloon.on_chain(Chain(2, Role.STATISTICS, 1, data, len(data)), now_s=1.0)
    balloon.on_driver_reset()
    assert balloon.status(COUNTERS, 0)["stats"] == {}
    assert balloon.on_timer() == []


def test_a_verdict_adds_to_what_was_negotiated() -> None:
    balloon = Balloon()
    tell = BalloonFeature.MUST_TELL_HOST
    assert balloon.on_features(tell) == [ConfigureDataPlane(DataPlane.MUST_TELL_HOST)]
    both = DataPlane.MUST_TELL_HOST | DataPlane.MAY_DISCARD
    for finding in Finding:
        may = finding in (Finding.FREE, Finding.UNCHECKED)
        flags = both if may else DataPlane.MUST_TELL_HOST
        assert balloon.on_verdict(Verdict(finding, "gpu0")) == [ConfigureDataPlane(flags)]
        assert (balloon.status(COUNTERS, 0)["inhibited"] is None) is may


def test_the_end_of_a_connection_is_no_verdict() -> None:
    balloon = Balloon()
    balloon.on_verdict(Verdict(Finding.PINNED, "gpu0"))
    balloon.on_disconnected()
    assert balloon.on_features(0) == [ConfigureDataPlane(DataPlane(0))]


def test_a_chain_of_the_data_plane_is_no_business_of_ours() -> None:
    with pytest.raises(GuestError, match="data plane"):
        Balloon().on_chain(Chain(0, Role.INFLATE, 1), now_s=0.0)


def test_statistics_are_asked_for_by_the_timer_and_on_request() -> None:
    balloon = Balloon(BalloonOptions(stats_interval_s=2.5))
    assert balloon.timer_interval_s == 2.5
    balloon.on_features(BalloonFeature.STATS_VQ)
    balloon.on_started()
    balloon.on_chain(Chain(2, Role.STATISTICS, 1), now_s=1.0)
    assert balloon.on_timer() == [Complete(2, 1)]
    assert balloon.on_timer() == []
    assert balloon.request_statistics() == []
    balloon.on_chain(Chain(2, Role.STATISTICS, 2), now_s=1.0)
    assert balloon.request_statistics() == [Complete(2, 2)]
    balloon.on_chain(Chain(2, Role.STATISTICS, 3), now_s=1.0)
    balloon.on_stopped()
    assert balloon.on_timer() == []
    with pytest.raises(Refused, match="running guest driver"):
        balloon.request_statistics()


def test_status_holds_the_contracts_keys_in_bytes() -> None:
    balloon = Balloon()
    balloon.on_features(ALL)
    status = balloon.status(COUNTERS, 0)
    contract = ("target", "actual", "inflated", "reported", "discarded", "stats", "features")
    assert tuple(status)[:7] == contract
    assert status["reported"] == 4 * MiB
    assert "page_reporting" in status["features"]
    json.dumps(status)


@given(
    st.integers(0, 2**44 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 3),
    st.binary(max_size=200),
)
def test_a_successor_is_what_its_predecessor_was(
    target: int, actual: int, poison: int, hint_steps: int, statistics: bytes
) -> None:
    balloon = Balloon()
    balloon.on_features(ALL)
    balloon.on_started()
    balloon.set_target(target)
    balloon.on_config_written(config(actual=actual, poison=poison))
    balloon.on_chain(Chain(2, Role.STATISTICS, 1, statistics, len(statistics)), now_s=5.0)
    for step in range(hint_steps):
        if step == 0:
            balloon.hint_start()
        else:
            data = pack("<I", 0x8000_0001 if step == 1 else 0)
            told = Chain(3, Role.FREE_PAGE_HINT, 2, data, 4, position=step)
            balloon.on_chain(told, now_s=6.0)

    successor = Balloon()
    successor.load(json.loads(json.dumps(balloon.save())))
    successor.on_features(ALL)
    successor.on_started()

    assert successor.config() == balloon.config()
    assert successor.status(COUNTERS, 0) == balloon.status(COUNTERS, 0)
    assert successor.save() == balloon.save()


@pytest.mark.parametrize(
    "damage",
    [
        {"target_pages": 2**32},
        {"target_pages": "1"},
        {"hint_phase": "asleep"},
        {"hint_phase": "running"},
        {"hint_shown": 0x8000_0001},
        {"surplus": 1},
    ],
)
def test_a_damaged_state_is_refused_whole(damage: dict[str, object]) -> None:
    balloon = Balloon()
    balloon.set_target(MiB)
    with pytest.raises(ValueError, match="saved state"):
        balloon.load({**Balloon().save(), **damage})
    assert balloon.target == MiB
