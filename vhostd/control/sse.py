"""Server-sent events over one HTTP response (WHATWG HTML, "Server-sent events").

Knows the event stream and ASGI; must not know what an event means.
"""

from __future__ import annotations

from typing import Final

import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vhostd.control.events import EventStream, StreamEvent

KEEPALIVE_S: Final = 15.0
"""Proxies and dead peers are noticed this late."""
PACE_S: Final = 0.05
"""At most one batch per interval: what a guest does a thousand times a second is seen 20 times."""


class EventStreamResponse(Response):
    """Events until the client goes, the stream ends, or, without follow, the past is told.

    Args:
        vm: only this VM's events; None: all.
        after: begin with what is remembered of events after this id; None: with what comes.
    """

    def __init__(
        self, events: EventStream, *, vm: str | None, after: int | None, follow: bool
    ) -> None:
        super().__init__()
        self._events = events
        self._vm = vm
        self._after = after
        self._follow = follow

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._wait_for_disconnect, receive, nursery.cancel_scope)
            await self._send_all(send)
            nursery.cancel_scope.cancel()

    async def _wait_for_disconnect(self, receive: Receive, scope: trio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    async def _send_all(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        with self._events.subscribe() as subscription:
            past = [] if self._after is None else self._events.history(self._after)
            # The comment shows a client at once that it is connected.
            await self._send(send, b": vhostd events\n\n" + self._lines(past))
            while self._follow:
                batch = None
                with trio.move_on_after(KEEPALIVE_S):
                    batch = await subscription.receive()
                if batch == []:
                    break
                await self._send(send, b": \n\n" if batch is None else self._lines(batch))
                await trio.sleep(PACE_S)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, body: bytes) -> None:
        if body:
            await send({"type": "http.response.body", "body": body, "more_body": True})

    def _lines(self, events: list[StreamEvent]) -> bytes:
        return b"".join(
            b"id: %d\nevent: %s\ndata: %s\n\n" % (event.id, event.name.encode(), event.to_json())
            for event in events
            if self._vm in (None, event.vm)
        )
