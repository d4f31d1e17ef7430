"""A state memfd gives back what was committed, whole, whenever its writer died."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vhostd.errors import HostError, VhostdError
from vhostd.fds import OwnedFd
from vhostd.handover import state_memfd
from vhostd.handover.state_memfd import (
    CAPACITY_MAX,
    StateDamaged,
    StateMemfd,
    StateTooLarge,
    StateVersionUnknown,
)

from tests.keeper.keeping import ROOT
from tests.transport.sockets import no_leak

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
PAYLOADS = st.binary(max_size=40)
KILLS = 20

COMMIT_FOR_EVER = """
import itertools, sys
from vhostd.fds import OwnedFd
from vhostd.handover.state_memfd import StateMemfd
state = StateMemfd.adopt(OwnedFd(int(sys.argv[1])))
for number in itertools.count(state.sequence + 1):
    state.write(number.to_bytes(8, "big") * (number % 5000))
    if number == state.sequence and not number % 50:
        sys.stdout.buffer.write(b"x"); sys.stdout.flush()
"""


def contents(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def sealed(image: bytes, seals: int = SEALS) -> OwnedFd:
    """A memfd of these bytes."""
    fd = OwnedFd(os.memfd_create("image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    os.write(fd.fileno(), image)
    fcntl.fcntl(fd.fileno(), fcntl.F_ADD_SEALS, seals)
    return fd


def read_image(image: bytes) -> bytes | None:
    """What a successor reads from these bytes."""
    with closing(StateMemfd.adopt(sealed(image))) as state:
        return state.read()


@contextmanager
def state_of(capacity: int, payloads: Sequence[bytes] = ()) -> Iterator[StateMemfd]:
    with closing(StateMemfd.create("vm", capacity)) as state:
        for payload in payloads:
            state.write(payload)
        yield state


class Writes:
    """Watches the writes of a commit: every file that a death amid them could leave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images: list[bytes] = []
        self._pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", self._torn)

    def _torn(self, fd: int, data: bytes, offset: int) -> int:
        before = contents(fd)
        for length in range(len(data)):
            image = before[:offset] + data[:length] + before[offset + length :]
            self.images.append(image)
        return self._pwrite(fd, data, offset)


@pytest.mark.parametrize("commits", [1, 2, 3])
def test_a_write_torn_at_any_byte_leaves_the_last_payload(
    monkeypatch: pytest.MonkeyPatch, commits: int
) -> None:
    payloads = [b"first payload", b"the second, a longer one", b"3", b"and a fourth"]
    with state_of(40, payloads[:commits]) as state:
        with monkeypatch.context() as patched:
            writes = Writes(patched)
            state.write(payloads[commits])
        assert len(writes.images) == 16 + len(payloads[commits]) + 16
        for image in writes.images:
            assert read_image(image) == payloads[commits - 1]
        assert read_image(contents(state.fileno())) == payloads[commits]


@given(PAYLOADS, PAYLOADS, PAYLOADS)
def test_a_file_torn_at_any_byte_has_one_payload_or_the_other(
    first: bytes, second: bytes, third: bytes
) -> None:
    """Not in the order of our writes: the bytes of the next commit from the front, the rest old."""
    with state_of(40, [first, second]) as state:
        before = contents(state.fileno())
        state.write(third)
        after = contents(state.fileno())
    for cut in range(len(before) + 1):
        assert read_image(after[:cut] + before[cut:]) in (second, third)


