"""The one table of the control API: method, path, who may call it, what goes in and comes out.

The application's routes and /openapi.json are both made from it. Holds no behaviour.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from vhostd import __version__
from vhostd.control.answers import (
    BalloonStatus,
    CacheDropped,
    DeviceDescription,
    HintStatus,
    MemoryPlan,
    MemStatus,
    PmemStatus,
    Problem,
    VmStatus,
)
from vhostd.control.interface import HintAction, JsonObject

WAIT_MAX_S: Final = 3600.0
_NUMBER: Final = re.compile(r"[0-9]+(\.[0-9]*)?")
FRESH_TIMEOUT_DEFAULT_S: Final = 5.0


class BalloonTarget(msgspec.Struct, forbid_unknown_fields=True):
    """Set the balloon's size; with wait_s, answer only once the guest reached it."""

    target: Annotated[int, Meta(ge=0)] | str
    wait_s: Annotated[float, Meta(ge=0, le=WAIT_MAX_S)] | None = None


class BalloonHint(msgspec.Struct, forbid_unknown_fields=True):
    """Open a free page hinting round, or break it off."""

    action: HintAction = HintAction.START


class MemResize(msgspec.Struct, forbid_unknown_fields=True):
    """Set the requested size of a memory device; with wait_s, answer only once it is plugged.

    device: its id; may be left out where there is only one.
    """

    size: Annotated[int, Meta(ge=0)] | str
    device: str | None = None
    wait_s: Annotated[float, Meta(ge=0, le=WAIT_MAX_S)] | None = None


class MemorySize(msgspec.Struct, forbid_unknown_fields=True):
    """Set the guest's usable memory; with wait_s, answer only once it has that much."""

    size: Annotated[int, Meta(ge=0)] | str
    wait_s: Annotated[float, Meta(ge=0, le=WAIT_MAX_S)] | None = None


class PmemDevice(msgspec.Struct, forbid_unknown_fields=True):
    """Which disk; may be left out where there is only one."""

    device: str | None = None


@dataclass(frozen=True, slots=True)
class Query:
    """One parameter of a query string; `schema` is JSON schema."""

    name: str
    summary: str
    schema: JsonObject

    def refusal(self, text: str) -> str | None:
        """Why a text can't be its value; None: it can."""
        if self.schema["type"] == "number":
            low, high = self.schema["minimum"], self.schema["maximum"]
            if not _NUMBER.fullmatch(text) or not low <= float(text) <= high:
                return f"{self.name} is a number, {low:g} to {high:g}, not {text[:40]!r}"
        elif text not in self.schema.get("enum", (text,)):
            return f"{self.name} is {' or '.join(self.schema['enum'])}, not {text[:40]!r}"
        return None


@dataclass(frozen=True, slots=True)
class Verb:
    """One request.

    Attributes:
        name: the handler's name in api.py, and the operationId.
        changes: refused on the read-only socket.
        body, answer: types of the JSON that goes in and comes out.
        media: what comes out where it isn't JSON.
    """

    method: str
    path: str
    name: str
    summary: str
    answer: Any = None
    body: type[msgspec.Struct] | None = None
    changes: bool = False
    query: tuple[Query, ...] = ()
    media: str = "application/json"

    def query_refusal(self, parameters: Iterable[tuple[str, str]]) -> str | None:
        """Why a request's query string is not as described; None: it is."""
        known = {query.name: query for query in self.query}
        seen: set[str] = set()
        for name, text in parameters:
            if name not in known:
                listed = ", ".join(known) or "none at all"
                return f"there is no parameter {name[:40]!r} here; known: {listed}"
            if name in seen:
                return f"{name} is given twice"
            seen.add(name)
            if reason := known[name].refusal(text):
                return reason
        return None


_FLAG: Final = {"type": "string", "enum": ["0", "1"]}
_SECONDS: Final = {"type": "number", "minimum": 0, "maximum": WAIT_MAX_S}

