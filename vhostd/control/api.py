"""The HTTP application: requests of the verbs table onto the Daemon protocol, and back as JSON.

Every request is bounded in size and time, and answers application/problem+json with one line when
it can't be fulfilled. Must not know sockets; http.py serves it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Final, NoReturn, TypeVar

import msgspec
import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from vhostd.control.bodies import WholeBodies, json_response, problem
from vhostd.control.interface import Daemon, DeviceSocket, JsonObject, VmView
from vhostd.control.seats import Seat
from vhostd.control.sse import EventStreamResponse
from vhostd.control.verbs import (
    FRESH_TIMEOUT_DEFAULT_S,
    VERBS,
    BalloonHint,
    BalloonTarget,
    MemorySize,
    MemResize,
    PmemDevice,
    Verb,
    openapi,
)
from vhostd.errors import VhostdError
from vhostd.metrics.export import CONTENT_TYPE, metrics_text
from vhostd.units import BALLOON_PAGE_SIZE, parse_size

SUBSCRIBERS_MAX: Final = 64
"""Beyond it the read-only socket takes no listener, so that there is room on control.sock."""

Body = TypeVar("Body", bound=msgspec.Struct)
Handler = Callable[[Request], Awaitable[Response]]


_CODES: Final = {
    400: "bad_request",
    403: "read_only",
    404: "not_found",
    405: "method_not_allowed",
    503: "unavailable",
    504: "timed_out",
}


class ApiError(HTTPException):
    """A request that is answered with a status, a code for programs and one line."""

    def __init__(self, status: int, detail: str, code: str | None = None) -> None:
        super().__init__(status, detail)
        self.code = code or _CODES[status]


def create_app(daemon: Daemon, *, writable: bool) -> Starlette:
    """The application of control.sock (writable) or control-ro.sock."""
    handlers = _Handlers(daemon, writable=writable)
    return _application([_route(handlers, verb, writable=writable) for verb in VERBS])


def create_metrics_app(daemon: Daemon) -> Starlette:
    """The application of the metrics port: /metrics and nothing else."""
    handlers = _Handlers(daemon, writable=False)
    verbs = [verb for verb in VERBS if verb.name == "metrics"]
    return _application([_route(handlers, verb, writable=False) for verb in verbs])


def _application(routes: list[Route]) -> Starlette:
    return Starlette(
        routes=routes,
        middleware=[Middleware(WholeBodies)],
        exception_handlers={HTTPException: _on_http_error, VhostdError: _on_refusal, 500: _on_bug},
    )


def _route(handlers: _Handlers, verb: Verb, *, writable: bool) -> Route:
    handler: Handler = getattr(handlers, verb.name)

    async def endpoint(request: Request) -> Response:
        if reason := verb.query_refusal(request.query_params.multi_items()):
            raise ApiError(400, reason, "bad_parameter")
        if verb.changes and not writable:
            _refuse_change()
        return await handler(request)

    return Route(verb.path, endpoint, methods=[verb.method], name=verb.name)


def _refuse_change() -> NoReturn:
    raise ApiError(403, "this socket answers only reads; changes go to control.sock")


def _methods_of(request: Request) -> str:
    """All that the path of a request answers; starlette knows only one verb's."""
    routes: list[Route] = request.app.routes
    methods: set[str] = set()
    for route in routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return problem(error.status_code, error.code, error.detail)
    if error.status_code == 405:
        allowed = _methods_of(request)
        text = f"{request.url.path}: not a path for {request.method}; for {allowed}"
        return problem(405, "method_not_allowed", text, {"Allow": allowed})
    known = {404: f"{request.url.path}: there is nothing"}
    code = _CODES.get(error.status_code, "failed")
    text = " ".join(known.get(error.status_code, error.detail).split())
    return problem(error.status_code, code, text, error.headers)


async def _on_refusal(request: Request, error: Exception) -> Response:
    return problem(409, "refused", " ".join(str(error).splitlines()))


async def _on_bug(request: Request, error: Exception) -> Response:
    return problem(500, "internal", "the daemon failed; its log says how")


async def _read_body(request: Request, kind: type[Body]) -> Body:
    """The request's body as `kind`; an empty one means all defaults."""
    body = await request.body()
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not as described: {error}", "bad_body") from error


