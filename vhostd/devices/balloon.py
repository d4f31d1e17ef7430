"""virtio-balloon: target, actual, page poison, and who of its parts serves which chain.

Inflate, deflate and reporting chains never come here: the native data plane serves them alone.
Holds no memory, fd or socket; source of all rules: virtio 1.x, chapter 5.5.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from struct import Struct
from typing import Final

import msgspec

from vhostd.devices.balloon_features import (
    BalloonFeature,
    BalloonOptions,
    balloon_feature_names,
    offered_features,
    resolve_roles,
)
from vhostd.devices.balloon_hinting import Hinting
from vhostd.devices.balloon_state import PAGES_MAX, BalloonState, decode_target
from vhostd.devices.balloon_statistics import StatisticsQueue
from vhostd.devices.base import (
    Chain,
    Complete,
    ConfigureDataPlane,
    DataPlane,
    DeviceEvent,
    Effect,
    Effects,
    Event,
    JsonObject,
    Log,
    MemorySlot,
    NotifyConfig,
    PublishConfig,
    Refused,
    ResetDataPlane,
    Role,
)
from vhostd.devices.memory_plan import boot_memory_size
from vhostd.devices.verdict import Verdict
from vhostd.errors import GuestError
from vhostd.units import BALLOON_PAGE_SIZE, format_size

BALLOON_DEVICE_ID: Final = 5
QUEUE_COUNT: Final = 5

CONFIG: Final = Struct("<IIII")
"""le32 num_pages, actual, free_page_hint_cmd_id, poison_val (virtio 1.x, 5.5.4)."""
_FIELD: Final = Struct("<I")
_NUM_PAGES, _ACTUAL, _COMMAND, _POISON = range(0, CONFIG.size, _FIELD.size)

CONFIG_WRITABLE: Final = CONFIG.pack(0, 0xFFFF_FFFF, 0, 0xFFFF_FFFF)
"""Only actual and poison_val are the driver's; a write of the whole space carries stale others."""

REACHED_SLACK_PAGES: Final = 15
"""A guest with 64 KiB pages moves 16 page numbers at a time, so it may stop this far off."""


