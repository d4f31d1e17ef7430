"""Request bodies, read whole before anything is decided: bounded in size and in time.

Answering while a client still sends would make it see a broken connection instead of the answer.
Knows ASGI; must not know a verb.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

import msgspec
import trio
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vhostd.control.answers import Problem

BODY_SIZE_MAX: Final = 64 * 1024
BODY_TIMEOUT_S: Final = 10.0


def json_response(content: object, status: int = 200) -> Response:
    """A JSON body that ends with a line break, as a terminal likes it."""
    body = msgspec.json.encode(content) + b"\n"
    return Response(body, status_code=status, media_type="application/json")


def problem(
    status: int, code: str, detail: str, headers: Mapping[str, str] | None = None
) -> Response:
    """What went wrong (RFC 9457): `code` is for programs and stays, `detail` is one line."""
    told = Problem(HTTPStatus(status).phrase, status, code, detail, detail)
    body = msgspec.json.encode(told) + b"\n"
    return Response(body, status, headers, media_type="application/problem+json")


class WholeBodies:
    """ASGI middleware: the application gets each body in one piece, or never sees the request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        body: bytes | None = None
        with trio.move_on_after(BODY_TIMEOUT_S) as patience:
            body = await _read(receive)
        if patience.cancelled_caught:
            text = f"the body took more than {BODY_TIMEOUT_S:g} s"
            await problem(408, "body_timed_out", text)(scope, receive, send)
        elif body is None:
            text = f"a body may have {BODY_SIZE_MAX} bytes"
            await problem(413, "body_too_large", text)(scope, receive, send)
        else:
            await self._app(scope, _Replay(body, receive).receive, send)


class _Replay:
    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def receive(self) -> Message:
        body, self._body = self._body, None
        if body is None:
            return await self._receive()
        return {"type": "http.request", "body": body, "more_body": False}


async def _read(receive: Receive) -> bytes | None:
    """The body; None if it is too long. A client that left gives what it sent, for nobody."""
    body = bytearray()
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > BODY_SIZE_MAX:
            return None
        more = message.get("more_body", False)
    return bytes(body)