def _size(name: str, value: int | str) -> int:
    try:
        return parse_size(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ApiError(400, f"{name}: {error}") from error


def _flag(request: Request, name: str) -> bool:
    return bool(request.query_params.get(name) == "1")


def _mem(vm: VmView, device: str) -> JsonObject:
    found: JsonObject = next(mem for mem in vm.status()["mem"] if mem["id"] == device)
    return found


def _pmem(vm: VmView, device: str) -> JsonObject:
    found: JsonObject = next(pmem for pmem in vm.status()["pmem"] if pmem["id"] == device)
    return found


def _aged(balloon: JsonObject) -> JsonObject:
    """The guest's statistics, and how old they are."""
    if not balloon["stats"]:
        return {}
    age_s = max(0, round(time.time() - balloon["stats_received_s"]))
    return {**balloon["stats"], "age_s": age_s}


def _described(device: DeviceSocket) -> JsonObject:
    described = asdict(device) | {"path": str(device.path)}
    if device.window is not None and device.window.file is not None:
        described["window"]["file"] = str(device.window.file)
    return described


def _mem_settled(mem: JsonObject) -> bool:
    """The guest is there, and the host has got back what was unplugged."""
    return bool(mem["reached"]) and mem["discarding"] == 0


def _mem_standing(vm: VmView, device: str) -> str:
    """Where a memory device's guest stands, and why."""
    mem = _mem(vm, device)
    return f"{device} is at {mem['plugged']} bytes of {mem['requested']}: {mem['standing']}"


def _memory_settled(status: JsonObject) -> bool:
    """As near as a guest with 64 KiB pages gets, and nothing is being taken back any more."""
    usable, goal = status["usable"], status["usable_goal"]
    if usable is None or any(mem["discarding"] for mem in status["mem"]):
        return False
    has_balloon = "balloon" in status
    slack = 15 * BALLOON_PAGE_SIZE if has_balloon else max(m["block_size"] for m in status["mem"])
    return goal is not None and abs(usable - goal) <= slack


def _memory_standing(vm: VmView) -> list[str]:
    status = vm.status()
    lines = [f"the guest has {status['usable']} bytes"]
    lines += [_mem_standing(vm, mem["id"]) for mem in status["mem"] if not _mem_settled(mem)]
    if "balloon" in status and not status["balloon"]["reached"]:
        balloon = status["balloon"]
        lines.append(f"the balloon is at {balloon['actual']} bytes of {balloon['target']}")
    return lines


class _Handlers:
    """One method for each verb, of the verb's name."""

    def __init__(self, daemon: Daemon, *, writable: bool) -> None:
        self._daemon = daemon
        self._writable = writable

    async def list_vms(self, request: Request) -> Response:
        return json_response([vm.status() for vm in self._daemon.vms().values()])

    async def show_vm(self, request: Request) -> Response:
        return json_response(self._vm(request).status())

    async def list_devices(self, request: Request) -> Response:
        return json_response([_described(device) for device in self._vm(request).devices])

    async def show_balloon(self, request: Request) -> Response:
        return json_response(self._balloon(request)())

    async def set_balloon(self, request: Request) -> Response:
        balloon = self._balloon(request)
        body = await _read_body(request, BalloonTarget)
        size = _size("target", body.target)
        await self._vm(request).changes.set_balloon_target(size)
        if body.wait_s is not None:
            await self._wait(
                request,
                lambda: bool(balloon()["reached"]),
                body.wait_s,
                lambda: f"the guest is at {balloon()['actual']} bytes of {balloon()['target']}",
            )
        return json_response(balloon())

    async def show_statistics(self, request: Request) -> Response:
        balloon = self._balloon(request)
        if _flag(request, "fresh"):
            if not self._writable:
                _refuse_change()
            timeout_s = float(request.query_params.get("timeout_s", FRESH_TIMEOUT_DEFAULT_S))
            seen = balloon()["stats_updates"]
            await self._vm(request).changes.request_statistics()
            await self._wait(
                request,
                lambda: bool(balloon()["stats_updates"] != seen),
                timeout_s,
                lambda: "the guest sent no statistics",
            )
        return json_response(_aged(balloon()))

    async def hint(self, request: Request) -> Response:
        balloon = self._balloon(request)
        body = await _read_body(request, BalloonHint)
        await self._vm(request).changes.balloon_hint(body.action)
        return json_response(balloon()["hint"])

    async def list_mem(self, request: Request) -> Response:
        return json_response(self._vm(request).status()["mem"])

    async def resize_mem(self, request: Request) -> Response:
        vm = self._vm(request)
        body = await _read_body(request, MemResize)
        device = await vm.changes.resize_mem(body.device, _size("size", body.size))
        if body.wait_s is not None:
            await self._wait(
                request,
                lambda: _mem_settled(_mem(vm, device)),
                body.wait_s,
                lambda: _mem_standing(vm, device),
            )
        return json_response(_mem(vm, device))

    async def list_pmem(self, request: Request) -> Response:
        return json_response(self._vm(request).status()["pmem"])

    async def flush_pmem(self, request: Request) -> Response:
        vm = self._vm(request)
        body = await _read_body(request, PmemDevice)
        _go_and_wait(request)
        return json_response(_pmem(vm, await vm.changes.flush_pmem(body.device)))

    async def drop_pmem_cache(self, request: Request) -> Response:
        vm = self._vm(request)
        body = await _read_body(request, PmemDevice)
        _go_and_wait(request)
        return json_response(await vm.changes.drop_pmem_cache(body.device))

    async def clear_pmem(self, request: Request) -> Response:
        vm = self._vm(request)
        body = await _read_body(request, PmemDevice)
        return json_response(_pmem(vm, await vm.changes.clear_pmem(body.device)))

    async def set_memory(self, request: Request) -> Response:
        vm = self._vm(request)
        body = await _read_body(request, MemorySize)
        plan = await vm.changes.set_memory(_size("size", body.size))
        if body.wait_s is not None:
            await self._wait(
                request,
                lambda: _memory_settled(vm.status()),
                body.wait_s,
                lambda: "; ".join(_memory_standing(vm)),
            )
        return json_response(plan)

    async def stream_events(self, request: Request) -> Response:
        if not self._writable and self._daemon.events.subscribers >= SUBSCRIBERS_MAX:
            raise ApiError(
                503, f"{SUBSCRIBERS_MAX} listen already; that is the limit here", "too_many"
            )
        after = request.headers.get("last-event-id", "")
        if after and not (after.isascii() and after.isdigit() and len(after) < 20):
            raise ApiError(400, "Last-Event-ID is a number", "bad_parameter")
        recent = _flag(request, "recent")
        follow = request.query_params.get("follow") != "0"
        if follow:
            _go_and_wait(request)
        return EventStreamResponse(
            self._daemon.events,
            vm=request.query_params.get("vm"),
            after=int(after) if after else (0 if recent else None),
            follow=follow,
        )

    async def describe(self, request: Request) -> Response:
        return json_response(openapi())

    async def metrics(self, request: Request) -> Response:
        statuses = [vm.status() for vm in self._daemon.vms().values()]
        return Response(metrics_text(statuses), media_type=CONTENT_TYPE)

    def _vm(self, request: Request) -> VmView:
        name: str = request.path_params["vm"]
        vm = self._daemon.vms().get(name)
        if vm is None:
            raise ApiError(404, f"no VM is called {name!r}", "no_such_vm")
        return vm

    def _balloon(self, request: Request) -> Callable[[], JsonObject]:
        """Reads the VM's balloon status anew with each call."""
        vm = self._vm(request)
        status = vm.status()
        if "balloon" not in status:
            if paused := status.get("paused"):
                raise ApiError(
                    409, f"VM {request.path_params['vm']!r} is paused: {paused}", "paused"
                )
            raise ApiError(404, f"VM {request.path_params['vm']!r} has no balloon", "no_balloon")
        return lambda: vm.status()["balloon"]

    async def _wait(
        self,
        request: Request,
        condition: Callable[[], bool],
        timeout_s: float,
        failure: Callable[[], str],
    ) -> None:
        """Wait until `condition` holds; it is looked at whenever something happened."""
        if condition():
            return
        _go_and_wait(request)
        with self._daemon.events.subscribe() as subscription:
            async with trio.open_nursery() as nursery:
                # A client that goes away leaves nothing behind.
                nursery.start_soon(_until_gone, request, nursery.cancel_scope)
                with trio.move_on_after(timeout_s):
                    while not condition() and await subscription.receive():
                        pass
                nursery.cancel_scope.cancel()
        if condition():
            return
        if self._daemon.events.closed:
            raise ApiError(503, "the daemon is stopping", "stopping")
        raise ApiError(504, f"{failure()} after {timeout_s:g} s")


def _go_and_wait(request: Request) -> None:
    """What follows may take long: leave the connection's seat to others."""
    seat: Seat = request.state.seat
    name: str = request.path_params.get("vm", "")
    if not seat.wait(name):
        raise ApiError(503, "too many requests wait already; try again later", "too_many")


async def _until_gone(request: Request, scope: trio.CancelScope) -> None:
    """Cancel once the client has hung up; its body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
