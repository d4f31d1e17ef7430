"""Prometheus text from VM status objects, following the catalog.

A snapshot in, text out. Must not know a VM, a socket or HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import (
    Metric as MetricFamily,
)
from prometheus_client.registry import Collector

from vhostd import __version__
from vhostd.metrics.catalog import PER_MEM, PER_PMEM, PER_QUEUE, PER_VM, STATES, Metric

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST

REASONS: Final = {
    "paused": "1: the VM is not served; its status says why.",
    "stuck": "1: a native thread of the VM does not come back; its status says which.",
}
"""What status gives a reason for, or null."""

QUARANTINED_HELP: Final = "Queues not served because their ring is broken, until they restart."

Status: TypeAlias = Mapping[str, Any]

_QUEUE_LABELS: Final = ("vm", "device", "queue")


def metrics_text(statuses: Sequence[Status]) -> bytes:
    """All metrics of these VMs and of this process, in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(statuses))
    ProcessCollector(namespace="vhostd", registry=registry)
    return generate_latest(registry)


class _Snapshot(Collector):
    def __init__(self, statuses: Sequence[Status]) -> None:
        self._statuses = statuses

    def collect(self) -> Iterator[MetricFamily]:
        yield InfoMetricFamily("vhostd_build", "This program.", value={"version": __version__})
        states = GaugeMetricFamily(
            "vhostd_vm_state", "1 for the VM's state.", labels=("vm", "state")
        )
        for status in self._statuses:
            for state in STATES:
                states.add_metric((status["vm"], state), float(status["state"] == state))
        yield states
        for key, text in REASONS.items():
            given = GaugeMetricFamily(f"vhostd_vm_{key}", text, labels=("vm",))
            for status in self._statuses:
                given.add_metric((status["vm"],), float(status.get(key) is not None))
            yield given
        faults = GaugeMetricFamily("vhostd_vm_quarantined_queues", QUARANTINED_HELP, labels=("vm",))
        for status in self._statuses:
            faults.add_metric((status["vm"],), float(len(status.get("faults", ()))))
        yield faults
        for metric in PER_VM:
            yield self._per_vm(metric)
        for metric in PER_MEM:
            yield self._per_device(metric, "mem")
        for metric in PER_PMEM:
            yield self._per_device(metric, "pmem")
        for metric in PER_QUEUE:
            yield self._per_queue(metric)

    def _per_vm(self, metric: Metric) -> MetricFamily:
        family = _family(metric, ("vm",))
        for status in self._statuses:
            value = _find(status, metric.path)
            if value is not None:
                family.add_metric((status["vm"],), value)
        return family

    def _per_device(self, metric: Metric, kind: str) -> MetricFamily:
        family = _family(metric, ("vm", "device"))
        for status in self._statuses:
            for device in status[kind]:
                value = _find(device, metric.path)
                if value is not None:
                    family.add_metric((status["vm"], device["id"]), value)
        return family

    def _per_queue(self, metric: Metric) -> MetricFamily:
        family = _family(metric, _QUEUE_LABELS)
        for status in self._statuses:
            for device, content in _devices(status).items():
                for queue, counters in content.get("queues", {}).items():
                    value = _find(counters, metric.path)
                    if value is not None:
                        family.add_metric((status["vm"], device, queue), value)
        return family


def _devices(status: Status) -> dict[str, Status]:
    balloon = {"balloon": status["balloon"]} if "balloon" in status else {}
    return {**balloon, **{device["id"]: device for device in (*status["mem"], *status["pmem"])}}


def _family(metric: Metric, labels: Sequence[str]) -> CounterMetricFamily | GaugeMetricFamily:
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    return kind(f"vhostd_{metric.name}", metric.help, labels=labels)


def _find(status: Status, path: Sequence[str]) -> float | None:
    found: Any = status
    for key in path:
        if not isinstance(found, Mapping) or key not in found:
            return None
        found = found[key]
    return None if found is None else float(found)
