"""H97 as far as a session decides it: windows of the config space and kinds of writes."""

from __future__ import annotations

import pytest
from vhostd.protocol.features import BACKEND_PROTOCOL_FEATURES
from vhostd.protocol.requests import Request
from vhostd.session import actions

from tests.fakes import messages
from tests.session.conversation import (
    Conversation,
)

ALL = BACKEND_PROTOCOL_FEATURES


def test_config_space_is_read_and_written_through_the_shell() -> None:
    talk = Conversation()
    talk.negotiate()
    talk.take()

    answer = talk.send(Request.GET_CONFIG, messages.config(4, bytes(8), 0))
    assert answer == messages.config(4, b"\xc0" * 8, 0)
    assert talk.ack(Request.SET_CONFIG, messages.config(0, bytes(range(16)), 0)) == 0
    assert talk.ack(Request.SET_CONFIG, messages.config(4, b"live", 1)) == 0

    assert talk.take() == [
        actions.GetConfig(4, 8),
        actions.SetConfig(0, bytes(range(16)), migration=False),
        actions.SetConfig(4, b"live", migration=True),
    ]


@pytest.mark.parametrize(
    "payload",
    [
        messages.config(0, bytes(17)),
        messages.config(16, bytes(1)),
        messages.config(0xFFFF_FFFF, bytes(16)),
        messages.config(0, b""),
        messages.config(0, bytes(16), 0, 15),
        messages.config(0, bytes(16), 0, 0xFFFF_FFFF),
    ],
)
def test_config_space_outside_the_device_is_refused(payload: bytes) -> None:
    """H97. Size 0 in the reply is how GET_CONFIG says no."""
    talk = Conversation()
    talk.negotiate()
    talk.take()

    answer = talk.send(Request.GET_CONFIG, payload)
    assert answer is not None
    assert len(answer) == 12
    assert messages.unpack_config(answer)[1] == 0
    assert talk.ack(Request.SET_CONFIG, payload) == 1
    assert talk.take() == []


@pytest.mark.parametrize("flags", [2, 3, 0xFFFF_FFFF])
def test_config_writes_of_unknown_kind_are_refused(flags: int) -> None:
    """H97."""
    talk = Conversation()
    talk.negotiate()

    assert talk.ack(Request.SET_CONFIG, messages.config(0, bytes(16), flags)) == 1
