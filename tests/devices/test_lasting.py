"""What outlives even the host: taken back where the configuration still means the same."""

from __future__ import annotations

import msgspec
import pytest
from vhostd.devices.balloon import Balloon
from vhostd.devices.balloon_features import BalloonOptions
from vhostd.devices.base import Device, JsonObject
from vhostd.devices.mem import Mem
from vhostd.devices.mem_window import MemOptions
from vhostd.devices.pmem import Pmem, PmemMode, PmemOptions
from vhostd.devices.pmem_state import Failure
from vhostd.units import GiB, MiB

FAILURE = Failure(5, "sync: Input/output error", 1.5)


def mem(size: int = GiB, requested_size: int = 0) -> Mem:
    return Mem(
        MemOptions(
            id="mem0", address=4 * GiB, size=size, block_size=2 * MiB, requested_size=requested_size
        )
    )


def pmem(file: str = "/images/a") -> Pmem:
    return Pmem(PmemOptions(id="disk0", file=file, size=64 * MiB, mode=PmemMode.SHMEM))


def through_a_file(device: Device) -> JsonObject:
    """As JSON writes and reads it."""
    found: JsonObject = msgspec.json.decode(msgspec.json.encode(device.lasting()))
    return found


def test_a_balloon_has_its_target_again() -> None:
    before, after = Balloon(BalloonOptions()), Balloon(BalloonOptions())
    before.set_target(96 * MiB)
    after.recall(through_a_file(before))
    assert after.target == 96 * MiB
    assert after.config() == before.config()
    assert after.actual == 0, "that is the guest's word, and it is another guest"


def test_a_memory_device_asks_for_as_much_again() -> None:
    before, after = mem(), mem()
    before.set_requested_size(512 * MiB)
    after.recall(through_a_file(before))
    assert after.requested_size == 512 * MiB
    assert after.plugged_size == 0
    assert after.config() == before.config()


def test_what_was_configured_since_counts_more() -> None:
    before, after = mem(), mem(requested_size=64 * MiB)
    before.set_requested_size(512 * MiB)
    after.recall(through_a_file(before))
    assert after.requested_size == 64 * MiB


def test_a_size_that_does_not_fit_any_more_is_refused() -> None:
    before, after = mem(), mem(size=256 * MiB)
    before.set_requested_size(512 * MiB)
    with pytest.raises(ValueError, match="window"):
        after.recall(through_a_file(before))
    assert after.requested_size == 0


def test_a_failed_flush_stays_failed_for_its_image_alone() -> None:
    before = pmem()
    before.on_failure(FAILURE)
    lasting = through_a_file(before)
    after, other = pmem(), pmem("/images/b")
    after.recall(lasting)
    other.recall(lasting)
    assert after.failure == FAILURE
    assert other.failure is None
    after.on_cleared()
    healthy = pmem()
    healthy.recall(through_a_file(after))
    assert healthy.failure is None


@pytest.mark.parametrize(
    ("device", "nonsense"),
    [
        (Balloon(BalloonOptions()), {}),
        (Balloon(BalloonOptions()), {"target": -4096}),
        (Balloon(BalloonOptions()), {"target": 4097}),
        (Balloon(BalloonOptions()), {"target": 1 << 45}),
        (Balloon(BalloonOptions()), {"target": "4096"}),
        (mem(), {"configured": 0}),
        (mem(), {"configured": 0, "requested_size": 1}),
        (mem(), {"configured": 0, "requested_size": -2 * MiB}),
        (pmem(), {"file": "/images/a"}),
        (pmem(), {"file": "/images/a", "failure": {"error": 0, "why": "", "time_s": 0.0}}),
        (pmem(), {"file": "/images/a", "failure": None, "more": 1}),
    ],
    ids=map(str, range(11)),
)
def test_nonsense_is_refused_and_changes_nothing(device: Device, nonsense: JsonObject) -> None:
    before = device.save()
    with pytest.raises(ValueError):
        device.recall(nonsense)
    assert device.save() == before
