"""Every metric: name, kind, help, and where in a VM's status its value is.

One row each; export.py turns rows into Prometheus text. A new device adds a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric with the label vm.

    Attributes:
        name: without "vhostd_"; counters end in _total, sizes are bytes.
        path: keys into the status object; a VM whose status lacks one has no sample.
    """

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    path: tuple[str, ...]


STATES: Final = ("waiting", "connected", "running", "stopped", "quarantined", "paused")

_COUNTERS: Final = ("balloon", "counters")

BALLOON: Final = (
    Metric("balloon_target_bytes", "gauge", "Memory the guest is asked to give up.",
           ("balloon", "target")),
    Metric("balloon_actual_bytes", "gauge", "Memory the guest says it gave up.",
           ("balloon", "actual")),
    Metric("balloon_inflated_bytes", "gauge", "Memory now in the balloon, by our own count.",
           ("balloon", "inflated")),
    Metric("balloon_reported_bytes_total", "counter", "Free memory the guest ever reported.",
           ("balloon", "reported")),
    Metric("balloon_discarded_bytes_total", "counter", "Memory ever handed back to the host.",
           ("balloon", "discarded")),
    Metric("balloon_withheld_bytes_total", "counter",
           "Memory given up or reported while nothing might be discarded.",
           ("balloon", "withheld")),
    Metric("balloon_guest_memory_bytes", "gauge", "RAM of the guest; 0 while unknown.",
           ("balloon", "guest_memory")),
    Metric("balloon_inflate_pfns_total", "counter", "Page numbers listed by inflate requests.",
           (*_COUNTERS, "inflate_pfns")),
    Metric("balloon_deflate_pfns_total", "counter", "Page numbers listed by deflate requests.",
           (*_COUNTERS, "deflate_pfns")),
    Metric("balloon_discards_total", "counter", "Holes punched into guest memory files.",
           (*_COUNTERS, "discards")),
    Metric("balloon_discard_errors_total", "counter", "Holes the host failed to punch.",
           (*_COUNTERS, "discard_errors")),
    Metric("balloon_pfns_outside_total", "counter", "Page numbers outside guest RAM, ignored.",
           (*_COUNTERS, "pfns_outside")),
    Metric("balloon_pfns_repeated_total", "counter",
           "Pages inflated while in the balloon, or deflated while not.",
           (*_COUNTERS, "pfns_repeated")),
    Metric("balloon_pfns_excess_total", "counter",
           "Page numbers beyond a request's limit, and ragged tails, ignored.",
           (*_COUNTERS, "pfns_excess")),
    Metric("balloon_reports_refused_total", "counter",
           "Reported ranges outside guest RAM or not writable, ignored.",
           (*_COUNTERS, "reports_refused")),
    Metric("balloon_pages_kept", "gauge",
           "4 KiB pages given up whose host page is not complete yet.",
           (*_COUNTERS, "pages_kept")),
    Metric("balloon_hinted_bytes", "gauge", "Free memory listed in the latest hinting round.",
           ("balloon", "hint", "size")),
    Metric("balloon_hint_rounds_total", "counter", "Hinting rounds the guest finished.",
           ("balloon", "hint", "rounds")),
    Metric("balloon_statistics_updates_total", "counter", "Statistics the guest sent.",
           ("balloon", "stats_updates")),
    Metric("balloon_statistics_received_seconds", "gauge",
           "When the latest statistics came, since the epoch.",
           ("balloon", "stats_received_s")),
)  # fmt: skip


def _guest(name: str, kind: Literal["counter", "gauge"], text: str, statistic: str) -> Metric:
    return Metric(
        f"guest_{name}", kind, f"{text} (the guest's word).", ("balloon", "stats", statistic)
    )


GUEST: Final = (
    _guest("free_memory_bytes", "gauge", "Memory nothing uses", "free_memory"),
    _guest("total_memory_bytes", "gauge", "Memory the kernel manages", "total_memory"),
    _guest("available_memory_bytes", "gauge", "Memory free without swapping", "available_memory"),
    _guest("disk_caches_bytes", "gauge", "Memory of disk caches", "disk_caches"),
    _guest("swap_in_bytes_total", "counter", "Memory swapped in", "swap_in"),
    _guest("swap_out_bytes_total", "counter", "Memory swapped out", "swap_out"),
    _guest("major_faults_total", "counter", "Page faults that read a disk", "major_faults"),
    _guest("minor_faults_total", "counter", "Page faults", "minor_faults"),
    _guest("hugetlb_allocations_total", "counter", "Huge pages allocated", "hugetlb_allocations"),
    _guest("hugetlb_failures_total", "counter", "Huge pages not to be had", "hugetlb_failures"),
    _guest("oom_kills_total", "counter", "Processes killed for memory", "oom_kills"),
    _guest("alloc_stalls_total", "counter", "Allocations that had to wait", "alloc_stalls"),
    _guest("async_scans_bytes_total", "counter", "Memory scanned in the background", "async_scans"),
    _guest("direct_scans_bytes_total", "counter", "Memory scanned by allocators", "direct_scans"),
    _guest(
        "async_reclaims_bytes_total",
        "counter",
        "Memory reclaimed in the background",
        "async_reclaims",
    ),
    _guest(
        "direct_reclaims_bytes_total",
        "counter",
        "Memory reclaimed by allocators",
        "direct_reclaims",
    ),
)