@given(st.lists(PAYLOADS, min_size=1, max_size=4), st.data())
def test_flipped_bits_never_give_other_bytes(payloads: list[bytes], data: st.DataObject) -> None:
    with state_of(40, payloads) as state:
        image = bytearray(contents(state.fileno()))
    last, previous = payloads[-1], payloads[-2] if len(payloads) > 1 else None
    for bit in data.draw(st.lists(st.integers(0, len(image) * 8 - 1), min_size=1, max_size=3)):
        image[bit // 8] ^= 1 << bit % 8
    with suppress(StateDamaged, StateVersionUnknown):
        assert read_image(bytes(image)) in (last, previous)


def test_every_single_bit_of_the_only_payload_is_checked() -> None:
    with state_of(8, [b"only one"]) as state:
        image = contents(state.fileno())
    start = image.index(b"only one")
    for bit in range((start - 16) * 8, (start + 8) * 8):
        flipped = bytearray(image)
        flipped[bit // 8] ^= 1 << bit % 8
        if flipped[start - 16 : start - 8] == bytes(8):
            continue  # sequence number 1 less its bit: a slot that was never used
        with pytest.raises(StateDamaged, match="no slot is whole"):
            read_image(bytes(flipped))


@given(st.integers(1, 5000), st.data())
def test_any_payload_up_to_the_capacity_comes_back(capacity: int, data: st.DataObject) -> None:
    sizes = st.one_of(st.just(capacity), st.just(0), st.integers(0, capacity))
    with state_of(capacity) as state:
        assert state.read() is None
        for number in range(1, 4):
            payload = bytes([number]) * data.draw(sizes)
            state.write(payload)
            assert state.read() == payload
            assert state.sequence == number
            with closing(StateMemfd.adopt(OwnedFd(os.dup(state.fileno())))) as successor:
                assert successor.read() == payload
                assert (successor.capacity, successor.sequence) == (capacity, number)


def test_a_successor_s_commit_leaves_its_predecessor_s_payload_alone() -> None:
    with state_of(10, [b"one", b"two"]) as state:
        fd = OwnedFd(os.dup(state.fileno()))
    with closing(StateMemfd.adopt(fd)) as successor:
        successor.write(b"three")
        image = contents(successor.fileno())
    assert b"two" in image
    assert b"one" not in image
    assert read_image(image) == b"three"


def test_a_payload_too_large_changes_nothing() -> None:
    with state_of(10, [b"kept"]) as state:
        before = contents(state.fileno())
        with pytest.raises(StateTooLarge, match="11 bytes, there is room for 10"):
            state.write(b"x" * 11)
        assert contents(state.fileno()) == before


def test_a_failed_write_leaves_the_last_payload_and_the_next_one_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pwrite = os.pwrite
    with state_of(10, [b"one", b"two"]) as state:
        for failing in range(3):
            calls = iter(range(3))

            def refuse(
                fd: int, data: bytes, offset: int, failing: int = failing, calls: object = calls
            ) -> int:
                assert isinstance(calls, Iterator)
                if next(calls) == failing:
                    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
                return pwrite(fd, data, offset)

            with monkeypatch.context() as patched:
                patched.setattr(os, "pwrite", refuse)
                with pytest.raises(HostError, match="cannot be written"):
                    state.write(b"three")
            assert state.read() == b"two"
        state.write(b"three")
        assert state.read() == b"three"


def test_writes_that_the_kernel_cuts_short_are_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    with state_of(50, [b"all of a longer payload"]) as state:
        assert state.read() == b"all of a longer payload"


def test_its_size_is_sealed() -> None:
    with state_of(10) as state:
        assert fcntl.fcntl(state.fileno(), fcntl.F_GET_SEALS) & SEALS == SEALS
        for size in (0, 1 << 20):
            with pytest.raises(PermissionError):
                os.ftruncate(state.fileno(), size)


def test_a_grown_one_has_the_content_and_counts_as_later() -> None:
    with state_of(10, [b"one", b"two"]) as state, closing(state.grown(1000)) as larger:
        assert (larger.read(), larger.capacity) == (b"two", 1000)
        assert larger.sequence > state.sequence
        larger.write(b"x" * 1000)
        assert larger.read() == b"x" * 1000
        assert state.read() == b"two"
        link = os.readlink(f"/proc/self/fd/{larger.fileno()}")  # noqa: PTH115
        assert link == "/memfd:vm (deleted)"
        with pytest.raises(ValueError, match="capacity 2 for 3 bytes"):
            state.grown(2)
    with state_of(10) as empty, closing(empty.grown(20)) as larger:
        assert larger.read() is None


@pytest.mark.parametrize("capacity", [0, -1, CAPACITY_MAX + 1])
def test_no_capacity_out_of_bounds(capacity: int) -> None:
    with pytest.raises(ValueError, match="capacity"):
        StateMemfd.create("vm", capacity)


def test_a_length_beyond_the_slot_is_not_read_even_if_its_checksum_fits() -> None:
    with state_of(10, [b"one"]) as state:
        image = bytearray(contents(state.fileno()))
    payload = bytes(image[64 + 16 :][:20])
    image[64:80] = struct.pack("<QII", 9, 20, state_memfd._checksum(9, payload))
    with pytest.raises(StateDamaged):
        read_image(bytes(image))


def image_of(version: int, capacity: int, size: int) -> bytes:
    return state_memfd._header(version, capacity).ljust(size, b"\0")


GOOD_SIZE = 64 + 2 * 64  # of capacity 10

REFUSED = {
    "empty": (b"", SEALS, StateDamaged, "0 bytes are no header"),
    "short": (b"vhostdST\x01", SEALS, StateDamaged, "9 bytes are no header"),
    "else": (b"\x7fELF".ljust(999), SEALS, StateDamaged, "does not begin as one"),
    "newer": (image_of(2, 10, GOOD_SIZE), SEALS, StateVersionUnknown, "version 2, .* reads 1"),
    "older": (image_of(0, 10, GOOD_SIZE), SEALS, StateVersionUnknown, "version 0"),
    "small": (image_of(1, 10, GOOD_SIZE - 1), SEALS, StateDamaged, "191 bytes for a capacity"),
    "large": (image_of(1, 10, GOOD_SIZE + 1), SEALS, StateDamaged, "193 bytes for a capacity"),
    "nothing": (image_of(1, 0, GOOD_SIZE), SEALS, StateDamaged, "capacity of 0"),
    "greedy": (image_of(1, 2**64 - 1, GOOD_SIZE), SEALS, StateDamaged, "capacity of 18446744"),
    "unsealed": (image_of(1, 10, GOOD_SIZE), 0, StateDamaged, "do not fix its size"),
    "half sealed": (
        image_of(1, 10, GOOD_SIZE), SEALS & ~fcntl.F_SEAL_GROW, StateDamaged, "do not fix its size",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("image", "seals", "kind", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_what_create_did_not_make_is_refused_and_closed(
    image: bytes, seals: int, kind: type[VhostdError], text: str
) -> None:
    with no_leak():
        with pytest.raises(kind, match=text) as caught:
            StateMemfd.adopt(sealed(image, seals))
        assert "\n" not in str(caught.value)
        del caught


def test_the_good_image_of_these_is_taken() -> None:
    assert read_image(image_of(1, 10, GOOD_SIZE)) is None


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_PATH])
def test_other_files_are_refused(flags: int) -> None:
    with no_leak():
        for fd in (os.open(os.devnull, flags), os.eventfd(0)):
            owned = OwnedFd(fd)
            with pytest.raises(StateDamaged):
                StateMemfd.adopt(owned)
            assert owned.closed


def test_a_writer_that_is_killed_leaves_a_whole_payload() -> None:
    with state_of(8 * 5000, [b""]) as state:
        before = state.sequence
        for _ in range(KILLS):
            with subprocess.Popen(
                [sys.executable, "-S", "-c", COMMIT_FOR_EVER, str(state.fileno())],
                pass_fds=[state.fileno()],
                stdout=subprocess.PIPE,
                env={"PYTHONPATH": str(ROOT)},
            ) as writer:
                assert writer.stdout is not None
                writer.stdout.read(1)
                writer.send_signal(signal.SIGKILL)
                writer.wait()
            with closing(StateMemfd.adopt(OwnedFd(os.dup(state.fileno())))) as successor:
                number = successor.sequence
                assert successor.read() == number.to_bytes(8, "big") * (number % 5000)
                assert number > before
                before = number
