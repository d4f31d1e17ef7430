"""The event stream: what happened to VMs, kept for a while and passed on to whoever listens.

Memory is bounded whatever guests cause and however slowly somebody reads. Knows no event's
meaning, and no HTTP.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import msgspec
import trio

JsonObject: TypeAlias = dict[str, Any]

HISTORY_MAX: Final = 256
PENDING_MAX: Final = 256

LATEST_ONLY: Final = frozenset({"balloon_actual", "balloon_statistics"})
"""Guests can cause these a thousand times a second: of each VM only the latest is kept."""


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One thing that happened: numbered in order, time in seconds since the epoch."""

    id: int
    time_s: float
    vm: str
    name: str
    fields: JsonObject

    def to_json(self) -> bytes:
        """{"id", "time_s", "vm", "event", …the event's own fields}, one line."""
        head = {"id": self.id, "time_s": self.time_s, "vm": self.vm, "event": self.name}
        return msgspec.json.encode({**self.fields, **head})

    @property
    def key(self) -> Hashable:
        """Equal for events of which only the latest matters."""
        return (self.vm, self.name) if self.name in LATEST_ONLY else self.id


class _Latest:
    """Events in order, of equal keys the latest, at most `size_max`, the oldest dropped first."""

    def __init__(self, size_max: int) -> None:
        self.dropped = 0
        self._size_max = size_max
        self._events: OrderedDict[Hashable, StreamEvent] = OrderedDict()

    def add(self, event: StreamEvent) -> None:
        self._events.pop(event.key, None)
        self._events[event.key] = event
        if len(self._events) > self._size_max:
            self._events.popitem(last=False)
            self.dropped += 1

    def all(self) -> list[StreamEvent]:
        return list(self._events.values())

    def clear(self) -> None:
        self._events.clear()


class Subscription:
    """One listener's events; use it with `with`.

    Attributes:
        dropped: events lost because this listener read too slowly.
    """

    def __init__(self, stream: EventStream) -> None:
        self._stream = stream
        self._pending = _Latest(PENDING_MAX)
        self._news = trio.Event()
        self._ended = False

    @property
    def dropped(self) -> int:
        return self._pending.dropped

    def __enter__(self) -> Self:
        self._stream._subscriptions.add(self)
        if self._stream.closed:
            self._end()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream._subscriptions.discard(self)

    async def receive(self) -> list[StreamEvent]:
        """Wait for events; an empty list means that the stream has ended."""
        await self._news.wait()
        events = self._pending.all()
        self._pending.clear()
        if not self._ended:
            self._news = trio.Event()
        return events

    def _offer(self, event: StreamEvent) -> None:
        self._pending.add(event)
        self._news.set()

    def _end(self) -> None:
        self._ended = True
        self._news.set()


class EventStream:
    """Where events are published, from the trio thread, and subscribed to."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.closed = False
        self._clock = clock
        self._last_id = 0
        self._history = _Latest(HISTORY_MAX)
        self._subscriptions: set[Subscription] = set()

    @property
    def next_id(self) -> int:
        """Number of the next event."""
        return self._last_id + 1

    def begin_after(self, last_id: int) -> None:
        """Go on after a predecessor's numbers."""
        self._last_id = max(self._last_id, last_id)

    @property
    def subscribers(self) -> int:
        """How many listen now."""
        return len(self._subscriptions)

    def publish(self, vm: str, name: str, fields: JsonObject) -> None:
        """Tell every listener, without waiting for any; sizes in `fields` are bytes."""
        self._last_id += 1
        event = StreamEvent(self._last_id, self._clock(), vm, str(name), fields)
        self._history.add(event)
        for subscription in self._subscriptions:
            subscription._offer(event)

    def subscribe(self) -> Subscription:
        """Events from now on."""
        return Subscription(self)

    def history(self, after: int = 0) -> list[StreamEvent]:
        """The latest events whose id is above `after`, oldest first."""
        return [event for event in self._history.all() if event.id > after]

    def close(self) -> None:
        """End every subscription, present and future; publishing goes on."""
        self.closed = True
        for subscription in self._subscriptions:
            subscription._end()
