"""The control API's client: blocking, for vhostctl and tests.

Knows HTTP and the exit code each failure deserves; must not print anything.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from enum import IntEnum
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse, IncompleteRead
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeAlias
from urllib.parse import quote

from vhostd.errors import VhostdError

JsonValue: TypeAlias = Any

ANSWER_TIMEOUT_S: Final = 10.0
"""A healthy daemon answers in milliseconds; waiting for a guest comes on top of this."""

SYNC_TIMEOUT_S: Final = 3600.0
"""A slow disk may need that long; nothing is gained by giving up sooner."""
SILENCE_MAX_S: Final = 30.0
SUCCESSOR_TIMEOUT_S: Final = 15.0
"""A restart takes about a second. A daemon that is not back by then needs a person."""
LOOK_AGAIN_S: Final = 0.1  # nothing tells that somebody listens on a path again
READ_ONLY_SOCKET: Final = "control-ro.sock"
"""Beside control.sock; answers everybody's reads."""


class ExitCode(IntEnum):
    """What vhostctl exits with."""

    DONE = 0
    REFUSED = 1
    USAGE = 2
    UNREACHABLE = 3
    TIMED_OUT = 4


class ClientError(VhostdError):
    """A request that was not fulfilled; the text is one line for the operator."""

    def __init__(self, text: str, code: ExitCode) -> None:
        super().__init__(text)
        self.code = code


class _Unreachable(ClientError):
    """No daemon answered; lost: there was one when the request began."""

    def __init__(self, text: str, *, lost: bool) -> None:
        super().__init__(text, ExitCode.UNREACHABLE)
        self.lost = lost


class _Patience:
    """Waits for the successor of a daemon that ended in the middle of something."""

    def __init__(self, where: Path, tell: Callable[[str], None]) -> None:
        self._where = where
        self._tell = tell
        self._give_up_s: float | None = None

    def answered(self) -> None:
        """A daemon is there; whatever comes is a new loss."""
        if self._give_up_s is not None:
            self._tell(f"{self._where}: going on with its successor")
        self._give_up_s = None

    def after(self, error: _Unreachable) -> None:
        """Return when it is time to try again.

        Raises:
            ClientError: there was no daemon from the beginning, or none came back in time.
        """
        now_s = time.monotonic()
        if self._give_up_s is None:
            if not error.lost:
                raise error
            self._give_up_s = now_s + SUCCESSOR_TIMEOUT_S
            self._tell(f"{self._where}: the daemon ended; waiting for its successor")
        elif now_s >= self._give_up_s:
            raise ClientError(
                f"{self._where}: the daemon ended, and none came back within"
                f" {SUCCESSOR_TIMEOUT_S:g} s; what it was asked for may not be done: look at"
                " 'vhostctl status' once one runs, and ask again",
                ExitCode.UNREACHABLE,
            ) from error
        time.sleep(LOOK_AGAIN_S)


_CODES: Final = {400: ExitCode.USAGE, 504: ExitCode.TIMED_OUT}


