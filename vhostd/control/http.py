"""Hypercorn's trio worker behind our own accept loop: bounded, and gone within a second.

The one file that knows hypercorn. Its own serve() has no limit on connections, so any local user
could use up the descriptors VMs need, and its shielded sends let a client that doesn't read hold
up a shutdown.
"""

from __future__ import annotations

import logging
import socket
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final, cast

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.h11 import (
    H2CProtocolRequiredError,
    H2ProtocolAssumedError,
    H11Protocol,
)
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState
from starlette.applications import Starlette

from vhostd.control.seats import Seat, Seats
from vhostd.log import LogEvent, get_logger

CONNECTIONS_PER_USER_MAX: Final = 64
"""So that one unprivileged user can't keep the others out."""
IDLE_TIMEOUT_S: Final = 5
"""Also the time a client has to send its request's head."""
GRACE_S: Final = 0.5

_UCRED = struct.Struct("=iII")


def _hypercorn_config() -> Config:
    config = Config()
    config.errorlog = logging.getLogger("hypercorn.error")
    config.accesslog = None
    config.keep_alive_timeout = IDLE_TIMEOUT_S
    config.include_server_header = False
    return config


class _BoundedListener(trio.abc.Listener[trio.SocketStream]):
    """Accepts only while there is a seat."""

    def __init__(self, listener: trio.SocketListener, seats: Seats) -> None:
        self._listener = listener
        self._seats = seats

    async def accept(self) -> trio.SocketStream:
        await self._seats.reserve()
        accepted = False
        try:
            stream = await self._listener.accept()
            accepted = True
            return stream
        finally:
            if not accepted:
                self._seats.give_back()

    async def aclose(self) -> None:
        await self._listener.aclose()


class _Connection(TCPServer):
    """Hypercorn's connection without HTTP/2, which nobody needs on these sockets."""

    async def _read_data(self) -> None:
        assert isinstance(self.protocol, ProtocolWrapper)
        assert isinstance(self.protocol.protocol, H11Protocol)
        # The wrapper is what would turn HTTP/1 into HTTP/2 when a client asks for it.
        self.protocol = self.protocol.protocol  # type: ignore[assignment]
        try:
            await super()._read_data()
        except (H2CProtocolRequiredError, H2ProtocolAssumedError):
            await self.stream.aclose()
        finally:
            # Else a connection that its client closed would live on until it is idle for long.
            await self.idle_task.stop()


class HttpServer:
    """One application on some listening sockets."""

    def __init__(self, app: Starlette, listeners: Sequence[trio.SocketListener]) -> None:
        self._listeners = listeners
        self._context = WorkerContext(None)
        self._connection = partial(
            _Connection, ASGIWrapper(cast(ASGIFramework, app)), _hypercorn_config(), self._context
        )
        self._seats = Seats()
        self._streams: set[trio.SocketStream] = set()
        self._one_ended = trio.lowlevel.ParkingLot()
        self._per_user: Counter[int] = Counter()
        self._log = get_logger()

    async def run(self, stop: trio.Event) -> None:
        """Serve until `stop`, then let what is under way finish for GRACE_S, then end it.

        Must run shielded from cancellation, or there is no grace.
        """
        bounded = [_BoundedListener(listener, self._seats) for listener in self._listeners]
        serve = partial(trio.serve_listeners, self._serve, bounded)
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                accepting.start_soon(partial(serve, handler_nursery=connections))
                await stop.wait()
                accepting.cancel_scope.cancel()
            await self._context.terminated.set()
            with trio.move_on_after(GRACE_S):
                while self._streams:
                    await self._one_ended.park()
            for stream in self._streams:
                # A send that waits for a client to read is shielded; only closing ends it.
                stream.socket.close()
            connections.cancel_scope.cancel()

    async def _serve(self, stream: trio.SocketStream) -> None:
        self._streams.add(stream)
        seat = Seat(self._seats)
        try:
            with self._admitted(stream) as admitted:
                if admitted:
                    state = ConnectionState({"seat": seat})  # api.py finds it in its requests
                    await self._connection(state, cast("trio.SSLStream[trio.SocketStream]", stream))
        except* Exception:  # noqa: BLE001
            # Hypercorn parses what any local user sends. Whatever it trips over ends this
            # connection, not the daemon.
            self._log.exception(LogEvent.CONTROL_CONNECTION_FAILED)
        finally:
            stream.socket.close()
            self._streams.discard(stream)
            seat.leave()
            self._one_ended.unpark_all()

    @contextmanager
    def _admitted(self, stream: trio.SocketStream) -> Iterator[bool]:
        """Count the connection as its user's; False if the user has too many."""
        user = _user_of(stream)
        if user is None:
            yield True
            return
        self._per_user[user] += 1
        try:
            yield self._per_user[user] <= CONNECTIONS_PER_USER_MAX or user == 0
        finally:
            self._per_user[user] -= 1
            if not self._per_user[user]:
                del self._per_user[user]


def _user_of(stream: trio.SocketStream) -> int | None:
    """The uid at the other end of a UNIX socket (unix(7), SO_PEERCRED); None for TCP."""
    if stream.socket.family != socket.AF_UNIX:
        return None
    credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, user, _ = _UCRED.unpack(credentials)
    return int(user)
