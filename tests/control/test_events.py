"""The event stream: bounded whatever happens, in order, and ended when the daemon ends."""

from __future__ import annotations

import json

import trio
from vhostd.control.events import HISTORY_MAX, LATEST_ONLY, PENDING_MAX, EventStream
from vhostd.devices.base import DeviceEvent


def test_names_of_which_only_the_latest_is_kept_are_names_devices_use() -> None:
    assert {DeviceEvent.BALLOON_ACTUAL, DeviceEvent.BALLOON_STATISTICS} == LATEST_ONLY


def test_an_event_is_one_json_line_and_its_fields_cannot_forge_its_head() -> None:
    stream = EventStream(clock=lambda: 7.5)
    stream.publish("web", "balloon_target", {"target": 4096, "vm": "other", "id": 99})
    (event,) = stream.history()
    assert b"\n" not in event.to_json()
    assert json.loads(event.to_json()) == {
        "id": 1,
        "time_s": 7.5,
        "vm": "web",
        "event": "balloon_target",
        "target": 4096,
    }


async def test_a_guest_that_writes_actual_a_thousand_times_is_one_pending_event() -> None:
    stream = EventStream()
    with stream.subscribe() as subscription:
        for actual in range(1000):
            stream.publish("web", "balloon_actual", {"actual": actual})
            stream.publish("db", "balloon_actual", {"actual": -actual})
        events = await subscription.receive()
    assert [(event.vm, event.fields["actual"]) for event in events] == [("web", 999), ("db", -999)]
    assert subscription.dropped == 0
    assert len(stream.history()) == 2


async def test_a_listener_that_does_not_read_loses_the_oldest_events() -> None:
    stream = EventStream()
    with stream.subscribe() as subscription:
        for number in range(PENDING_MAX + 10):
            stream.publish("web", "balloon_target", {"number": number})
        events = await subscription.receive()
    assert [event.fields["number"] for event in events] == list(range(10, PENDING_MAX + 10))
    assert subscription.dropped == 10
    assert len(stream.history()) == HISTORY_MAX


async def test_receiving_waits_for_the_next_event(autojump_clock: trio.testing.MockClock) -> None:
    stream = EventStream()
    with stream.subscribe() as subscription:
        stream.publish("web", "one", {})
        assert [event.name for event in await subscription.receive()] == ["one"]
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def publish_later() -> None:
                await trio.sleep(5)
                stream.publish("web", "two", {})

            assert [event.name for event in await subscription.receive()] == ["two"]


async def test_a_closed_stream_ends_every_subscription_after_what_is_pending() -> None:
    stream = EventStream()
    with stream.subscribe() as early:
        stream.publish("web", "last", {})
        stream.close()
        assert [event.name for event in await early.receive()] == ["last"]
        assert await early.receive() == []
        assert await early.receive() == []
    with stream.subscribe() as late:
        assert await late.receive() == []
    assert stream.subscribers == 0
