"""The control API as any HTTP client meets it, over real UNIX sockets."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from http import HTTPStatus
from threading import Thread

import httpx
import msgspec
import pytest
from vhostd.control import bodies
from vhostd.control.answers import Problem
from vhostd.control.bodies import BODY_SIZE_MAX
from vhostd.control.verbs import VERBS
from vhostd.units import GiB, MiB

from tests.control.daemon import RunningDaemon


def error_of(answer: httpx.Response) -> str:
    """The line for a person, of an answer that is a whole problem (RFC 9457)."""
    assert answer.headers["content-type"] == "application/problem+json"
    told = msgspec.convert(answer.json(), Problem, strict=True)
    assert (told.status, told.title) == (answer.status_code, HTTPStatus(told.status).phrase)
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", told.code)
    assert "\n" not in told.detail
    assert told.error == told.detail
    return told.detail


def test_status_is_the_contracts_object_in_bytes(http: httpx.Client) -> None:
    status = http.get("/v1/vms/web").json()
    assert list(status)[:5] == ["vm", "state", "balloon", "mem", "pmem"]
    assert (status["vm"], status["state"]) == ("web", "running")
    balloon = status["balloon"]
    assert balloon["inflated"] == 2 * 4096
    assert balloon["stats"] == {"free_memory": 1, "total_memory": GiB}
    assert [vm["vm"] for vm in http.get("/v1/vms").json()] == ["web", "idle"]


@pytest.mark.parametrize("target", [512 * MiB, "512M", "0.5GiB"])
def test_a_target_is_bytes_or_a_size(http: httpx.Client, target: object) -> None:
    answer = http.put("/v1/vms/web/balloon", json={"target": target})
    assert answer.status_code == 200
    assert answer.json()["target"] == 512 * MiB
    assert http.get("/v1/vms/web/balloon").json()["target"] == 512 * MiB


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"target": "lots"}, 400, "is not a size"),
        ({"target": -1}, 400, "target"),
        ({"target": 1.5}, 400, "target"),
        ({"target": None}, 400, "target"),
        ({}, 400, "target"),
        ({"target": 0, "wait_s": -1}, 400, "wait_s"),
        ({"target": 0, "surprise": 1}, 400, "surprise"),
        ({"target": "2G"}, 409, "1 GiB of RAM"),
        ({"target": 2**80}, 409, "pages of 4 KiB"),
    ],
)
def test_a_target_that_cannot_be_is_refused_with_a_reason(
    http: httpx.Client, body: object, status: int, reason: str
) -> None:
    answer = http.put("/v1/vms/web/balloon", json=body)
    assert answer.status_code == status
    assert reason in error_of(answer)
    assert http.get("/v1/vms/web/balloon").json()["target"] == 0


@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xfe{",
        b'{"target": "\xff"}',
        b"[" * (BODY_SIZE_MAX - 1),
        b'{"x":' * (BODY_SIZE_MAX // 6),
        b"nul",
        b"{",
        b'{"target": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_body_that_is_no_json_is_a_bad_request(http: httpx.Client, body: bytes) -> None:
    answer = http.put("/v1/vms/web/balloon", content=body)
    assert answer.status_code == 400
    assert error_of(answer)


def test_a_body_that_never_comes_ends_the_request(
    served: RunningDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.1)
    with socket.socket(socket.AF_UNIX) as slow:
        slow.settimeout(20)
        slow.connect(str(served.addresses.control))
        slow.sendall(b"PUT /v1/vms/web/balloon HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert slow.recv(65536).startswith(b"HTTP/1.1 408 ")


def test_a_body_too_large_is_not_read_to_its_end(http: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1 << 14):
            yield b" " * 65536

    try:
        answer = http.put("/v1/vms/web/balloon", content=endless())
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        pass  # refused before we were through with sending: legal as well
    else:
        assert answer.status_code == 413
    assert http.get("/v1/vms/web").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/vms/absent", 404),
        ("GET", "/v1/vms/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/v1/vms/%ff", 404),
        ("GET", "/v1/vms/we%0ab", 404),
        ("GET", "/", 404),
        ("GET", "/v2/vms", 404),
        ("DELETE", "/v1/vms/web", 405),
        ("PUT", "/v1/vms/absent/balloon", 404),
        ("GET", "/v1/vms/web/balloon/stats?fresh=yes", 400),
        *(
            ("GET", f"/v1/vms/web/balloon/stats?fresh=1&timeout_s={text}", 400)
            for text in ("nan", "-1", "inf", "1e3", "3601", "", "%2B1", "0x1", "1_0", "9" * 5000)
        ),
        ("GET", "/v1/vms/web/balloon/stats?timeout_s=-1", 400),  # also where it is not used
        ("GET", "/v1/vms/web/balloon/stats?fresh=1&fresh=1", 400),
        ("GET", "/v1/vms?surprise=1", 400),
        ("GET", "/v1/events?follow=2", 400),
    ],
)
def test_a_request_for_nothing_we_have_is_one_line_of_json(
    http: httpx.Client, method: str, path: str, status: int
) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    assert error_of(answer)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/vms/web", "GET, HEAD"),
        ("POST", "/v1/vms/web/balloon", "GET, HEAD, PUT"),
        ("GET", "/v1/vms/web/pmem/flush", "POST"),
        ("PATCH", "/v1/events", "GET, HEAD"),
    ],
)
def test_a_method_that_a_path_does_not_know_is_told_those_it_knows(
    http: httpx.Client, read_only: httpx.Client, method: str, path: str, allowed: str
) -> None:
    """RFC 9110, 15.5.6: 405 carries Allow."""
    for client in (http, read_only):
        answer = client.request(method, path)
        assert answer.status_code == 405
        assert answer.headers["allow"] == allowed
        assert allowed in error_of(answer)


def test_the_read_only_socket_reads_and_refuses_every_change(
    read_only: httpx.Client, http: httpx.Client
) -> None:
    assert read_only.get("/v1/vms/web").status_code == 200
    for verb in VERBS:
        if verb.changes:
            path = verb.path.replace("{vm}", "web")
            answer = read_only.request(verb.method, path, json={"target": 4096})
            assert answer.status_code == 403
            assert "control.sock" in error_of(answer)
    assert read_only.get("/v1/vms/web/balloon/stats?fresh=1").status_code == 403
    assert http.get("/v1/vms/web/balloon").json()["target"] == 0


def test_the_sockets_modes_say_who_may_change_what(served: RunningDaemon) -> None:
    assert served.addresses.control.stat().st_mode & 0o777 == 0o600
    assert served.addresses.read_only.stat().st_mode & 0o777 == 0o666


def test_fresh_statistics_are_newer_than_the_request(
    http: httpx.Client, served: RunningDaemon
) -> None:
    old = http.get("/v1/vms/web/balloon/stats").json()
    assert old["free_memory"] == 1
    assert http.get("/v1/vms/web/balloon/stats?fresh=1").json()["free_memory"] == 2
    assert http.get("/v1/vms/web/balloon/stats").json()["free_memory"] == 2


def test_statistics_say_how_old_they_are(http: httpx.Client, served: RunningDaemon) -> None:
    served.daemon.web.balloon.statistics.received_s = time.time() - 3600
    assert 3600 <= http.get("/v1/vms/web/balloon/stats").json()["age_s"] <= 3660
    assert http.get("/v1/vms/web/balloon/stats?fresh=1").json()["age_s"] <= 60
    served.daemon.web.balloon.statistics.latest = {}
    assert http.get("/v1/vms/web/balloon/stats").json() == {}


def test_a_guest_that_sends_no_statistics_is_a_timeout(
    http: httpx.Client, served: RunningDaemon
) -> None:
    served.daemon.web.answers_statistics = False
    answer = http.get("/v1/vms/web/balloon/stats?fresh=1&timeout_s=0.1")
    assert answer.status_code == 504
    assert "no statistics" in error_of(answer)


def test_statistics_of_a_guest_that_does_not_run_are_refused(http: httpx.Client) -> None:
    answer = http.get("/v1/vms/idle/balloon/stats?fresh=1")
    assert answer.status_code == 409
    assert "the VM is paused" in error_of(answer)


def test_waiting_for_a_target_ends_when_the_guest_is_there(
    http: httpx.Client, served: RunningDaemon
) -> None:
    with http.stream("GET", "/v1/events") as events:
        lines = events.iter_lines()
        next(lines)
        answers: list[httpx.Response] = []
        body = {"target": MiB, "wait_s": 10}
        transport = httpx.HTTPTransport(uds=str(served.addresses.control))
        with httpx.Client(transport=transport, base_url="http://vhostd") as other:
            asking = Thread(
                target=lambda: answers.append(
                    other.put("/v1/vms/web/balloon", json=body, timeout=20)
                )
            )
            asking.start()
            assert any(line == "event: balloon_target" for line in lines)
            assert answers == []
            served.do(lambda: served.daemon.web.reach(MiB))
            asking.join(20)
    assert answers[0].json()["actual"] == MiB


def test_waiting_for_a_guest_that_never_gets_there_is_a_timeout(http: httpx.Client) -> None:
    answer = http.put("/v1/vms/web/balloon", json={"target": MiB, "wait_s": 0.1})
    assert answer.status_code == 504
    assert "at 0 bytes of 1048576" in error_of(answer)


def test_a_hinting_round_is_opened_and_broken_off(http: httpx.Client) -> None:
    assert http.post("/v1/vms/web/balloon/hint").json()["phase"] == "requested"
    assert http.post("/v1/vms/web/balloon/hint", json={}).status_code == 409
    stopped = http.post("/v1/vms/web/balloon/hint", json={"action": "stop"})
    assert stopped.json()["phase"] == "idle"
    assert http.post("/v1/vms/web/balloon/hint", json={"action": "?"}).status_code == 400


def read_events(answer: httpx.Response) -> Iterator[dict[str, object]]:
    for line in answer.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def test_events_arrive_as_they_happen_and_name_vm_and_sizes(
    http: httpx.Client, served: RunningDaemon
) -> None:
    with http.stream("GET", "/v1/events") as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        lines = answer.iter_lines()
        assert next(lines) == ": vhostd events"
        served.do(lambda: served.daemon.web.reach(MiB))
        block = [next(lines) for _ in range(4)]
    assert block[1].startswith("id: ")
    assert block[2] == "event: balloon_actual"
    event = json.loads(block[3].removeprefix("data: "))
    assert (event["vm"], event["actual"], event["time_s"]) == ("web", MiB, 1000.0)


def test_the_past_is_told_from_where_a_client_left_off(http: httpx.Client) -> None:
    for size in (4096, 8192):
        http.put("/v1/vms/web/balloon", json={"target": size})
    with http.stream("GET", "/v1/events?recent=1&follow=0&vm=web") as answer:
        past = list(read_events(answer))
    targets = [event for event in past if event["event"] == "balloon_target"]
    assert [event["target"] for event in targets] == [4096, 8192]
    headers = {"Last-Event-ID": str(targets[0]["id"])}
    with http.stream("GET", "/v1/events?follow=0", headers=headers) as answer:
        assert [event["id"] for event in read_events(answer)] == [targets[1]["id"]]


def test_the_api_describes_every_verb_it_has(http: httpx.Client) -> None:
    described = http.get("/openapi.json").json()
    assert described["openapi"] == "3.1.0"
    listed = {
        (method.upper(), path) for path, item in described["paths"].items() for method in item
    }
    assert listed == {(verb.method, verb.path) for verb in VERBS}
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(described)))
    assert references == set(described["components"]["schemas"])


def test_every_answer_of_a_read_is_as_the_api_describes_it(http: httpx.Client) -> None:
    for verb in VERBS:
        if verb.changes or verb.answer is None:
            continue
        answer = http.request(verb.method, verb.path.replace("{vm}", "web"))
        assert answer.status_code == 200
        msgspec.convert(answer.json(), verb.answer)


def test_the_description_holds_every_key_of_a_real_status(http: httpx.Client) -> None:
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    status = http.get("/v1/vms/web").json()
    assert set(schemas["VmStatus"]["properties"]) == set(status)
    assert set(schemas["BalloonStatus"]["properties"]) == set(status["balloon"])
    assert set(schemas["MemStatus"]["properties"]) == set(status["mem"][0])
    assert set(schemas["PmemStatus"]["properties"]) == set(status["pmem"][0])
    dropped = http.post("/v1/vms/web/pmem/drop-cache").json()
    assert set(schemas["CacheDropped"]["properties"]) == set(dropped)
    mem = http.get("/v1/vms/web/devices").json()[1]
    assert set(schemas["DeviceDescription"]["properties"]) == set(mem)
    assert set(schemas["WindowDescription"]["properties"]) == set(mem["window"])
    queue = status["balloon"]["queues"]["inflate"]
    assert set(schemas["QueueCounters"]["properties"]) == set(queue)
    assert set(schemas["HintStatus"]["properties"]) == set(status["balloon"]["hint"])


def test_metrics_are_on_the_control_socket(http: httpx.Client) -> None:
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'vhostd_balloon_inflated_bytes{vm="web"} 8192.0' in answer.text
