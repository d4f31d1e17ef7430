"""The virtio-pmem device as values: what the driver learns, what is said of the image, what stays.

Must not know files or rings.
"""

from __future__ import annotations

import json
from dataclasses import replace
from struct import unpack

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vhostd.control.answers import PmemStatus
from vhostd.devices.base import Chain, DeviceEvent, Effects, Event, Log, Role
from vhostd.devices.pmem import ImageView, Pmem, PmemFeature, PmemMode, PmemOptions
from vhostd.devices.pmem_state import Failure
from vhostd.errors import GuestError
from vhostd.protocol.features import VirtioFeature
from vhostd.units import GiB, MiB, TiB

SHMEM = PmemOptions("disk0", "/images/disk0.img", 256 * MiB)
WINDOW = replace(SHMEM, mode=PmemMode.WINDOW, window_address=9 * GiB)
EIO = Failure(5, "sync: Input/output error", 1000.5)
ENOSPC = Failure(28, "sync: No space left on device", 2000.5)
COUNTERS = {"flushes": 10, "flush_errors": 1, "malformed": 2, "batches": 3}
SYNCS = {"syncs": 4, "sync_ns": 4_000_000_000, "sync_ns_last": 250_000, "sync_ns_max": 10**9}


def running(options: PmemOptions = SHMEM) -> Pmem:
    """A device whose guest has the disk."""
    pmem = Pmem(options)
    pmem.on_features(pmem.offered_features)
    pmem.on_started()
    pmem.on_region(None)
    return pmem


def events(effects: Effects) -> list[tuple[str, object]]:
    """Names of the news among these, and why."""
    return [(e.name, e.fields.get("why")) for e in effects if isinstance(e, Event)]


# -- what the driver learns ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        (SHMEM, {0, 28, 29, 32, 34, 35}),
        (WINDOW, {28, 29, 32, 34, 35}),
        (replace(SHMEM, packed=False), {0, 28, 29, 32, 35}),
        (replace(WINDOW, in_order=False), {28, 29, 32, 34}),
    ],
)
def test_the_features_of_each_mode(options: PmemOptions, bits: set[int]) -> None:
    assert Pmem(options).offered_features == sum(1 << bit for bit in bits)


def test_the_config_space_says_where_a_window_is_and_nothing_of_shared_memory() -> None:
    assert Pmem(SHMEM).config() == bytes(16)
    assert unpack("<QQ", Pmem(WINDOW).config()) == (9 * GiB, 256 * MiB)
    for options in (SHMEM, WINDOW):
        assert (Pmem(options).config_size, Pmem(options).config_writable) == (16, bytes(16))