class _UnixConnection(HTTPConnection):
    """HTTP/1.1 over a UNIX socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("vhostd", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self._path))


class ControlClient:
    """One daemon's control API, a connection for each request.

    What waits for a guest or a disk goes on with the daemon's successor. Every method raises
    ClientError when the request is not fulfilled.

    Args:
        tell: called with one line about what happens meanwhile.
    """

    def __init__(self, socket_path: Path, tell: Callable[[str], None] = lambda _line: None) -> None:
        self._socket_path = socket_path
        self._tell = tell
        self._answered = False  # a daemon was there

    def vms(self) -> list[JsonValue]:
        """The status of every VM."""
        vms: list[JsonValue] = self._request("GET", "/v1/vms")
        return vms

    def vm(self, name: str) -> JsonValue:
        """The status of one VM."""
        return self._request("GET", _vm_path(name))

    def devices(self, name: str) -> list[JsonValue]:
        """Its devices, see verbs.DeviceDescription."""
        devices: list[JsonValue] = self._request("GET", _vm_path(name, "devices"))
        return devices

    def set_balloon(self, name: str, size: int, wait_s: float | None = None) -> JsonValue:
        """Set the balloon's size in bytes; with wait_s, wait for the guest that long."""
        return self._set(_vm_path(name, "balloon"), {"target": size}, wait_s)

    def statistics(self, name: str, fresh_timeout_s: float | None = None) -> JsonValue:
        """The guest's statistics; with fresh_timeout_s, ask it and wait that long."""
        path = _vm_path(name, "balloon", "stats")
        if fresh_timeout_s is None:
            return self._request("GET", path)

        def fresh(left_s: float) -> JsonValue:
            asked = f"{path}?fresh=1&timeout_s={left_s:.3f}"
            return self._request("GET", asked, extra_timeout_s=left_s)

        return self._waiting(fresh, fresh_timeout_s)

    def hint(self, name: str, action: str) -> JsonValue:
        """Open ("start") or break off ("stop") a free page hinting round."""
        return self._request("POST", _vm_path(name, "balloon", "hint"), {"action": action})

    def resize_mem(
        self, name: str, size: int, device: str | None = None, *, again: bool = False
    ) -> JsonValue:
        """Set the requested size of a memory device in bytes; its status comes back.

        again: ask the daemon's successor where it ends before it answers.
        """
        path, body = _vm_path(name, "mem"), {"size": size, "device": device}
        if again:
            return self._waiting(lambda _left_s: self._request("PUT", path, body), 0)
        return self._request("PUT", path, body)

    def mem_progress(self, name: str, device: str, timeout_s: float) -> Iterator[JsonValue]:
        """The device's status now and whenever it changed, until the guest is at its size.

        Raises ClientError (TIMED_OUT) with where the guest stands after timeout_s.
        """

        def look() -> JsonValue:
            return self._waiting(lambda _left_s: self._mem(name, device), 0)

        deadline_s = time.monotonic() + timeout_s
        for _ in self._news(f"/v1/events?vm={quote(name, safe='')}", deadline_s):
            mem = look()
            yield mem
            if mem["reached"] and not mem["discarding"]:
                return
        mem = look()  # that nothing happens for a while has no event, and says what is wrong
        raise ClientError(
            f"timed out: {device} is at {mem['plugged']} bytes of {mem['requested']}:"
            f" {mem['standing']}",
            ExitCode.TIMED_OUT,
        )

    def _mem(self, name: str, device: str) -> JsonValue:
        for mem in self._request("GET", _vm_path(name, "mem")):
            if mem["id"] == device:
                return mem
        raise ClientError(f"VM {name!r} has no memory device {device!r} now", ExitCode.REFUSED)

    def set_memory(self, name: str, size: int, wait_s: float | None = None) -> JsonValue:
        """Set the guest's usable memory in bytes; what was asked of whom comes back."""
        return self._set(_vm_path(name, "memory"), {"size": size}, wait_s)

    def _set(self, path: str, body: JsonValue, wait_s: float | None) -> JsonValue:
        if wait_s is None:
            return self._request("PUT", path, body)

        def set_and_wait(left_s: float) -> JsonValue:
            return self._request("PUT", path, {**body, "wait_s": left_s}, extra_timeout_s=left_s)

        return self._waiting(set_and_wait, wait_s)

    def flush_pmem(self, name: str, device: str | None = None) -> JsonValue:
        """Make a disk durable; its status comes back, however long that takes."""
        return self._pmem(name, "flush", device)

    def drop_pmem_cache(self, name: str, device: str | None = None) -> JsonValue:
        """Make a disk durable and drop its page cache; see verbs.CacheDropped."""
        return self._pmem(name, "drop-cache", device)

    def clear_pmem(self, name: str, device: str | None = None) -> JsonValue:
        """Let flushes of a disk succeed again; its status comes back."""
        return self._pmem(name, "clear", device)

    def _pmem(self, name: str, verb: str, device: str | None) -> JsonValue:
        path, body = _vm_path(name, "pmem", verb), {"device": device}
        return self._waiting(
            lambda left_s: self._request("POST", path, body, extra_timeout_s=left_s),
            SYNC_TIMEOUT_S,
        )

    def events(self, *, follow: bool) -> Iterator[JsonValue]:
        """The latest events, oldest first; with follow, then those to come, for ever."""
        if follow:
            yield from filter(None, self._news("/v1/events?recent=1"))
            return
        with self._exchange("GET", "/v1/events?recent=1&follow=0", None, ANSWER_TIMEOUT_S) as past:
            for line in past[0]:
                if line.startswith(b"data:"):
                    yield json.loads(line.removeprefix(b"data:"))

    def _waiting(self, ask: Callable[[float], JsonValue], timeout_s: float) -> JsonValue:
        """Ask what may be asked again, with the seconds left for it, until a daemon answers."""
        deadline_s = time.monotonic() + timeout_s
        patience = _Patience(self._socket_path, self._tell)
        while True:
            try:
                return ask(max(0.0, deadline_s - time.monotonic()))
            except _Unreachable as error:
                patience.after(error)

    def _news(self, path: str, deadline_s: float = math.inf) -> Iterator[JsonValue | None]:
        """Events of a stream until the deadline; None whenever it begins, with a successor again.

        The successor goes on after the last event that came (WHATWG HTML, "Last-Event-ID").
        """
        patience = _Patience(self._socket_path, self._tell)
        last: dict[str, str] = {}
        while True:
            try:
                with self._exchange("GET", path, None, SILENCE_MAX_S, last) as stream:
                    yield None
                    for event in _events(*stream, deadline_s):
                        if event is not None:
                            last = {"Last-Event-ID": str(event["id"])}
                            yield event
                        patience.answered()
                if time.monotonic() >= deadline_s:
                    return
                raise _Unreachable(f"{self._socket_path}: the daemon ended", lost=True)
            except _Unreachable as error:
                patience.after(error)

    def _request(
        self, method: str, path: str, body: JsonValue = None, *, extra_timeout_s: float = 0
    ) -> JsonValue:
        with self._exchange(method, path, body, ANSWER_TIMEOUT_S + extra_timeout_s) as (answer, _):
            return json.loads(answer.read())

    @contextmanager
    def _exchange(
        self,
        method: str,
        path: str,
        body: JsonValue,
        timeout_s: float,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> Iterator[tuple[HTTPResponse, socket.socket]]:
        """Send a request and read its answer, from that socket, inside the block."""
        where = self._socket_path
        content = None if body is None else json.dumps(body).encode()
        sent = dict(headers) if body is None else {"Content-Type": "application/json", **headers}
        try:
            connection = self._connection(method, path, timeout_s)
            with closing(connection), _losses(where):
                used = connection.sock
                with suppress(BrokenPipeError):
                    # A daemon that refuses early has said why before it closed.
                    connection.request(method, path, content, sent)
                answer = connection.getresponse()
                if answer.status != HTTPStatus.OK:
                    raise _refusal(answer)
                self._answered = True
                yield answer, used
        except TimeoutError as error:
            raise ClientError(f"{where}: the daemon does not answer", ExitCode.TIMED_OUT) from error
        except PermissionError as error:
            text = f"{where}: permission denied; {READ_ONLY_SOCKET} beside it answers reads"
            raise ClientError(text, ExitCode.UNREACHABLE) from error
        except OSError as error:
            text = f"{where}: the daemon can't be reached: {error.strerror or error}"
            raise _Unreachable(text, lost=self._answered) from error

    def _connection(self, method: str, path: str, timeout_s: float) -> _UnixConnection:
        """Connected to control.sock, or for a read of who may not use that, to control-ro.sock."""
        connection = _UnixConnection(self._socket_path, timeout_s)
        try:
            connection.connect()
        except PermissionError:
            if method != "GET" or "fresh=1" in path:
                raise
            connection = _UnixConnection(self._socket_path.with_name(READ_ONLY_SOCKET), timeout_s)
            connection.connect()
        return connection


@contextmanager
def _losses(where: Path) -> Iterator[None]:
    """A connection that breaks is a daemon that ended, or something that is none."""
    try:
        yield
    except (ConnectionError, IncompleteRead) as error:
        raise _Unreachable(f"{where}: the daemon ended before it answered", lost=True) from error
    except (HTTPException, ValueError) as error:
        text = f"{where}: what answers is no vhostd: {type(error).__name__}"
        raise ClientError(text, ExitCode.UNREACHABLE) from error


def _events(
    stream: HTTPResponse, connected: socket.socket, deadline_s: float
) -> Iterator[JsonValue | None]:
    """Read events until the deadline or the stream's end; None where a line is none.

    Raises:
        TimeoutError: not even a comment came for SILENCE_MAX_S; the daemon hangs.
    """
    while (left_s := deadline_s - time.monotonic()) > 0:
        connected.settimeout(min(left_s, SILENCE_MAX_S))
        try:
            line = stream.readline()
        except TimeoutError:
            if left_s <= SILENCE_MAX_S:
                return
            raise
        if not line:
            return
        is_event = line.startswith(b"data:")
        yield json.loads(line.removeprefix(b"data:")) if is_event else None


def _vm_path(name: str, *rest: str) -> str:
    return "/".join(("/v1/vms", quote(name, safe=""), *rest))


def _refusal(answer: HTTPResponse) -> ClientError:
    """What the daemon says of a request that it does not fulfil (RFC 9457)."""
    try:
        problem = json.loads(answer.read())
        text, code = str(problem["error"]), problem.get("code")  # an older one has no code
    except (ValueError, KeyError, TypeError, AttributeError):
        text, code = f"the daemon answered {answer.status} {answer.reason}", None
    text = " ".join(text.split())
    if code == "stopping":
        return _Unreachable(text, lost=True)
    return ClientError(text, _CODES.get(answer.status, ExitCode.REFUSED))
