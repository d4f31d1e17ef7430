"""A QMP client for trio: commands with answers, events, and a clean end when the VMM goes.

Speaks the QEMU Machine Protocol (QEMU's docs/interop/qmp-spec.rst): one JSON object a line.
Any number of tasks may execute commands at once; one task reads. It must not know which commands
exist or what they mean, and it trusts the VMM with nothing but bounded memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import msgspec
import trio

from vhostd.errors import VhostdError

# The longest answer known, query-qmp-schema, is some 300 KB.
MAX_LINE = 16 * 1024 * 1024
_CHUNK = 64 * 1024

# What a command answers is the VMM's schema's business; callers pick what they know.
JsonValue: TypeAlias = Any


class QmpError(VhostdError):
    """The VMM refused a command.

    Attributes:
        error_class: QMP's error class, nearly always "GenericError" or "CommandNotFound".
        description: the VMM's own text.
    """

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"{command}: {description} ({error_class})")
        self.error_class = error_class
        self.description = description


class QmpClosed(VhostdError):
    """The conversation is over: the VMM closed it, never began it, or broke the protocol."""


@dataclass(frozen=True)
class QmpEvent:
    """One event: its name ("RESET"), its data, and when it happened (seconds since the epoch).

    `timestamp_s` is nan where the VMM had no clock to read (the specification's -1).
    """

    name: str
    data: dict[str, Any]
    timestamp_s: float


class EventSubscription:
    """Events of the subscribed names, in order: `async for event in subscription`.

    At most `buffer` events wait for a slow reader; later ones are dropped and counted in
    `dropped`. Iteration ends when the connection does. Close it, or use it with `with`.
    """

    def __init__(self, client: QmpClient, names: frozenset[str], buffer: int) -> None:
        self.dropped = 0
        self._client = client
        self._names = names
        self._send, self._receive = trio.open_memory_channel[QmpEvent](buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> QmpEvent:
        try:
            return await self._receive.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise StopAsyncIteration from None

    async def receive(self) -> QmpEvent:
        """The next event. Raises QmpClosed when the connection has ended."""
        try:
            return await self._receive.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError):
            raise QmpClosed(self._client.end_reason or "the subscription is closed") from None

    def close(self) -> None:
        """End the subscription; events still waiting are forgotten."""
        self._client._subscriptions.discard(self)
        self._send.close()
        self._receive.close()

    def _offer(self, event: QmpEvent) -> None:
        if self._names and event.name not in self._names:
            return
        try:
            self._send.send_nowait(event)
        except trio.WouldBlock:
            self.dropped += 1

    def _end(self) -> None:
        self._send.close()


@dataclass
class _Pending:
    """A command whose answer has not come: `reply` is None if the connection ended first."""

    done: trio.Event = field(default_factory=trio.Event)
    reply: dict[str, Any] | None = None


class QmpClient:
    """One open QMP connection; made by open_qmp() or qmp_over().

    Attributes:
        version: the VMM's version, e.g. "11.1.3".
        out_of_band: whether execute_oob() may be used.
        end_reason: None while the connection is up, else why it ended.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.version = ""
        self.out_of_band = False
        self.end_reason: str | None = None
        self._stream = stream
        self._received = bytearray()
        self._searched = 0
        self._sending = trio.Lock()
        self._identifiers = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._subscriptions: set[EventSubscription] = set()
        self._ended = trio.Event()

    async def execute(self, command: str, /, **arguments: object) -> JsonValue:
        """Run `command`, return what the VMM answered.

        Arguments go out under the names given; use `**{"job-id": ...}` for names with a dash.
        Raises QmpError if the VMM refuses, QmpClosed if the connection ends first. A cancelled
        call leaves the connection usable: its late answer is thrown away.
        """
        return await self._exchange("execute", command, arguments)

    async def execute_oob(self, command: str, /, **arguments: object) -> JsonValue:
        """Like execute(), but out of band: runs at once, even while another command blocks.

        Raises QmpClosed as well if the VMM does not offer out-of-band execution.
        """
        if not self.out_of_band:
            raise QmpClosed(f"{command}: the VMM offers no out-of-band execution")
        return await self._exchange("exec-oob", command, arguments)

    def events(self, *names: str, buffer: int = 64) -> EventSubscription:
        """Subscribe to events called `names` (none: to all), from now on.

        Never holds up the connection: see EventSubscription for what a slow reader loses.
        """
        subscription = EventSubscription(self, frozenset(names), buffer)
        if self.end_reason is None:
            self._subscriptions.add(subscription)
        else:
            subscription._end()
        return subscription

    async def wait_closed(self) -> str:
        """Wait until the connection has ended; return why."""
        await self._ended.wait()
        return self.end_reason or ""

    async def _exchange(self, key: str, command: str, arguments: dict[str, object]) -> JsonValue:
        if self.end_reason is not None:
            raise QmpClosed(f"{command}: {self.end_reason}")
        identifier = next(self._identifiers)
        request: dict[str, object] = {key: command, "id": identifier}
        if arguments:
            request["arguments"] = arguments
        pending = self._pending[identifier] = _Pending()
        try:
            await self._send(msgspec.json.encode(request) + b"\n")
            await pending.done.wait()
        finally:
            del self._pending[identifier]
        if pending.reply is None:
            raise QmpClosed(f"{command}: {self.end_reason}")
        if "return" in pending.reply:
            return pending.reply["return"]
        error = pending.reply["error"]
        text = str(error.get("desc", "no description"))
        raise QmpError(command, str(error.get("class", "GenericError")), text)

    async def _send(self, line: bytes) -> None:
        async with self._sending:
            # Cancelled already: say so while nothing is out, and the connection stays usable.
            await trio.lowlevel.checkpoint_if_cancelled()
            complete = False
            try:
                await self._stream.send_all(line)
                complete = True
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                # The reader sees the end too and wakes everyone; this one need not wait for it.
                self._end("the VMM closed the QMP connection")
            finally:
                if not complete:
                    # Half a line may be out: nothing sent later could be understood.
                    self._end("a QMP command was cancelled while it was sent")

    async def _receive_object(self) -> dict[str, Any]:
        while (end := self._received.find(b"\n", self._searched)) < 0:
            self._searched = len(self._received)
            if self._searched > MAX_LINE:
                raise QmpClosed(f"the VMM sent a QMP line of more than {MAX_LINE} bytes")
            try:
                data = await self._stream.receive_some(_CHUNK)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                data = b""
            if not data:
                raise QmpClosed("the VMM closed the QMP connection")
            self._received += data
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        self._searched = 0
        try:
            return msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise QmpClosed(f"the VMM sent what is no QMP message: {error}") from error

    async def _greet(self) -> None:
        greeting = (await self._receive_object()).get("QMP")
        try:
            numbers = greeting["version"]["qemu"]  # type: ignore[index]
            self.version = "{major}.{minor}.{micro}".format(**numbers)
            self.out_of_band = "oob" in greeting["capabilities"]  # type: ignore[index]
        except (TypeError, KeyError) as error:
            raise QmpClosed("the VMM's QMP greeting is not one") from error

    async def _read(self) -> None:
        try:
            while True:
                self._dispatch(await self._receive_object())
        except QmpClosed as error:
            self._end(str(error))

    def _dispatch(self, message: dict[str, Any]) -> None:
        if isinstance(message.get("event"), str):
            event = _event(message)
            for subscription in self._subscriptions:
                subscription._offer(event)
            return
        if "return" not in message and not isinstance(message.get("error"), dict):
            raise QmpClosed("the VMM sent a QMP message that is no answer, error or event")
        identifier = message.get("id")
        if not isinstance(identifier, int):
            raise QmpClosed(f"the VMM sent an answer to no command: {message.get('error')}")
        pending = self._pending.get(identifier)
        if pending is not None:
            pending.reply = message
            pending.done.set()

    def _end(self, reason: str) -> None:
        if self.end_reason is not None:
            return
        self.end_reason = reason
        for pending in self._pending.values():
            pending.done.set()
        for subscription in self._subscriptions:
            subscription._end()
        self._subscriptions.clear()
        self._ended.set()


def _event(message: dict[str, Any]) -> QmpEvent:
    data = message.get("data")
    stamp = message.get("timestamp")
    time_s = math.nan
    if isinstance(stamp, dict):
        seconds, microseconds = stamp.get("seconds"), stamp.get("microseconds")
        if isinstance(seconds, int) and isinstance(microseconds, int) and seconds >= 0:
            time_s = seconds + microseconds / 1e6
    return QmpEvent(message["event"], data if isinstance(data, dict) else {}, time_s)


@asynccontextmanager
async def running(task: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Run `task` while the body runs; what the body raises comes out as it was raised.

    A bare nursery would wrap it in an ExceptionGroup. `task` is cancelled at the end.
    """
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(task)
            try:
                yield
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from None


@asynccontextmanager
async def qmp_over(
    stream: trio.abc.Stream, *, greeting_timeout_s: float = 10.0
) -> AsyncIterator[QmpClient]:
    """Talk QMP over `stream`, which is closed at the end.

    Raises QmpClosed if the VMM does not greet within `greeting_timeout_s` (QEMU serves one client
    of a monitor at a time, and lets the others wait), or does not speak QMP.
    """
    async with stream:
        client = QmpClient(stream)
        try:
            with trio.fail_after(greeting_timeout_s):
                await client._greet()
        except trio.TooSlowError as error:
            raise QmpClosed(
                f"no QMP greeting within {greeting_timeout_s:g} s: is another client connected?"
            ) from error
        async with running(client._read):
            options = {"enable": ["oob"]} if client.out_of_band else {}
            await client.execute("qmp_capabilities", **options)
            try:
                yield client
            finally:
                client._end("the QMP connection was closed on this side")


@asynccontextmanager
async def open_qmp(
    path: str | Path, *, greeting_timeout_s: float = 10.0
) -> AsyncIterator[QmpClient]:
    """Connect to the QMP UNIX socket at `path` and negotiate.

    Raises QmpClosed as qmp_over() does, and if nobody listens at `path`.
    """
    try:
        stream = await trio.open_unix_socket(str(path))
    except OSError as error:
        raise QmpClosed(f"cannot connect to QMP at {path}: {error.strerror or error}") from error
    async with qmp_over(stream, greeting_timeout_s=greeting_timeout_s) as client:
        yield client
