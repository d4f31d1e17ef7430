"""What the control API answers with: the shapes of its JSON. Holds no behaviour."""

from __future__ import annotations

from typing import Literal

import msgspec

State = Literal["waiting", "connected", "running", "stopped", "quarantined", "paused"]


class MemoryPlan(msgspec.Struct):
    """How the guest gets to a size: requested of each memory device by id, and the balloon's
    target. Bytes."""

    size: int
    mem: dict[str, int]
    balloon: int


class Problem(msgspec.Struct):
    """Why a request was not fulfilled (RFC 9457, application/problem+json).

    `code` is stable; `detail` is one line for a person, and `error` the same under its older name.
    """

    title: str
    status: int
    code: str
    detail: str
    error: str
    type: str = "about:blank"


class HintStatus(msgspec.Struct):
    """The current or latest free page hinting round; size in bytes."""

    phase: Literal["idle", "requested", "running"]
    command: int
    size: int
    blocks: int
    ignored_blocks: int
    rounds: int


class QueueCounters(msgspec.Struct):
    """What happened on one virtqueue."""

    kicks: int
    chains: int
    used: int
    calls: int
    calls_dropped: int
    faults: int
    rejected: int


class BalloonStatus(msgspec.Struct):
    """A balloon; all sizes in bytes. `actual` and `stats` are what the guest says.

    `withheld` is what the guest ever gave up or reported while nothing might be given back.
    `untold`, of each device: why its guest can't be told of a change.
    """

    target: int
    actual: int
    inflated: int
    reported: int
    discarded: int
    stats: dict[str, int]
    features: list[str]
    reached: bool
    guest_memory: int
    poison_value: int
    stats_received_s: float
    stats_updates: int
    inhibited: str | None
    withheld: int
    hint: HintStatus
    untold: str | None
    counters: dict[str, int]
    queues: dict[str, QueueCounters]


class MemStatus(msgspec.Struct):
    """A virtio-mem device; sizes in bytes, blocks as [first, how many].

    `violations` counts unplugged blocks that were ever found to hold memory; `violating_` is what
    the latest look found. `standing` says how far the guest is, and why not further. `window`:
    the VMM has the memory the device needs. `inhibited`: why nothing is given back now;
    `withheld`: unplugged, and not given back because of it. `page_size`: of the window's memory on
    the host.
    """

    id: str
    size: int
    requested: int
    plugged: int
    usable: int
    block_size: int
    node: int
    page_size: int
    prealloc: bool
    violations: int
    violating_size: int
    violating_blocks: list[list[int]]
    on_violation: str
    address: int
    window: bool
    reached: bool
    standing: str
    inhibited: str | None
    withheld: int
    discarding: int
    discard_errors: int
    features: list[str]
    answers: dict[str, int]
    untold: str | None
    state: State
    queues: dict[str, QueueCounters]


class PmemStatus(msgspec.Struct):
    """A virtio-pmem device; sizes in bytes, null where the kernel can't tell.

    `flushes` are the guest's, `flush_errors` those that failed; `batches` the syncs made for them,
    `syncs` all of this connection. `failed`: why every flush fails until it is cleared. `refused`:
    why the last VMM was turned away, or the next one will be. `cached`, `dirty` and `writeback` are
    page cache of the image, `allocated` what it takes up on its file system, which has `free` left.
    """

    id: str
    file: str
    size: int
    flushes: int
    flush_errors: int
    malformed: int
    batches: int
    mode: str
    readonly: bool
    mapped: bool
    failed: str | None
    failed_s: float | None
    standing: str
    refused: str | None
    cached: int | None
    dirty: int | None
    writeback: int | None
    allocated: int | None
    free: int | None
    removed: bool
    syncs: int
    sync_last_s: float
    sync_max_s: float
    sync_total_s: float
    features: list[str]
    untold: str | None
    state: State
    queues: dict[str, QueueCounters]


class CacheDropped(msgspec.Struct):
    """Page cache of an image before and after, bytes; why_not_all: what stood in the way."""

    device: str
    cached_before: int | None
    cached_after: int | None
    why_not_all: str | None


class DiscardsStatus(msgspec.Struct):
    """Whether memory is given back to the host; why: what stands in the way.

    `finding`: "free", "pinned" or "encrypted" is what the VMM's monitor said. "unknown": it has not
    answered, and nothing is given back until it does. "unchecked": the VM has no `qmp`, nobody
    checks whether memory is pinned.
    """

    allowed: bool
    finding: Literal["unchecked", "unknown", "free", "pinned", "encrypted"]
    why: str | None


class VmStatus(msgspec.Struct):
    """One VM. `queues` above is by role; `faults` says by index which rings are quarantined.

    `usable` is RAM the guest may use, by its own word about the balloon; `usable_goal` what
    `memory set` asked for. Refused are what a VMM or guest sent and was not done; config_changes
    are messages to the VMM, reads and writes those of the guest that the worker answered.
    `stuck`: which of its native threads does not come back, so that its devices stand still; null:
    none. `unshared` is what speaks for guest memory that the VMM does not share
    with us. `paused` is why it is not served, null where it is; `paused_remedy` what to do about
    it. `kept`: a successor will have it; `not_kept`: why not.
    `not_lasting`: why what is set does not outlive the host; None: it does.
    """

    vm: str
    state: State
    mem: list[MemStatus]
    pmem: list[PmemStatus]
    connections: int
    faults: dict[str, str]
    messages_refused: int
    chains_refused: int = 0
    connections_refused: int = 0
    config_changes: int = 0
    config_reads: int = 0
    config_writes: int = 0
    usable: int | None = None
    usable_goal: int | None = None
    qmp: bool = False
    discards: DiscardsStatus | None = None  # left out where nobody serves the VM
    stuck: str | None = None
    unshared: str | None = None
    not_kept: str | None = None
    not_lasting: str | None = None
    kept: bool = True
    paused: str | None = None
    paused_remedy: str | None = None
    balloon: BalloonStatus | None = None  # left out where there is none


class WindowDescription(msgspec.Struct):
    """Hidden guest memory that a device needs; bytes, and the guest's NUMA node.

    file: what it must be; null: memory of its own.
    """

    address: int
    size: int
    node: int
    file: str | None = None
    readonly: bool = False


class DeviceDescription(msgspec.Struct):
    """One device as a VMM's command line must describe it."""

    kind: str
    id: str
    path: str
    virtio_id: int
    queue_count: int
    config_size: int
    queue_size: int
    window: WindowDescription | None = None
