"""H1 to H17 as far as bytes and descriptors alone decide them."""

from __future__ import annotations

import pytest
from vhostd.errors import FrontendError
from vhostd.protocol.framing import Framer, Message
from vhostd.protocol.requests import Request
from vhostd.protocol.wire import HEADER, PAYLOAD_SIZE_MAX

from tests.fakes import messages
from tests.fakes.messages import Flags, u64
from tests.protocol.streams import Watched, encoded, feed, watched

REGION = messages.WireRegion(0, 4096, 0, 0)
ADD_MEM_REG = encoded(Request.ADD_MEM_REG, messages.memory_slot(REGION), 0x9)
GET_FEATURES = encoded(Request.GET_FEATURES)


@pytest.mark.parametrize("cut", range(1, len(ADD_MEM_REG)))
def test_message_is_the_same_wherever_the_read_was_cut(cut: int) -> None:
    framer, file = Framer(), Watched()
    number = file.fd.fileno()
    found: list[Message] = []

    data, fds = ADD_MEM_REG[:cut], [file.fd]
    while data:
        wanted = framer.bytes_wanted()
        message = framer.receive(data[:wanted], fds)
        found += [message] if message else []
        data, fds = data[wanted:], []
    found += feed(framer, ADD_MEM_REG[cut:])

    (message,) = found
    assert (message.request, message.flags) == (Request.ADD_MEM_REG, 0x9)
    assert message.payload == ADD_MEM_REG[HEADER.size :]
    assert [fd.fileno() for fd in message.fds] == [number]
    assert message.fault is None
    assert framer.at_boundary


@pytest.mark.parametrize("cut", range(1, len(ADD_MEM_REG)))
def test_a_stream_that_ends_inside_a_message_is_broken(cut: int) -> None:
    """H1. The descriptor that came with the half message must not stay open."""
    framer, file = Framer(), Watched()
    feed(framer, ADD_MEM_REG[:cut], [file.fd])

    with pytest.raises(FrontendError) as caught:
        framer.end_of_stream()

    assert caught.value.fatal
    assert file.closed


def test_a_stream_may_end_between_messages() -> None:
    framer = Framer()
    feed(framer, GET_FEATURES)

    framer.end_of_stream()


def test_many_messages_in_one_write_come_out_in_order() -> None:
    """H12."""
    stream = b"".join(encoded(Request.SET_FEATURES, u64(number)) for number in range(10_000))

    found = feed(Framer(), stream)

    assert [message.payload for message in found] == [u64(number) for number in range(10_000)]


def test_never_asks_for_more_than_the_present_message() -> None:
    """A greedy read would hand this message the next one's descriptors."""
    framer = Framer()
    assert framer.bytes_wanted() == HEADER.size
    framer.receive(ADD_MEM_REG[:5])
    assert framer.bytes_wanted() == HEADER.size - 5
    framer.receive(ADD_MEM_REG[5:12])
    assert framer.bytes_wanted() == 40


@pytest.mark.parametrize("flags", [0, 2, 3, 4, 5, 0xC, 0xD])
def test_wrong_version_or_reply_bit_ends_the_stream(flags: int) -> None:
    """H8, H9."""
    framer, file = Framer(), Watched()

    with pytest.raises(FrontendError) as caught:
        feed(framer, encoded(Request.GET_FEATURES, flags=flags), [file.fd])

    assert caught.value.fatal
    assert file.closed


@pytest.mark.parametrize("size", [PAYLOAD_SIZE_MAX + 1, 0x7FFF_FFFF, 0xFFFF_FFFF])
def test_an_absurd_size_ends_the_stream_before_anything_is_read(size: int) -> None:
    """H3."""
    framer = Framer()

    with pytest.raises(FrontendError) as caught:
        framer.receive(messages.header(Request.SET_MEM_TABLE, Flags.VERSION, size))

    assert caught.value.fatal


def test_after_a_broken_stream_every_byte_is_refused() -> None:
    framer, file = Framer(), Watched()
    with pytest.raises(FrontendError):
        feed(framer, encoded(Request.GET_FEATURES, flags=0))

    with pytest.raises(FrontendError) as caught:
        framer.receive(b"\1", [file.fd])

    assert caught.value.fatal
    assert file.closed


def test_reserved_flag_bits_are_ignored() -> None:
    """H10."""
    (message,) = feed(Framer(), encoded(Request.GET_FEATURES, flags=0xFFFF_FFF9))

    assert message.fault is None
    assert message.needs_reply


@pytest.mark.parametrize("number", [0, 45, 0x7FFF_FFFF, 0xFFFF_FFFF])
@pytest.mark.parametrize("size", [0, 64])
def test_an_unknown_message_is_consumed_and_faulty(number: int, size: int) -> None:
    """H11."""
    framer, file = Framer(), Watched()

    found = feed(framer, encoded(number, bytes(size), 0x9) + GET_FEATURES, [file.fd])

    assert [message.request for message in found] == [number, Request.GET_FEATURES]
    assert found[0].fault == f"request {number}: no such message"
    assert file.closed


@pytest.mark.parametrize("size", [PAYLOAD_SIZE_MAX, 4096])
def test_an_oversized_payload_is_swallowed_whole(size: int) -> None:
    """H4: the next legal message works."""
    found = feed(Framer(), encoded(Request.SET_FEATURES, bytes(size)) + GET_FEATURES)

    assert found[0].fault == f"SET_FEATURES: payload of {size} bytes"
    assert found[1].fault is None


@pytest.mark.parametrize("count", [2, 32, 253])
def test_too_many_descriptors_are_closed_and_the_message_is_faulty(count: int) -> None:
    """H13, H15."""
    files = watched(count)

    (message,) = feed(Framer(), ADD_MEM_REG, [file.fd for file in files])

    assert message.fault == f"ADD_MEM_REG: {count} descriptors, 1 to 1 are legal"
    assert message.fds == ()
    assert all(file.closed for file in files)


def test_descriptors_nobody_asked_for_are_closed_and_the_message_is_good() -> None:
    """H14."""
    files = watched(4)

    (message,) = feed(Framer(), GET_FEATURES, [file.fd for file in files])

    assert message.fault is None
    assert all(file.closed for file in files)


@pytest.mark.parametrize("cut", [1, 11, 12, 30])
def test_descriptors_behind_the_first_byte_belong_to_no_message(cut: int) -> None:
    """H16."""
    framer, file = Framer(), Watched()
    feed(framer, ADD_MEM_REG[:cut])

    (message,) = feed(framer, ADD_MEM_REG[cut:], [file.fd])

    assert message.fault == "ADD_MEM_REG: 0 descriptors, 1 to 1 are legal"
    assert file.closed


def test_lost_descriptors_make_their_message_faulty_only() -> None:
    """H20: out of descriptors, the kernel delivers the bytes and drops what it cannot place."""
    framer, file = Framer(), Watched()

    framer.receive(ADD_MEM_REG[:12], [file.fd], fds_lost=True)
    message = framer.receive(ADD_MEM_REG[12:])
    (following,) = feed(framer, GET_FEATURES)

    assert message is not None
    assert message.fault == "ADD_MEM_REG: descriptors were lost on the way"
    assert file.closed
    assert following.fault is None


def test_lost_descriptors_of_a_message_without_any_do_not_matter() -> None:
    framer = Framer()

    message = framer.receive(GET_FEATURES, fds_lost=True)

    assert message is not None
    assert message.fault is None


def test_closing_a_framer_closes_what_is_half_received() -> None:
    framer, file = Framer(), Watched()
    feed(framer, ADD_MEM_REG[:20], [file.fd])

    framer.close()

    assert file.closed
