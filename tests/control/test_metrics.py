"""Metrics: every row of the catalog comes out, under its name, from a real status."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families
from vhostd.devices.balloon_statistics import NAMES
from vhostd.metrics.catalog import GUEST, PER_MEM, PER_PMEM, PER_QUEUE, PER_VM
from vhostd.metrics.export import metrics_text
from vhostd.units import MiB

from tests.control.daemon import SmallDaemon

Samples = dict[tuple[str, str], float]


def samples_of(statuses: list[dict[str, object]], device: str = "balloon") -> Samples:
    """Samples by name and VM; of those that are of one device, this one's."""
    text = metrics_text(statuses).decode()
    return {
        (sample.name, sample.labels.get("vm", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("state", "running") == "running"
        and sample.labels.get("device", device) == device
    }


def test_every_metric_of_the_catalog_has_a_sample_when_the_guest_says_everything() -> None:
    daemon = SmallDaemon()
    daemon.web.balloon.statistics.latest = dict.fromkeys(NAMES, 5)
    samples = samples_of([daemon.web.status()])
    for metric in (*PER_VM, *PER_QUEUE):
        assert (f"vhostd_{metric.name}", "web") in samples, metric.name


def test_names_are_unique_and_say_their_kind_and_unit() -> None:
    metrics = (*PER_VM, *PER_QUEUE, *PER_MEM, *PER_PMEM)
    assert len({metric.name for metric in metrics}) == len(metrics)
    for metric in metrics:
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith(".")


def test_every_statistic_with_a_name_has_its_metric() -> None:
    assert {metric.path[-1] for metric in GUEST} == set(NAMES)


def test_values_are_the_statuses_values() -> None:
    daemon = SmallDaemon()
    samples = samples_of([vm.status() for vm in daemon.vms().values()])
    assert samples["vhostd_vm_state", "web"] == 1
    assert samples["vhostd_vm_state", "idle"] == 0
    assert samples["vhostd_balloon_inflated_bytes", "web"] == 8192
    assert samples["vhostd_balloon_discards_total", "web"] == 7
    assert samples["vhostd_queue_kicks_total", "web"] == 11
    assert samples["vhostd_guest_free_memory_bytes", "web"] == 1


def test_a_disk_has_every_metric_of_its_own_once_it_has_failed() -> None:
    daemon = SmallDaemon()
    daemon.web.disk.break_down()
    samples = samples_of([daemon.web.status()], "disk0")
    for metric in (*PER_PMEM, *PER_QUEUE):
        assert (f"vhostd_{metric.name}", "web") in samples, metric.name


def test_a_disk_s_values_are_the_status_s_and_what_is_not_known_has_no_sample() -> None:
    daemon = SmallDaemon()
    samples = samples_of([vm.status() for vm in daemon.vms().values()], "disk0")
    assert samples["vhostd_pmem_flushes_total", "web"] == 5
    assert samples["vhostd_pmem_batches_total", "web"] == 3
    assert samples["vhostd_pmem_mapped", "web"] == 1
    assert samples["vhostd_pmem_dirty_bytes", "web"] == 4096
    assert samples["vhostd_pmem_sync_seconds_total", "web"] == 2
    assert samples["vhostd_pmem_sync_max_seconds", "web"] == 1
    assert samples["vhostd_queue_kicks_total", "web"] == 13
    assert ("vhostd_pmem_failed_seconds", "web") not in samples
    assert samples["vhostd_pmem_mapped", "idle"] == 0
    assert samples["vhostd_pmem_size_bytes", "idle"] == 64 * MiB
    assert ("vhostd_pmem_cached_bytes", "idle") not in samples
    daemon.web.disk.break_down()
    failed = samples_of([daemon.web.status()], "disk0")
    assert failed["vhostd_pmem_failed_seconds", "web"] == 1000


def test_a_quarantined_queue_shows() -> None:
    daemon = SmallDaemon()
    daemon.web.state = "quarantined"
    samples = samples_of([vm.status() for vm in daemon.vms().values()])
    assert samples["vhostd_vm_quarantined_queues", "web"] == 1
    assert samples["vhostd_vm_quarantined_queues", "idle"] == 0


def test_what_a_guest_never_said_has_no_sample() -> None:
    samples = samples_of([SmallDaemon().idle.status()])
    assert not any(name.startswith("vhostd_guest_") for name, _ in samples)


def test_no_vm_is_no_error() -> None:
    assert "vhostd_build_info" in metrics_text([]).decode()