VM: Final = (
    Metric("vm_connections_total", "counter", "VMM connections ever accepted.", ("connections",)),
    Metric("vm_messages_refused_total", "counter", "Requests of the VMM that were refused.",
           ("messages_refused",)),
    Metric("vm_connections_refused_total", "counter", "VMMs turned away: one was being served.",
           ("connections_refused",)),
    Metric("vm_discards_allowed", "gauge",
           "1: guest memory may be given back to the host; 0: it is pinned, or may be.",
           ("discards", "allowed")),
    Metric("vm_chains_refused_total", "counter", "Statistics and hints refused for their content.",
           ("chains_refused",)),
    Metric("vm_config_changes_total", "counter", "Config-change messages sent to the VMM.",
           ("config_changes",)),
    Metric("vm_kept", "gauge", "1: a successor can take the VM over if this process dies.",
           ("kept",)),
    Metric("vm_config_reads_total", "counter", "Config reads of the guest, answered natively.",
           ("config_reads",)),
    Metric("vm_config_writes_total", "counter", "Config writes of the guest, answered natively.",
           ("config_writes",)),
)  # fmt: skip

PER_VM: Final = (*VM, *BALLOON, *GUEST)

# Of each entry of status[device]["queues"]; labels vm, device, queue (its role).
PER_QUEUE: Final = (
    Metric("queue_kicks_total", "counter", "Times the driver kicked.", ("kicks",)),
    Metric("queue_chains_total", "counter", "Chains taken from the ring.", ("chains",)),
    Metric("queue_used_total", "counter", "Chains given back.", ("used",)),
    Metric("queue_calls_total", "counter", "Interrupts raised.", ("calls",)),
    Metric("queue_calls_dropped_total", "counter", "Interrupts lost, their eventfd being full.",
           ("calls_dropped",)),
    Metric("queue_faults_total", "counter", "Times the ring was found broken.", ("faults",)),
    Metric("queue_rejected_total", "counter", "Chains refused and given back unused.",
           ("rejected",)),
)  # fmt: skip

# Of each entry of status["pmem"]; labels vm, device (its id).
PER_PMEM: Final = (
    Metric("pmem_size_bytes", "gauge", "The disk as the guest sees it.", ("size",)),
    Metric("pmem_flushes_total", "counter", "Flushes of the guest, answered.", ("flushes",)),
    Metric("pmem_flush_errors_total", "counter", "Flushes answered as failed.",
           ("flush_errors",)),
    Metric("pmem_malformed_total", "counter", "Requests that are no flush, or too short.",
           ("malformed",)),
    Metric("pmem_batches_total", "counter", "Syncs made for flushes; one serves all that wait.",
           ("batches",)),
    Metric("pmem_failed_seconds", "gauge",
           "Since when every flush fails, since the epoch; no sample while all is well.",
           ("failed_s",)),
    Metric("pmem_mapped", "gauge", "1: the guest has the disk.", ("mapped",)),
    Metric("pmem_cached_bytes", "gauge", "Page cache of the image.", ("cached",)),
    Metric("pmem_dirty_bytes", "gauge", "Page cache not written yet.", ("dirty",)),
    Metric("pmem_writeback_bytes", "gauge", "Page cache being written.", ("writeback",)),
    Metric("pmem_allocated_bytes", "gauge", "What the image takes up on its file system.",
           ("allocated",)),
    Metric("pmem_free_bytes", "gauge", "What that file system has left.", ("free",)),
    Metric("pmem_sync_seconds_total", "counter", "Time spent in syncs, of this connection.",
           ("sync_total_s",)),
    Metric("pmem_sync_max_seconds", "gauge", "The longest of them.", ("sync_max_s",)),
)  # fmt: skip

# Of each entry of status["mem"]; labels vm, device (its id).
PER_MEM: Final = (
    Metric("mem_size_bytes", "gauge", "The most the device can add.", ("size",)),
    Metric("mem_requested_bytes", "gauge", "Memory the guest is asked to use.", ("requested",)),
    Metric("mem_plugged_bytes", "gauge", "Memory the guest may use.", ("plugged",)),
    Metric("mem_usable_bytes", "gauge", "Part of the window in which it may plug.", ("usable",)),
    Metric("mem_violations_total", "counter", "Unplugged blocks found to hold memory.",
           ("violations",)),
    Metric("mem_violating_bytes", "gauge", "Memory in unplugged blocks at the latest look.",
           ("violating_size",)),
    Metric("mem_withheld_bytes", "gauge", "Unplugged memory that may not be given back now.",
           ("withheld",)),
    Metric("mem_discarding_bytes", "gauge", "Unplugged memory the host is still taking back.",
           ("discarding",)),
    Metric("mem_discard_errors_total", "counter", "Ranges the host failed to take back.",
           ("discard_errors",)),
    Metric("mem_answers_ack_total", "counter", "Requests carried out.", ("answers", "ack")),
    Metric("mem_answers_nack_total", "counter", "PLUG requests beyond the requested size.",
           ("answers", "nack")),
    Metric("mem_answers_busy_total", "counter", "Requests put off.", ("answers", "busy")),
    Metric("mem_answers_error_total", "counter", "Requests against the rules.",
           ("answers", "error")),
)  # fmt: skip