@given(st.integers(1, 16 * TiB // (2 * MiB)).map(lambda count: count * 2 * MiB))
def test_there_is_one_region_and_only_a_power_of_two_is_given_to_a_vmm(size: int) -> None:
    pmem = Pmem(replace(SHMEM, size=size))
    assert pmem.shmem_region_sizes == (size,)
    assert (pmem.options.refusal is None) == (size & (size - 1) == 0)
    window = Pmem(replace(WINDOW, size=size))
    assert (window.shmem_region_sizes, window.options.refusal) == ((), None)


@pytest.mark.parametrize(
    ("size", "fitting"),
    [
        (384 * MiB, (512 * MiB, "512 MiB")),
        (3 * GiB, (4 * GiB, "4 GiB")),
        (9 * GiB, (16 * GiB, "16 GiB")),
        (4 * GiB + 2 * MiB, (8 * GiB, "8 GiB")),
    ],
)
def test_a_refused_size_is_told_with_the_one_that_fits(size: int, fitting: tuple[int, str]) -> None:
    pmem = Pmem(replace(SHMEM, size=size))
    why = pmem.options.refusal
    assert why is not None
    assert f"{size} is no power of two" in why and f"{fitting[0]} ({fitting[1]})" in why
    assert f"truncate -s {fitting[0]} /images/disk0.img" in why and 'mode = "window"' in why
    assert pmem.standing == f"size: {why}"
    assert pmem.status({}, 0)["refused"] == why


def test_a_vmm_that_has_a_refused_size_from_before_keeps_it() -> None:
    pmem = Pmem(replace(SHMEM, size=384 * MiB))
    pmem.on_features(pmem.offered_features)
    pmem.on_started()
    pmem.on_region(None)
    assert pmem.standing == "the guest has it"
    assert pmem.status({}, 0)["refused"] == pmem.options.refusal


def test_its_one_queue_is_for_flushes_and_none_of_its_chains_is_handed_up() -> None:
    pmem = Pmem(SHMEM)
    assert pmem.roles(0, {0}) == {0: Role.FLUSH}
    assert pmem.roles(0, set()) == {}
    with pytest.raises(GuestError):
        pmem.on_chain(Chain(0, Role.FLUSH, 1), 0)


# -- where the guest stands ------------------------------------------------------------------------


def test_the_guest_has_the_disk_or_it_is_said_why_not_once() -> None:
    pmem = Pmem(SHMEM)
    assert pmem.standing == "the guest does not have it: no driver has started yet"
    pmem.on_features(pmem.offered_features)
    pmem.on_started()
    assert events(pmem.on_region("the VMM refused it (1)")) == [
        (DeviceEvent.PMEM_NOT_MAPPED, "the VMM refused it (1)")
    ]
    assert pmem.on_region("the VMM refused it (1)") == []
    assert events(pmem.on_region(None)) == [(DeviceEvent.PMEM_MAPPED, None)]
    assert pmem.on_region(None) == []
    assert pmem.standing == "the guest has it"
    assert pmem.status({}, 0)["mapped"] is True


def test_a_guest_too_old_for_shared_memory_is_told_with_a_remedy() -> None:
    pmem = Pmem(SHMEM)
    pmem.on_features(pmem.offered_features & ~PmemFeature.SHMEM_REGION)
    (log,) = pmem.on_started()
    assert isinstance(log, Log)
    assert log.name is DeviceEvent.PMEM_NOT_MAPPED
    assert "older than Linux 6.9" in log.fields["why"]
    assert "no room for a BAR" in log.fields["why"]
    assert 'mode = "window"' in log.fields["remedy"]
    assert "pref64-reserve" in log.fields["remedy"]
    assert "Linux 6.9" in pmem.standing
    assert not pmem.wants_mapping


def test_a_window_needs_no_feature_of_the_driver() -> None:
    pmem = Pmem(WINDOW)
    pmem.on_features(int(VirtioFeature.VERSION_1))
    assert pmem.on_started() == []
    assert not pmem.wants_mapping


def test_what_was_known_of_a_guest_and_its_image_goes_with_it_but_not_a_failure() -> None:
    pmem = running()
    pmem.image = ImageView(cached=4096, removed=True)
    pmem.on_failure(EIO)
    pmem.on_disconnected()
    status = pmem.status({}, 0)
    assert (status["mapped"], status["cached"], status["removed"]) == (False, None, False)
    assert status["features"] == []
    assert status["failed"] == EIO.why


# -- a failure, from its first moment to the operator's word ---------------------------------------


def test_the_first_failure_is_the_one_told_until_it_is_cleared() -> None:
    pmem = running()
    assert events(pmem.on_failure(EIO)) == [(DeviceEvent.PMEM_FAILED, EIO.why)]
    assert pmem.on_failure(ENOSPC) == []
    status = pmem.status({}, 0)
    assert (status["failed"], status["failed_s"]) == (EIO.why, 1000.5)
    assert EIO.why in pmem.standing and "vhostctl pmem clear" in pmem.standing
    assert events(pmem.on_cleared()) == [(DeviceEvent.PMEM_CLEARED, None)]
    assert pmem.on_cleared() == []
    assert (pmem.standing, pmem.status({}, 0)["failed_s"]) == ("the guest has it", None)
    assert events(pmem.on_failure(ENOSPC)) == [(DeviceEvent.PMEM_FAILED, ENOSPC.why)]


def test_a_driver_that_starts_anew_clears_no_failure() -> None:
    pmem = running()
    pmem.on_failure(EIO)
    pmem.on_stopped()
    pmem.on_driver_reset()
    pmem.on_started()
    assert pmem.failure == EIO


def test_an_image_that_can_t_be_opened_is_what_people_see_first() -> None:
    pmem = Pmem(SHMEM)
    pmem.on_failure(EIO)
    pmem.refused_image = "/images/disk0.img: is not there"
    assert pmem.standing == "/images/disk0.img: is not there"


# -- for people ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pmem", [Pmem(SHMEM), Pmem(WINDOW), running()], ids=["shmem", "window", "running"]
)
@pytest.mark.parametrize("failure", [None, EIO])
@pytest.mark.parametrize("counters", [{}, COUNTERS | SYNCS])
def test_the_status_is_what_the_control_api_promises(
    pmem: Pmem, failure: Failure | None, counters: dict[str, int]
) -> None:
    pmem.failure = failure
    status = pmem.status(counters, 0)
    assert not {"state", "queues", "untold"} & set(status)  # its seat knows those
    whole = json.loads(json.dumps(status | {"state": "running", "queues": {}, "untold": None}))
    assert set(whole) == set(PmemStatus.__struct_fields__)
    assert msgspec.to_builtins(msgspec.convert(whole, PmemStatus, strict=True)) == whole


def test_totals_go_on_over_connections_and_syncs_are_of_the_present_one() -> None:
    pmem = Pmem(SHMEM)
    pmem.add_counters(COUNTERS)
    pmem.add_counters(COUNTERS)
    status = pmem.status(COUNTERS | SYNCS, 0)
    assert [status[name] for name in COUNTERS] == [30, 3, 6, 9]
    assert (status["syncs"], status["sync_total_s"]) == (4, 4.0)
    assert (status["sync_last_s"], status["sync_max_s"]) == (0.00025, 1.0)
    away = pmem.status({}, 0)
    assert [away[name] for name in (*COUNTERS, "syncs")] == [20, 2, 4, 6, 0]


# -- for a successor -------------------------------------------------------------------------------


@given(
    st.none() | st.builds(Failure, st.integers(1, 4095), st.text(), st.floats(0, 1e12)),
    st.dictionaries(st.sampled_from(sorted(COUNTERS)), st.integers(0, 2**63 - 1)),
)
def test_a_successor_knows_the_failure_and_the_totals(
    failure: Failure | None, totals: dict[str, int]
) -> None:
    pmem = Pmem(SHMEM)
    if failure is not None:
        pmem.on_failure(failure)
    pmem.add_counters(totals)
    heir = Pmem(SHMEM)
    heir.load(json.loads(json.dumps(pmem.save())))
    assert heir.save() == pmem.save()
    assert heir.failure == failure
    assert heir.status(COUNTERS, 0) == pmem.status(COUNTERS, 0)


@pytest.mark.parametrize(
    "nonsense",
    [
        {"failure": {"error": 0, "why": "x", "time_s": 0}},
        {"failure": {"error": 4096, "why": "x", "time_s": 0}},
        {"failure": {"error": -5, "why": "x", "time_s": 0}},
        {"failure": {"error": 5, "why": None, "time_s": 0}},
        {"failure": {"error": 5, "why": "x"}},
        {"failure": {"error": 5, "why": "x", "time_s": 0, "more": 1}},
        {"failure": False},
        {"totals": {"flushes": -1}},
        {"totals": {"flushes": "many"}},
        {"totals": {"flushes": None}},
        {"totals": []},
        {"surprise": 1},
    ],
)
def test_saved_state_that_is_none_is_refused(nonsense: dict[str, object]) -> None:
    pmem = running()
    pmem.on_failure(EIO)
    pmem.add_counters(COUNTERS)
    before = pmem.save()
    with pytest.raises(ValueError):
        pmem.load(before | nonsense)
    assert pmem.save() == before
    with pytest.raises(ValueError):
        pmem.load({})
