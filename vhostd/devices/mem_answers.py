"""What a virtio-mem driver is told: answers, their replay, and how one that spins is slowed down.

Knows how Linux reacts to each answer (drivers/virtio/virtio_mem.c). Must not know blocks.
"""

from __future__ import annotations

from collections import Counter
from typing import Final, TypeAlias

from vhostd.devices.base import Chain, Complete, Effect, NotifyConfig
from vhostd.devices.mem_request import Answer, BlockState, Request, response

NACKS_IN_A_ROW_MAX: Final = 3
"""Linux repeats a PLUG that got NACK at once and for ever; after this many it gets BUSY, which
makes it wait for a config interrupt or a minute."""

BEAT_S: Final = 4.0
BUSY_PAUSE_MAX_BEATS: Final = 16
"""A guest that was told BUSY is told to try again after 1 beat, doubling up to this."""

NUDGE_MIN_BEATS: Final = 3
NUDGE_MAX_BEATS: Final = 16
"""A guest that could not go on tries again after 50 to 300 s by itself; it is told to after so many
beats without a request, doubling. Not sooner: Linux breaks a long attempt off when it is told."""

Executed: TypeAlias = tuple[int, bytes, bytes]
"""Position, request and answer of a chain that was dealt with; empty: it was no request."""

RECENT_MAX: Final = 64
"""Chains that may be on their way through us at once (VHD_CONTROL_CHAINS_MAX in c_src/vhd.h)."""


class Nudge:
    """Tells a guest that stands still short of its size to try again."""

    def __init__(self) -> None:
        self._quiet_beats = 0
        self._patience_beats = NUDGE_MIN_BEATS

    def on_request(self) -> None:
        """The guest is at work."""
        self._quiet_beats = 0

    def on_wish(self) -> None:
        """The guest was told just now."""
        self._quiet_beats = 0
        self._patience_beats = NUDGE_MIN_BEATS

    def on_beat(self) -> list[Effect]:
        """BEAT_S went by, and the guest is not where it should be."""
        self._quiet_beats += 1
        if self._quiet_beats < self._patience_beats:
            return []
        self._quiet_beats = 0
        self._patience_beats = min(2 * self._patience_beats, NUDGE_MAX_BEATS)
        return [NotifyConfig()]


class Answers:
    """Answers given to one driver.

    Attributes:
        recent: the latest chains dealt with. Until an answer is out the ring may stop, and the same
            chain come again; a PLUG carried out twice would be an ERROR, and end the driver. Only
            that chain has its position, so a later request is never answered from here.
        counts: how often each answer was given.
        busy_because: why a guest that waits was told BUSY; None: none waits.
    """

    def __init__(self) -> None:
        self.recent: list[Executed] = []
        self.counts: Counter[Answer] = Counter()
        self.busy_because: str | None = None
        self._nacks_in_a_row = 0
        self._pause_beats = 0
        self._beats_left = 0

    def replay(self, chain: Chain) -> list[Effect] | None:
        """The answer to a chain that was dealt with before its ring stopped; None for others."""
        for position, request, answer in self.recent:
            if (position, request) == (chain.position, _request_of(chain)):
                return [Complete(chain.queue_index, chain.token, answer)]
        return None

    def give(
        self, chain: Chain, answer: Answer, state: BlockState = BlockState.PLUGGED
    ) -> list[Effect]:
        """Answer a request that was carried out, or refused."""
        data = response(answer, state)
        self.counts[answer] += 1
        self._remember(chain, data)
        return [Complete(chain.queue_index, chain.token, data)]

    def too_much(self, chain: Chain) -> list[Effect]:
        """Answer a PLUG beyond the requested size."""
        self._nacks_in_a_row += 1
        if self._nacks_in_a_row > NACKS_IN_A_ROW_MAX:
            return self.busy(chain, "the guest asks for more than was requested of it")
        # It may not know yet how much is requested now.
        return [NotifyConfig(), *self.give(chain, Answer.NACK)]

    def busy(self, chain: Chain, why: str) -> list[Effect]:
        """Have the guest wait; on_beat() tells it when to try again."""
        self.busy_because = why
        self._pause_beats = min(max(2 * self._pause_beats, 1), BUSY_PAUSE_MAX_BEATS)
        self._beats_left = self._pause_beats
        return self.give(chain, Answer.BUSY)

    def on_beat(self) -> list[Effect]:
        """BEAT_S went by. A guest told BUSY would wait 50 to 300 s by itself."""
        if self._beats_left == 0:
            return []
        self._beats_left -= 1
        return [NotifyConfig()] if self._beats_left == 0 else []

    def progress(self) -> None:
        """A PLUG was possible, or more is requested: patience starts anew."""
        self._nacks_in_a_row = 0
        self._pause_beats = self._beats_left = 0
        self.busy_because = None

    def refused(self, chain: Chain) -> None:
        """The chain is no request, and goes back unused."""
        self._remember(chain, b"")

    def _remember(self, chain: Chain, answer: bytes) -> None:
        done = (chain.position, _request_of(chain), answer)
        self.recent = [*self.recent[1 - RECENT_MAX :], done]

    def forget(self) -> None:
        """The guest was reset: nothing comes again, and no block is as it was."""
        self.recent = []
        self.progress()


def _request_of(chain: Chain) -> bytes:
    return chain.data[: Request.SIZE]