VERBS: Final = (
    Verb("GET", "/v1/vms", "list_vms", "All VMs.", answer=list[VmStatus]),
    Verb("GET", "/v1/vms/{vm}", "show_vm", "One VM.", answer=VmStatus),
    Verb(
        "GET",
        "/v1/vms/{vm}/devices",
        "list_devices",
        "Its devices, as a VMM's command line must describe them.",
        answer=list[DeviceDescription],
    ),
    Verb("GET", "/v1/vms/{vm}/balloon", "show_balloon", "Its balloon.", answer=BalloonStatus),
    Verb(
        "PUT",
        "/v1/vms/{vm}/balloon",
        "set_balloon",
        "Set the balloon's size: bytes, or text such as 512M.",
        body=BalloonTarget,
        answer=BalloonStatus,
        changes=True,
    ),
    Verb(
        "GET",
        "/v1/vms/{vm}/balloon/stats",
        "show_statistics",
        "What the guest says about its memory; age_s: how many seconds ago it did.",
        answer=dict[str, int],
        query=(
            Query("fresh", "1: ask the guest now (not on the read-only socket)", _FLAG),
            Query("timeout_s", "how long to wait for it", _SECONDS),
        ),
    ),
    Verb(
        "POST",
        "/v1/vms/{vm}/balloon/hint",
        "hint",
        "Open a free page hinting round, or break it off.",
        body=BalloonHint,
        answer=HintStatus,
        changes=True,
    ),
    Verb(
        "GET",
        "/v1/vms/{vm}/mem",
        "list_mem",
        "Its memory devices.",
        answer=list[MemStatus],
    ),
    Verb(
        "PUT",
        "/v1/vms/{vm}/mem",
        "resize_mem",
        "Set the requested size of a memory device: bytes, or text such as 2G.",
        body=MemResize,
        answer=MemStatus,
        changes=True,
    ),
    Verb("GET", "/v1/vms/{vm}/pmem", "list_pmem", "Its disks.", answer=list[PmemStatus]),
    Verb(
        "POST",
        "/v1/vms/{vm}/pmem/flush",
        "flush_pmem",
        "Make all that was written to a disk durable.",
        body=PmemDevice,
        answer=PmemStatus,
        changes=True,
    ),
    Verb(
        "POST",
        "/v1/vms/{vm}/pmem/drop-cache",
        "drop_pmem_cache",
        "Make a disk durable and give its page cache back to the host.",
        body=PmemDevice,
        answer=CacheDropped,
        changes=True,
    ),
    Verb(
        "POST",
        "/v1/vms/{vm}/pmem/clear",
        "clear_pmem",
        "Let flushes succeed again, after a failure was seen to.",
        body=PmemDevice,
        answer=PmemStatus,
        changes=True,
    ),
    Verb(
        "PUT",
        "/v1/vms/{vm}/memory",
        "set_memory",
        "Set the guest's usable memory, with memory devices first and the balloon for the rest.",
        body=MemorySize,
        answer=MemoryPlan,
        changes=True,
    ),
    Verb(
        "GET",
        "/v1/events",
        "stream_events",
        "Everything that happens, as server-sent events; Last-Event-ID is honoured.",
        query=(
            Query("vm", "only this VM's", {"type": "string"}),
            Query("recent", "1: begin with the latest events", _FLAG),
            Query("follow", "0: end instead of waiting for more", _FLAG),
        ),
        media="text/event-stream",
    ),
    Verb(
        "GET",
        "/openapi.json",
        "describe",
        "This description.",
        answer=dict[str, Any],
    ),
    Verb("GET", "/metrics", "metrics", "Prometheus text.", media="text/plain"),
)


def openapi() -> JsonObject:
    """The API's description, OpenAPI 3.1."""
    types = [item for verb in VERBS for item in (verb.body, verb.answer) if item is not None]
    schemas, components = msgspec.json.schema_components(
        [*types, Problem], ref_template="#/components/schemas/{name}"
    )
    of_type = dict(zip(map(repr, [*types, Problem]), schemas, strict=True))
    paths: dict[str, JsonObject] = {}
    for verb in VERBS:
        paths.setdefault(verb.path, {})[verb.method.lower()] = _operation(verb, of_type)
    return {
        "openapi": "3.1.0",
        "info": {"title": "vhostd control API", "version": __version__},
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(verb: Verb, of_type: dict[str, JsonObject]) -> JsonObject:
    content: JsonObject = {"schema": {"type": "string"}}
    if verb.answer is not None:
        content = {"schema": of_type[repr(verb.answer)]}
    failure = {"application/problem+json": {"schema": of_type[repr(Problem)]}}
    operation: JsonObject = {
        "operationId": verb.name,
        "summary": verb.summary,
        "responses": {
            "200": {"description": "Done.", "content": {verb.media: content}},
            "default": {"description": "Not done.", "content": failure},
        },
    }
    parameters = [
        {"name": "vm", "in": "path", "required": True, "schema": {"type": "string"}}
        for _ in range(verb.path.count("{vm}"))
    ]
    parameters += [
        {
            "name": query.name,
            "in": "query",
            "description": query.summary,
            "schema": query.schema,
        }
        for query in verb.query
    ]
    if parameters:
        operation["parameters"] = parameters
    if verb.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": of_type[repr(verb.body)]}},
        }
    return operation
