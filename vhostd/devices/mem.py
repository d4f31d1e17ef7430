"""virtio-mem: which blocks of its window are plugged, and who is told what.

Holds no memory, fd or socket; source of all rules: virtio 1.x, chapter 5.15. What it wants done to
the window's memory are effects, and an answer that must wait for one of them is held back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import islice

import msgspec

from vhostd.devices.base import (
    Chain,
    DeviceEvent,
    Effect,
    Effects,
    Event,
    GuestRange,
    JsonObject,
    MemorySlot,
    NotifyConfig,
    Refused,
    Role,
)
from vhostd.devices.mem_answers import BEAT_S, Nudge
from vhostd.devices.mem_plugging import Plugging
from vhostd.devices.mem_request import (
    CONFIG,
    MEM_DEVICE_ID,
    QUEUE_COUNT,
    RESPONSE_SIZE,
    Answer,
    MemFeature,
    Request,
    mem_feature_names,
)
from vhostd.devices.mem_standing import Progress, standing
from vhostd.devices.mem_state import KeptBlocks, MemState, decode, decode_lasting, decode_runs
from vhostd.devices.mem_violations import RUNS_TOLD_MAX
from vhostd.devices.mem_window import LARGE_GUEST_SIZE, MemOptions
from vhostd.devices.verdict import Verdict
from vhostd.errors import GuestError
from vhostd.protocol.features import VirtioFeature
from vhostd.units import BALLOON_PAGE_SIZE, format_size


class Mem:
    """One virtio-mem device.

    Attributes:
        features: what the driver negotiated; 0 before.
        started: a driver runs.
    """

    device_id = MEM_DEVICE_ID
    queue_count = QUEUE_COUNT
    config_size = CONFIG.size
    config_writable = bytes(CONFIG.size)
    timer_interval_s = BEAT_S
    shmem_region_sizes = ()

    def __init__(self, options: MemOptions) -> None:
        self.options = options
        self.features = 0
        self.started = False
        self._blocks = Plugging(options)
        self._last_request_s = 0.0
        self._page_size = BALLOON_PAGE_SIZE
        self._nudge = Nudge()

    @property
    def requested_size(self) -> int:
        """Bytes the guest is asked to use."""
        return self._blocks.requested_size

    @property
    def plugged_size(self) -> int:
        """Bytes it may use."""
        return self._blocks.plugged_size

    @property
    def settled(self) -> bool:
        """The guest is where it was asked to be, and the host has all of the rest."""
        return self.plugged_size == self.requested_size and not self._blocks.awaiting_discard.size

    @property
    def inhibited(self) -> str | None:
        """Why no memory is given back now, or None."""
        return self._blocks.verdict.inhibited

    @property
    def offered_features(self) -> int:
        features = int(
            VirtioFeature.VERSION_1
            | VirtioFeature.RING_INDIRECT_DESC
            | VirtioFeature.RING_EVENT_IDX
            | MemFeature.ACPI_PXM
            # Reading a hole of shared memory would allocate it.
            | MemFeature.UNPLUGGED_INACCESSIBLE
            | MemFeature.PERSISTENT_SUSPEND
        )
        if self.options.packed:
            features |= VirtioFeature.RING_PACKED
        if self.options.in_order:
            features |= VirtioFeature.IN_ORDER
        return features

    def config(self) -> bytes:
        options = self.options
        return CONFIG.pack(
            options.block_size, options.node, options.address, options.size, *self._blocks.sizes
        )

    def roles(self, features: int, started: Collection[int]) -> Mapping[int, Role]:
        return {0: Role.GUEST_REQUEST} if 0 in started else {}

    # -- what the operator wants ---------------------------------------------------------------

    def check_request(self, size: int) -> None:
        """Whether `size` bytes may be asked for.

        Raises:
            Refused: they may not; the text says why.
        """
        name, block_size = self.options.id, self.options.block_size
        if not 0 <= size <= self.options.size:
            raise Refused(
                f"{name} has a window of {format_size(self.options.size)}"
                f" ({self.options.size} bytes), {size} bytes are more"
            )
        if size % block_size:
            below = size // block_size * block_size
            raise Refused(
                f"{name} moves blocks of {format_size(block_size)}, and {size} bytes are no"
                f" multiple of it; the nearest are {below} and {below + block_size}"
            )
        verdict = self._blocks.verdict
        if verdict.frozen is not None:
            raise Refused(f"{name} can't be resized: {verdict.frozen}")
        if verdict.forbids and size < self.requested_size:
            raise Refused(f"{name} can't give memory back now: {verdict.inhibited}")

    def set_requested_size(self, size: int) -> Effects:
        """Ask the guest to use `size` bytes of the window.

        The guest is told even if nothing changed: one that gave up tries again.

        Raises:
            Refused: see check_request().
        """
        self.check_request(size)
        blocks = self._blocks
        blocks.requested_size = size
        blocks.answers.progress()
        self._nudge.on_wish()
        blocks.usable_size = max(blocks.usable_size, blocks.wanted_usable_size)
        event = Event(DeviceEvent.MEM_REQUESTED, blocks.told())
        return [blocks.publish_sizes(), NotifyConfig(), event]

    def on_verdict(self, verdict: Verdict) -> Effects:
        """Give nothing back while that is not allowed; once it is, give back all that is unplugged.

        A VMM that comes and goes changes nothing about it.
        """
        before, self._blocks.verdict = self._blocks.verdict, verdict
        if before.inhibited == verdict.inhibited:
            return []
        told = Event(DeviceEvent.MEM_INHIBITED, {**self._blocks.told(), "why": verdict.inhibited})
        if not verdict.may_discard:
            return [told]
        # Who was told BUSY may try again.
        self._blocks.answers.progress()
        return [told, *self._blocks.sweep(), NotifyConfig()]

    # -- what the VMM does ---------------------------------------------------------------------

    def on_memory(self, regions: Sequence[MemorySlot]) -> Effects:
        """Look for the window in the memory table; a new one is emptied first.

        A memory backend that was told to populate itself is full, and the guest may use only what
        is plugged.
        """
        blocks, window = self._blocks, self.options.window
        others_size = sum(region.size for region in regions) - window.size
        blocks.large_guest = others_size >= LARGE_GUEST_SIZE
        pages = [slot.page_size for slot in regions if slot.guest_addr == window.guest_addr]
        self._page_size = max(pages, default=BALLOON_PAGE_SIZE)
        missing_before, blocks.missing_window = blocks.missing_window, self.options.missing(regions)
        appeared = missing_before is not None and blocks.missing_window is None
        effects: list[Effect] = []
        if blocks.wanted_usable_size > blocks.usable_size:
            blocks.usable_size = blocks.wanted_usable_size
            effects += [blocks.publish_sizes(), NotifyConfig()]
        if appeared:
            # Who was told BUSY for want of a window may try again.
            blocks.answers.progress()
            effects += [*blocks.sweep(), NotifyConfig()]
        return effects

    def on_system_reset(self) -> Effects:
        """The VMM says the machine was reset: nothing of the window is in use any more.

        Nothing if a driver runs: then the news is late, and the new driver has unplugged what it
        found by itself.
        """
        if self.started:
            return []
        self._blocks.answers.forget()
        return self._blocks.unplug_all()

    def on_disconnected(self) -> None:
        self.started = False
        self.features = 0
        self._blocks.forget_all()

    # -- what the driver does ------------------------------------------------------------------

    def on_features(self, features: int) -> Effects:
        self.features = features
        return []

    def on_driver_reset(self) -> Effects:
        """Blocks stay as they are: an unbound driver may leave its memory in use.

        So do the answers. A driver that goes on may look like a new one, and what it asked for
        comes again; a new one's requests are other chains.
        """
        self._blocks.answers.progress()
        return []

    def on_started(self) -> Effects:
        self.started = True
        return [] if self._blocks.missing_window is None else [self._blocks.tell_no_window()]

    def on_stopped(self) -> Effects:
        self.started = False
        self._blocks.forget_chains()
        return []

    def on_config_written(self, config: bytes) -> Effects:
        return []

    def on_chain(self, chain: Chain, now_s: float) -> Effects:
        self._last_request_s = now_s
        self._nudge.on_request()
        if len(chain.data) < Request.SIZE or chain.writable_size < RESPONSE_SIZE:
            self._blocks.answers.refused(chain)
            raise GuestError(
                f"a request of {len(chain.data)} bytes with room for {chain.writable_size};"
                f" {Request.SIZE} and {RESPONSE_SIZE} are needed"
            )
        return self._blocks.on_request(chain)

    # -- what the host has done ----------------------------------------------------------------

    def on_discarded(self, done: GuestRange, error: str | None) -> Effects:
        """A part of a DiscardMemory is done, or failed and stays resident."""
        return self._blocks.on_discarded(done, error)

    def on_populated(self, done: GuestRange, error: str | None) -> Effects:
        """A PopulateMemory is done, or failed; nothing half done stays."""
        return self._blocks.on_populated(done, error)

    def discard_due(self, part: GuestRange) -> bool:
        """Whether a part of a DiscardMemory should still be carried out."""
        return self._blocks.discard_due(part)

    def look_begins(self) -> list[GuestRange]:
        """Where no memory may be now; on_looked() or on_excess() must follow."""
        return self._blocks.look_begins()

    @property
    def settled_size(self) -> int:
        """Bytes of blocks that may have memory now."""
        return self._blocks.settled_size

    def on_looked(self, found: Mapping[int, int]) -> Effects:
        """What memory was found in the ranges of look_begins(): bytes by block."""
        return self._blocks.on_looked(found)

    def on_excess(self, size: int) -> Effects:
        """The window holds `size` bytes more than is plugged, and nobody can say where."""
        return self._blocks.on_excess(size)

    def on_timer(self) -> Effects:
        blocks = self._blocks
        effects = [*blocks.discard_again(), *blocks.answers.on_beat()]
        short = self.started and self.plugged_size != self.requested_size
        if short and blocks.answers.busy_because is None and (nudge := self._nudge.on_beat()):
            still = Event(DeviceEvent.MEM_STANDS_STILL, blocks.told())
            effects += [*nudge, still]
        return effects

    # -- for a successor, and for people -------------------------------------------------------

    def save(self) -> JsonObject:
        blocks = self._blocks
        return {
            **self._save_rest(),
            "plugged": [list(run) for run in blocks.plugged.runs()],
            "withheld": [list(run) for run in blocks.withheld.runs()],
        }

    @property
    def large_state(self) -> KeptBlocks:
        """Which blocks are plugged, and which are withheld."""
        return KeptBlocks(self._blocks.plugged, self._blocks.withheld, self._save_rest)

    def _save_rest(self) -> JsonObject:
        """What save() says, without the blocks."""
        blocks = self._blocks
        state = MemState(
            size=self.options.size,
            block_size=self.options.block_size,
            requested_size=self.requested_size,
            usable_size=blocks.usable_size,
            plugged=[],
            recent=blocks.answers.recent,
            violations=blocks.watch.violations,
            withheld=[],
        )
        plain: JsonObject = msgspec.to_builtins(state)
        return plain

    def load(self, saved: JsonObject) -> None:
        state = decode(saved, self.options)
        blocks = self._blocks
        # What was to be discarded is found again when the window is swept.
        blocks.plugged.load(decode_runs(state.plugged, self.options.block_count).content())
        blocks.withheld.load(decode_runs(state.withheld, self.options.block_count).content())
        blocks.requested_size, blocks.usable_size = state.requested_size, state.usable_size
        blocks.watch.violations = state.violations
        blocks.answers.recent = state.recent

    def lasting(self) -> JsonObject:
        configured = self.options.requested_size
        return {"configured": configured, "requested_size": self.requested_size}

    def recall(self, lasting: JsonObject) -> None:
        state = decode_lasting(lasting)
        if state.configured != self.options.requested_size:
            return  # what an operator has written since comes later than what one said before
        try:
            self.check_request(state.requested_size)
        except Refused as error:
            raise ValueError(str(error)) from error
        blocks = self._blocks
        blocks.requested_size = state.requested_size
        blocks.usable_size = blocks.wanted_usable_size

    def status(self, counters: Mapping[str, int], now_s: float) -> JsonObject:
        """Sizes in bytes; blocks are [first, count]."""
        options, blocks = self.options, self._blocks
        offending = list(islice(blocks.watch.offending.runs(), RUNS_TOLD_MAX))
        return {
            "id": options.id,
            "size": options.size,
            "requested": self.requested_size,
            "plugged": self.plugged_size,
            "usable": blocks.usable_size,
            "block_size": options.block_size,
            "node": options.node,
            "page_size": self._page_size,
            "prealloc": options.prealloc,
            "violations": blocks.watch.violations,
            "violating_size": blocks.watch.size,
            "violating_blocks": [list(run) for run in offending],
            "on_violation": options.on_violation.value,
            "address": options.address,
            "window": blocks.missing_window is None,
            "reached": self.requested_size == self.plugged_size,
            "standing": standing(self._progress(), now_s),
            "inhibited": self.inhibited,
            "withheld": blocks.withheld.size * options.block_size,
            "discarding": blocks.awaiting_discard.size * options.block_size,
            "discard_errors": blocks.discard_errors,
            "features": mem_feature_names(self.features),
            "answers": {answer.name.lower(): blocks.answers.counts[answer] for answer in Answer},
        }

    def _progress(self) -> Progress:
        return Progress(
            requested_size=self.requested_size,
            plugged_size=self.plugged_size,
            started=self.started,
            missing_window=self._blocks.missing_window,
            inhibited=self.inhibited,
            busy=self._blocks.answers.busy_because,
            last_request_s=self._last_request_s,
        )
