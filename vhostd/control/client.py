"""The control API's client: blocking, for vhostctl and tests.

Knows HTTP and the exit code each failure deserves; must not print anything.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from enum import IntEnum
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import quote

from vhostd.errors import VhostdError

JsonValue: TypeAlias = Any

ANSWER_TIMEOUT_S: Final = 10.0
"""A healthy daemon answers in milliseconds; waiting for a guest comes on top of this."""

SYNC_TIMEOUT_S: Final = 3600.0
"""A slow disk may need that long; nothing is gained by giving up sooner."""
SILENCE_MAX_S: Final = 30.0


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

    Every method raises ClientError when the request is not fulfilled.
    """

    def __init__(self, socket_path: Path) -> None:
        self._socket_path = socket_path

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
        body = {"target": size, "wait_s": wait_s}
        return self._request("PUT", _vm_path(name, "balloon"), body, extra_timeout_s=wait_s or 0)

    def statistics(self, name: str, fresh_timeout_s: float | None = None) -> JsonValue:
        """The guest's statistics; with fresh_timeout_s, ask it and wait that long."""
        path = _vm_path(name, "balloon", "stats")
        if fresh_timeout_s is None:
            return self._request("GET", path)
        path += f"?fresh=1&timeout_s={fresh_timeout_s}"
        return self._request("GET", path, extra_timeout_s=fresh_timeout_s)

    def hint(self, name: str, action: str) -> JsonValue:
        """Open ("start") or break off ("stop") a free page hinting round."""
        return self._request("POST", _vm_path(name, "balloon", "hint"), {"action": action})

    def resize_mem(self, name: str, size: int, device: str | None = None) -> JsonValue:
        """Set the requested size of a memory device in bytes; its status comes back."""
        body = {"size": size, "device": device}
        return self._request("PUT", _vm_path(name, "mem"), body)

    def mem_progress(self, name: str, device: str, timeout_s: float) -> Iterator[JsonValue]:
        """The device's status now and whenever it changed, until the guest is at its size.

        Raises ClientError (TIMED_OUT) with where the guest stands after timeout_s.
        """
        deadline = time.monotonic() + timeout_s
        with closing(_UnixConnection(self._socket_path, SILENCE_MAX_S)) as connection:
            connection.request("GET", f"/v1/events?vm={quote(name, safe='')}")
            events = connection.getresponse()
            while True:
                mem = self._mem(name, device)
                yield mem
                if mem["reached"] and not mem["discarding"]:
                    return
                if not _wait_for_event(connection, events, deadline):
                    mem = self._mem(name, device)
                    raise ClientError(
                        f"timed out: {device} is at {mem['plugged']} bytes of"
                        f" {mem['requested']}: {mem['standing']}",
                        ExitCode.TIMED_OUT,
                    )

    def _mem(self, name: str, device: str) -> JsonValue:
        mems = self._request("GET", _vm_path(name, "mem"))
        return next(mem for mem in mems if mem["id"] == device)

    def set_memory(self, name: str, size: int, wait_s: float | None = None) -> JsonValue:
        """Set the guest's usable memory in bytes; what was asked of whom comes back."""
        body = {"size": size, "wait_s": wait_s}
        return self._request("PUT", _vm_path(name, "memory"), body, extra_timeout_s=wait_s or 0)

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
        return self._request("POST", path, body, extra_timeout_s=SYNC_TIMEOUT_S)

    def events(self, *, follow: bool) -> Iterator[JsonValue]:
        """The latest events, oldest first; with follow, then those to come, for ever."""
        path = f"/v1/events?recent=1&follow={int(follow)}"
        # Comments keep the stream alive, so silence means that the daemon hangs.
        with self._exchange("GET", path, None, SILENCE_MAX_S) as answer:
            for line in answer:
                if line.startswith(b"data:"):
                    yield json.loads(line.removeprefix(b"data:"))

    def _request(
        self, method: str, path: str, body: JsonValue = None, *, extra_timeout_s: float = 0
    ) -> JsonValue:
        with self._exchange(method, path, body, ANSWER_TIMEOUT_S + extra_timeout_s) as answer:
            return json.loads(answer.read())

    @contextmanager
    def _exchange(
        self, method: str, path: str, body: JsonValue, timeout_s: float
    ) -> Iterator[HTTPResponse]:
        """Send a request and read its answer inside the block."""
        where = self._socket_path
        content = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            with closing(_UnixConnection(where, timeout_s)) as connection:
                with suppress(BrokenPipeError):
                    # A daemon that refuses early has said why before it closed.
                    connection.request(method, path, content, headers)
                answer = connection.getresponse()
                if answer.status != HTTPStatus.OK:
                    raise _refusal(answer)
                yield answer
        except TimeoutError as error:
            raise ClientError(f"{where}: the daemon does not answer", ExitCode.TIMED_OUT) from error
        except PermissionError as error:
            text = f"{where}: permission denied; control-ro.sock beside it answers reads"
            raise ClientError(text, ExitCode.UNREACHABLE) from error
        except OSError as error:
            text = f"{where}: the daemon can't be reached: {error.strerror or error}"
            raise ClientError(text, ExitCode.UNREACHABLE) from error
        except (HTTPException, ValueError) as error:
            text = f"{where}: what answers is no vhostd: {type(error).__name__}"
            raise ClientError(text, ExitCode.UNREACHABLE) from error


def _wait_for_event(connection: _UnixConnection, events: HTTPResponse, deadline: float) -> bool:
    """Wait for an event of the stream, whatever it says; False: the time is over."""
    line = b""
    while not line.startswith(b"data:"):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return False
        connection.sock.settimeout(min(left_s, SILENCE_MAX_S))
        try:
            line = events.readline()
        except TimeoutError:
            return False
        if not line:
            raise ClientError("the daemon ended while it was waited for", ExitCode.UNREACHABLE)
    return True


def _vm_path(name: str, *rest: str) -> str:
    return "/".join(("/v1/vms", quote(name, safe=""), *rest))


def _refusal(answer: HTTPResponse) -> ClientError:
    code = _CODES.get(answer.status, ExitCode.REFUSED)
    try:
        text = str(json.loads(answer.read())["error"])
    except (ValueError, KeyError, TypeError):
        text = f"the daemon answered {answer.status} {answer.reason}"
    return ClientError(" ".join(text.split()), code)
