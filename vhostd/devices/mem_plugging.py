"""The blocks of one virtio-mem device: who may plug and unplug them, and what the host then does.

Serves requests whose shape is right. Must not know rings, features or the config space's layout
beyond its sizes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from vhostd.devices.base import (
    Chain,
    DeviceEvent,
    DiscardMemory,
    Effect,
    Event,
    GuestRange,
    JsonObject,
    Log,
    PopulateMemory,
    PublishConfig,
)
from vhostd.devices.mem_answers import Answers
from vhostd.devices.mem_blocks import BlockSet, RecordedBlocks, Run
from vhostd.devices.mem_request import (
    SIZES,
    SIZES_OFFSET,
    Answer,
    BlockState,
    Request,
    RequestType,
)
from vhostd.devices.mem_violations import OnViolation, ViolationWatch, tell
from vhostd.devices.mem_window import MemOptions
from vhostd.devices.verdict import Verdict


@dataclass(frozen=True, slots=True)
class _Held:
    """A PLUG whose answer waits for the host, and the blocks it is about."""

    chain: Chain
    run: Run
    populating: bool


class Plugging:
    """Which blocks are plugged, and which of the others the host has yet to take back.

    Attributes:
        requested_size: bytes the guest is asked to use.
        usable_size: bytes from the window's start in which it may plug.
        verdict: whether memory may be given back now.
        missing_window: why there is no window to plug in, or None.
        withheld: unplugged blocks that keep their memory until it may be given back.
        large_guest: see MemOptions.usable_size().
        answers: what the driver was told.
        watch: memory found in unplugged blocks.
        discard_errors: ranges the host failed to take back.
    """

    def __init__(self, options: MemOptions) -> None:
        self.options = options
        self.requested_size = options.requested_size
        self.verdict = Verdict()
        self.missing_window: str | None = options.missing(())
        self.withheld = RecordedBlocks(options.block_count)
        self.large_guest = False
        self.usable_size = self.wanted_usable_size
        self.answers = Answers()
        self.watch = ViolationWatch(options.block_count)
        self.plugged = RecordedBlocks(options.block_count)
        self.awaiting_discard = BlockSet(options.block_count)
        self.discard_errors = 0
        self._populating = BlockSet(options.block_count)
        self._undiscarded = BlockSet(options.block_count)  # the host failed; no fault of the guest
        self._held: _Held | None = None
        self._waiting: deque[Chain] = deque()

    @property
    def plugged_size(self) -> int:
        """Bytes the guest may use."""
        return self.plugged.size * self.options.block_size

    @property
    def wanted_usable_size(self) -> int:
        """What the requested size needs; usable_size may be more, until all is unplugged."""
        return self.options.usable_size(self.requested_size, large_guest=self.large_guest)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """usable_region_size, plugged_size and requested_size of the config space."""
        return self.usable_size, self.plugged_size, self.requested_size

    def forget_chains(self) -> None:
        """The ring stopped: chains held come again."""
        self._held = None  # on_populated() undoes what was for it
        self._waiting.clear()

    def forget_all(self) -> None:
        """The VMM is gone, and the window with it."""
        self.forget_chains()
        self.missing_window = self.options.missing(())
        self.withheld.clear()
        self.answers.forget()
        self.plugged.clear()
        self.awaiting_discard.clear()
        self._populating.clear()
        self._undiscarded.clear()
        self.watch.forget()
        self.usable_size = self.wanted_usable_size

    # -- requests ------------------------------------------------------------------------------

    def on_request(self, chain: Chain) -> list[Effect]:
        """Serve a chain that holds a whole request and has room for the response."""
        if self._held is not None:
            self._waiting.append(chain)  # bounded by the ring
            return []
        return self._serve(chain)

    def _serve(self, chain: Chain) -> list[Effect]:
        replay = self.answers.replay(chain)
        if replay is not None:
            return replay
        request = Request.unpack(chain.data)
        if request.kind == RequestType.UNPLUG_ALL:
            return [*self.unplug_all(), *self.answers.give(chain, Answer.ACK)]
        run = self.options.run(request, self.usable_size)
        if run is None:
            return self._refuse(chain, request, "outside the usable region, or no whole blocks")
        match request.kind:
            case RequestType.PLUG:
                return self._plug(chain, request, run)
            case RequestType.UNPLUG:
                return self._unplug(chain, request, run)
            case RequestType.STATE:
                return self.answers.give(chain, Answer.ACK, self._state(run))
        return self._refuse(chain, request, "no such type of request")

    def _plug(self, chain: Chain, request: Request, run: Run) -> list[Effect]:
        if self._exceeds_request(run):
            return self.answers.too_much(chain)
        if self.plugged.has_any(*run):
            return self._refuse(chain, request, "plugged already")
        if self.missing_window is not None:
            return [self.tell_no_window(), *self.answers.busy(chain, self.missing_window)]
        if self.awaiting_discard.has_any(*run):
            self._held = _Held(chain, run, populating=False)
            return []
        if self.options.prealloc:
            self._held = _Held(chain, run, populating=True)
            self._populating.add(*run)
            self.watch.changed(*run)
            return [PopulateMemory(self.options.range(run))]
        return self._plug_now(chain, run)

    def _plug_now(self, chain: Chain, run: Run) -> list[Effect]:
        self.plugged.add(*run)
        self._undiscarded.remove(*run)
        self.withheld.remove(*run)
        self.watch.changed(*run)
        self.answers.progress()
        return self._done(chain, [])

    def _done(self, chain: Chain, work: list[Effect]) -> list[Effect]:
        """Acknowledge a change: the config bytes first, which the guest reads next; news last."""
        acknowledged = self.answers.give(chain, Answer.ACK)
        told = Event(DeviceEvent.MEM_PLUGGED, self.told())
        return [self.publish_sizes(), *acknowledged, *work, told]

    def _unplug(self, chain: Chain, request: Request, run: Run) -> list[Effect]:
        if not self.plugged.has_all(*run):
            return self._refuse(chain, request, "unplugged already")
        if self.verdict.inhibited is not None:
            return self.answers.busy(chain, self.verdict.inhibited)
        self.plugged.remove(*run)
        # The guest goes on at once: whoever plugs these blocks again waits until they are empty.
        return self._done(chain, self._discard(run))

    def _state(self, run: Run) -> BlockState:
        if self.plugged.has_all(*run):
            return BlockState.PLUGGED
        return BlockState.MIXED if self.plugged.has_any(*run) else BlockState.UNPLUGGED

    def unplug_all(self) -> list[Effect]:
        """Nothing of the window is in use any more."""
        runs = list(self.plugged.runs())
        self.plugged.clear()
        self.answers.progress()
        self.usable_size = self.wanted_usable_size
        effects: list[Effect] = [self.publish_sizes()]
        for run in runs:
            effects += self._discard(run)
        if runs:
            effects.append(Event(DeviceEvent.MEM_UNPLUGGED_ALL, self.told()))
        return effects

    # -- what the host has done ----------------------------------------------------------------

    def on_discarded(self, done: GuestRange, error: str | None) -> list[Effect]:
        """A part of a DiscardMemory is done, or failed and stays resident."""
        run = self.options.blocks_of(done)
        self.awaiting_discard.remove(*run)
        self.watch.changed(*run)
        effects: list[Effect] = []
        self._undiscarded.remove(*run)
        if not self.verdict.may_discard:
            self.withheld.add(*run)
        if error is not None:
            self.discard_errors += 1
            self._undiscarded.add(*run)
            effects.append(Log(DeviceEvent.MEM_DISCARD_FAILED, {**self.told(), "error": error}))
        if self.awaiting_discard.size == 0:
            effects.append(Event(DeviceEvent.MEM_DISCARDED, self.told()))
        held = self._held
        if held is None or held.populating or self.awaiting_discard.has_any(*held.run):
            return effects
        self._held = None
        return [*effects, *self._serve(held.chain), *self._serve_waiting()]

    def on_populated(self, done: GuestRange, error: str | None) -> list[Effect]:
        """A PopulateMemory is done, or failed; nothing half done stays."""
        run = self.options.blocks_of(done)
        self._populating.remove(*run)
        self.watch.changed(*run)
        held = self._held
        if held is None or not held.populating or held.run != run:
            # Its driver is gone; a later one may have plugged these blocks meanwhile.
            return [] if self.plugged.has_any(*run) else self._discard(run)
        if self.awaiting_discard.has_any(*run):
            # Somebody had these blocks emptied meanwhile: not after the guest has them.
            self._held = _Held(held.chain, run, populating=False)
            return []
        self._held = None
        if error is not None:
            log = Log(DeviceEvent.MEM_BUSY, {**self.told(), "error": error})
            busy = self.answers.busy(held.chain, f"the host can't populate more memory: {error}")
            effects = [log, *self._discard(run), *busy]
        elif self._exceeds_request(run):
            effects = [*self._discard(run), *self.answers.too_much(held.chain)]
        else:
            effects = self._plug_now(held.chain, run)
        return [*effects, *self._serve_waiting()]

    def _serve_waiting(self) -> list[Effect]:
        effects: list[Effect] = []
        while self._waiting and self._held is None:
            effects += self._serve(self._waiting.popleft())
        return effects

    # -- cheating guests -----------------------------------------------------------------------

    def look_begins(self) -> list[GuestRange]:
        """Where no memory may be now; on_looked() or on_excess() must follow."""
        self.watch.look_begins()
        if self.missing_window is not None or not self.verdict.may_discard:
            return []
        return [self.options.range(run) for run in self._may_have_memory().runs(inside=False)]

    @property
    def settled_size(self) -> int:
        """Bytes of blocks that may have memory now."""
        return self._may_have_memory().size * self.options.block_size

    def _may_have_memory(self) -> BlockSet:
        blocks = self.plugged.copy()
        blocks.update(self.awaiting_discard)
        blocks.update(self._populating)
        blocks.update(self._undiscarded)
        return blocks

    def on_looked(self, found: Mapping[int, int]) -> list[Effect]:
        """What memory was found in the ranges of look_begins(): bytes by block."""
        violation = self.watch.look_ends(found)
        effects: list[Effect] = []
        if violation.runs:
            effects += tell(violation, self.told(), self.options.on_violation)
        if self.options.on_violation is OnViolation.DISCARD:
            for run in list(self.watch.offending.runs()):
                effects += self._discard(run)
        return effects

    def on_excess(self, size: int) -> list[Effect]:
        """The window holds `size` bytes more than is plugged, and nobody can say where."""
        violation = self.watch.excess_found(size, self.options.block_size)
        if violation is None:
            return []
        effects = tell(violation, self.told(), self.options.on_violation)
        if self.options.on_violation is OnViolation.DISCARD:
            effects += self.sweep()
        return effects

    # -- inside --------------------------------------------------------------------------------

    def told(self) -> JsonObject:
        """What names the device in a log line or event; sizes in bytes."""
        return {
            "device": self.options.id,
            "requested": self.requested_size,
            "plugged": self.plugged_size,
        }

    def tell_no_window(self) -> Log:
        """The VMM has no window."""
        fields = {**self.told(), "why": self.missing_window}
        return Log(DeviceEvent.MEM_WINDOW_MISSING, fields)

    def publish_sizes(self) -> PublishConfig:
        """The part of the config space that changes."""
        return PublishConfig(SIZES_OFFSET, SIZES.pack(*self.sizes))

    def _exceeds_request(self, run: Run) -> bool:
        return self.plugged_size + run[1] * self.options.block_size > self.requested_size

    def discard_again(self) -> list[Effect]:
        """Try once more to give back what the host could not take."""
        runs = list(self._undiscarded.runs())
        return [effect for run in runs for effect in self._discard(run)]

    def discard_due(self, part: GuestRange) -> bool:
        """Whether a part of a DiscardMemory should still be carried out."""
        run = self.options.blocks_of(part)
        return self.verdict.may_discard and self.awaiting_discard.has_all(*run)

    def _discard(self, run: Run) -> list[Effect]:
        first, count = run
        self.watch.changed(first, count)
        if self.missing_window is not None:
            return []
        if not self.verdict.may_discard:
            self.withheld.add(first, count)
            return []
        self.withheld.remove(first, count)
        # Asked for twice, the second one might come after the guest has plugged and filled it.
        fresh = list(self.awaiting_discard.runs(inside=False, first=first, count=count))
        self.awaiting_discard.add(first, count)
        return [DiscardMemory(self.options.range(run)) for run in fresh]

    def sweep(self) -> list[Effect]:
        """Give back whatever lies in blocks that are not plugged, if that is allowed now."""
        if not self.verdict.may_discard:
            return []
        return [
            effect for run in list(self.plugged.runs(inside=False)) for effect in self._discard(run)
        ]

    def _refuse(self, chain: Chain, request: Request, why: str) -> list[Effect]:
        known = request.kind in list(RequestType)
        fields = {
            **self.told(),
            "request": RequestType(request.kind).name.lower() if known else request.kind,
            "addr": request.addr,
            "nb_blocks": request.nb_blocks,
            "why": why,
        }
        log = Log(DeviceEvent.MEM_REQUEST_REFUSED, fields)
        return [log, *self.answers.give(chain, Answer.ERROR)]