class Balloon:
    """One guest's balloon.

    Attributes:
        target: bytes the guest is asked to give up.
        actual: bytes the guest says it gave up; a hint, which may lie.
        features: what the driver negotiated; 0 before.
        guest_memory_size: bytes of guest RAM, with what other devices were asked to add; 0 while
            unknown.
        verdict: whether anything may be discarded now.
    """

    device_id = BALLOON_DEVICE_ID
    queue_count = QUEUE_COUNT
    config_size = CONFIG.size
    config_writable = CONFIG_WRITABLE
    shmem_region_sizes = ()

    def __init__(self, options: BalloonOptions | None = None) -> None:
        self.options = options or BalloonOptions()
        self.features = 0
        self.guest_memory_size = 0
        self.verdict = Verdict()
        self.started = False
        self.statistics = StatisticsQueue()
        self.hinting = Hinting()
        self._target_pages = 0
        self._actual_pages = 0
        self._poison_value = 0
        self._boot_memory_size = 0
        self._hotplug_size = 0

    @property
    def target(self) -> int:
        return self._target_pages * BALLOON_PAGE_SIZE

    @property
    def actual(self) -> int:
        return self._actual_pages * BALLOON_PAGE_SIZE

    @property
    def reached(self) -> bool:
        """Whether the guest says it is at the target, as near as its page size allows."""
        return abs(self._actual_pages - self._target_pages) <= REACHED_SLACK_PAGES

    @property
    def offered_features(self) -> int:
        return offered_features(self.options)

    @property
    def timer_interval_s(self) -> float:
        return self.options.stats_interval_s

    def config(self) -> bytes:
        """num_pages, actual, command id, poison value: all 16 bytes, whatever is negotiated.

        A shorter space would read as all ones, and the guest would take that for a command id.
        """
        return CONFIG.pack(
            self._target_pages, self._actual_pages, self.hinting.shown, self._poison_value
        )

    def roles(self, features: int, started: Collection[int]) -> Mapping[int, Role]:
        return resolve_roles(features, started)

    # -- what the operator wants ---------------------------------------------------------------

    def set_target(self, size: int) -> Effects:
        """Ask the guest to give up `size` bytes, rounded down to whole 4 KiB pages.

        The guest is told even if nothing changed: one that deflated when it ran out of memory
        inflates again only when it is told.

        Raises:
            Refused: more than the guest's RAM, or more than 32 bits of pages.
        """
        pages = size // BALLOON_PAGE_SIZE
        self.check_usable()
        if not 0 <= pages <= PAGES_MAX:
            raise Refused(
                f"a balloon of {size} bytes can't be: its limit is 2^32 - 1 pages of 4 KiB"
            )
        if self.guest_memory_size and size > self.guest_memory_size:
            raise Refused(
                f"the guest has {format_size(self.guest_memory_size)} of RAM"
                f" ({self.guest_memory_size} bytes), a balloon of {size} bytes is larger"
            )
        self._target_pages = pages
        return [*self._announce_target(), Event(DeviceEvent.BALLOON_TARGET, self._sizes())]

    def check_usable(self) -> None:
        """Raises Refused if no target may be set at all."""
        if self.verdict.frozen is not None:
            raise Refused(f"the balloon can't be used: {self.verdict.frozen}")

    def set_guest_memory(self, size: int) -> Effects:
        """The guest's RAM became known, in bytes: a larger target shrinks to it.

        Linux does not refuse a target it can't reach, it thrashes at its limit.
        """
        self.guest_memory_size = size
        limit_pages = size // BALLOON_PAGE_SIZE
        if self._target_pages <= limit_pages:
            return []
        wanted, self._target_pages = self.target, limit_pages
        fields = {**self._sizes(), "wanted": wanted}
        return [*self._announce_target(), Event(DeviceEvent.BALLOON_CLAMPED, fields)]

    def request_statistics(self) -> Effects:
        """Ask the guest for new numbers now; they come with a BALLOON_STATISTICS event.

        Raises:
            Refused: no driver is running, or it has no statistics queue.
        """
        self._require(BalloonFeature.STATS_VQ, "statistics")
        return self.statistics.request()

    def hint_start(self) -> Effects:
        """Ask the guest to list its free memory, once.

        Raises:
            Refused: no driver is running, it can't hint, or a round is under way.
        """
        self._require(BalloonFeature.FREE_PAGE_HINT, "free page hinting")
        return self._with_command(self.hinting.start())

    def hint_stop(self) -> Effects:
        """Break a hinting round off.

        Raises:
            Refused: none is under way.
        """
        return self._with_command(self.hinting.stop())

    def on_verdict(self, verdict: Verdict) -> Effects:
        """Discard, or discard nothing, from now on; a VMM that comes and goes changes nothing."""
        self.verdict = verdict
        return [ConfigureDataPlane(self._data_plane())]

    def set_hotplug_size(self, size: int) -> Effects:
        """Other devices were asked to add `size` bytes of RAM in all."""
        self._hotplug_size = size
        return self._guest_memory_changed()

    # -- what the VMM does ---------------------------------------------------------------------

    def on_memory(self, regions: Sequence[MemorySlot]) -> Effects:
        self._boot_memory_size = boot_memory_size(regions, self.options.windows)
        return self._guest_memory_changed()

    def _guest_memory_changed(self) -> Effects:
        if self._boot_memory_size == 0:
            return []
        return self.set_guest_memory(self._boot_memory_size + self._hotplug_size)

    def on_disconnected(self) -> None:
        self.on_stopped()
        self.on_driver_reset()
        self.features = self._poison_value = 0

    # -- what the driver does ------------------------------------------------------------------

    def on_features(self, features: int) -> Effects:
        self.features = features
        return [ConfigureDataPlane(self._data_plane())]

    def on_driver_reset(self) -> Effects:
        """Nothing is in the balloon any more; target and poison value stay.

        The poison value stays because a new driver writes it before it starts, that is before
        this call; `actual` goes because a kexec'd kernel counts from 0 without saying so.
        """
        self.statistics.reset()
        self.hinting.reset()
        self._actual_pages = 0
        return [
            ResetDataPlane(),
            PublishConfig(_ACTUAL, _FIELD.pack(0)),
            PublishConfig(_COMMAND, _FIELD.pack(self.hinting.shown)),
            Event(DeviceEvent.BALLOON_RESET, self._sizes()),
        ]

    def on_started(self) -> Effects:
        self.started = True
        return []

    def on_stopped(self) -> Effects:
        self.started = False
        self.statistics.let_go()
        return []

    def on_chain(self, chain: Chain, now_s: float) -> Effects:
        if chain.role is Role.STATISTICS:
            return self.statistics.on_chain(chain, now_s)
        if chain.role is Role.FREE_PAGE_HINT:
            effects = self.hinting.on_chain(chain)
            done = Complete(chain.queue_index, chain.token)
            # The block first: a guest that reads DONE frees it, and must find it given back.
            return [done, *(self._with_command(effects) if effects else [])]
        raise GuestError(f"a {chain.role.value} chain is the data plane's")

    def on_config_written(self, config: bytes) -> Effects:
        _, actual, _, poison = CONFIG.unpack(config)
        effects: list[Effect] = []
        if actual != self._actual_pages:
            self._actual_pages = actual
            effects.append(Event(DeviceEvent.BALLOON_ACTUAL, self._sizes()))
        if poison != self._poison_value:
            self._poison_value = poison
            effects.append(Log(DeviceEvent.BALLOON_POISON, {"poison_value": poison}))
        return effects

    def on_timer(self) -> Effects:
        return self.statistics.request()

    # -- for a successor, and for people -------------------------------------------------------

    large_state = None

    def save(self) -> JsonObject:
        hinting, statistics = self.hinting, self.statistics
        state = BalloonState(
            target_pages=self._target_pages,
            actual_pages=self._actual_pages,
            poison_value=self._poison_value,
            guest_memory_size=self.guest_memory_size,
            hint_phase=hinting.phase,
            hint_shown=hinting.shown,
            hint_command=hinting.command,
            hint_driver_command=hinting.driver_command,
            hint_unanswered=sorted(hinting.unanswered),
            hint_blocks=hinting.blocks,
            hint_size=hinting.size,
            hint_ignored_blocks=hinting.ignored_blocks,
            hint_rounds=hinting.rounds,
            hint_handled=hinting.handled,
            statistics=statistics.latest,
            statistics_received_s=statistics.received_s,
            statistics_updates=statistics.updates,
            statistics_held=statistics.held_position,
        )
        plain: JsonObject = msgspec.to_builtins(state)
        return plain

    def load(self, saved: JsonObject) -> None:
        try:
            state = msgspec.convert(saved, BalloonState)
        except msgspec.ValidationError as error:
            raise ValueError(f"not a balloon's saved state: {error}") from error
        self._target_pages = state.target_pages
        self._actual_pages = state.actual_pages
        self._poison_value = state.poison_value
        self.guest_memory_size = state.guest_memory_size
        hinting = self.hinting
        hinting.phase = state.hint_phase
        hinting.shown = state.hint_shown
        hinting.command = state.hint_command
        hinting.driver_command = state.hint_driver_command
        hinting.unanswered = set(state.hint_unanswered)
        hinting.blocks = state.hint_blocks
        hinting.size = state.hint_size
        hinting.ignored_blocks = state.hint_ignored_blocks
        hinting.rounds = state.hint_rounds
        hinting.handled = state.hint_handled
        self.statistics.latest = state.statistics
        self.statistics.received_s = state.statistics_received_s
        self.statistics.updates = state.statistics_updates
        self.statistics.expect(state.statistics_held)

    def lasting(self) -> JsonObject:
        return {"target": self.target}

    def recall(self, lasting: JsonObject) -> None:
        self._target_pages = decode_target(lasting) // BALLOON_PAGE_SIZE

    def status(self, counters: Mapping[str, int], now_s: float) -> JsonObject:
        """Sizes in bytes; `actual` and `stats` are the guest's word, the rest is ours."""
        return {
            "target": self.target,
            "actual": self.actual,
            "inflated": counters["inflated_pages"] * BALLOON_PAGE_SIZE,
            "reported": counters["reported_size"],
            "discarded": counters["discarded_size"],
            "stats": dict(self.statistics.latest),
            "features": balloon_feature_names(self.features),
            "reached": self.reached,
            "guest_memory": self.guest_memory_size,
            "inhibited": self.verdict.inhibited,
            "withheld": counters["withheld_size"],
            "poison_value": self._poison_value,
            "stats_received_s": self.statistics.received_s,
            "stats_updates": self.statistics.updates,
            "hint": self.hinting.status(),
            "counters": dict(counters),
        }

    # -- inside --------------------------------------------------------------------------------

    def _sizes(self) -> JsonObject:
        return {"target": self.target, "actual": self.actual, "reached": self.reached}

    def _announce_target(self) -> list[Effect]:
        return [PublishConfig(_NUM_PAGES, _FIELD.pack(self._target_pages)), NotifyConfig()]

    def _with_command(self, effects: Effects) -> Effects:
        return [
            PublishConfig(_COMMAND, _FIELD.pack(self.hinting.shown)),
            *([NotifyConfig()] if self._command_is_news(effects) else []),
            *effects,
        ]

    @staticmethod
    def _command_is_news(effects: Effects) -> bool:
        changed = {DeviceEvent.HINT_REQUESTED, DeviceEvent.HINT_FINISHED}
        return any(isinstance(effect, Event) and effect.name in changed for effect in effects)

    def _data_plane(self) -> DataPlane:
        flags = DataPlane(0)
        if self.features & BalloonFeature.MUST_TELL_HOST:
            flags |= DataPlane.MUST_TELL_HOST
        if self.features & BalloonFeature.PAGE_POISON:
            flags |= DataPlane.PAGE_POISON
        if self.verdict.may_discard:
            flags |= DataPlane.MAY_DISCARD
        return flags

    @property
    def _why_stopped(self) -> str:
        if self.features:
            return "it is stopped: the VM is paused, or its guest boots or has unloaded it"
        return "none has started: no VMM is connected, or virtio_balloon is not loaded"

    def _require(self, feature: BalloonFeature, what: str) -> None:
        if not self.started:
            raise Refused(f"{what} needs a running guest driver: {self._why_stopped}")
        if not self.features & feature:
            raise Refused(f"the guest's driver has no {what}")
