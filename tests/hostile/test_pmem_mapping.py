"""H104 to H106, and the image as shared memory: what the VMM is sent, when, and what it may answer.

QEMU crashes on a request that comes while its device is not started, so that silence counts.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.fakes import handshake
from tests.fakes.machine import Setup
from tests.fakes.memory import MIB
from tests.fakes.messages import (
    QEMU_GENERIC_DEVICE_ACKS,
    WITHDRAWN,
    BackendRequest,
    Flags,
    ProtocolFeature,
    Request,
    WireRegion,
)
from tests.hostile.pmem_machine import (
    IMAGE_ADDRESS,
    IMAGE_SIZE,
    PROMPT_S,
    RINGS,
    PmemDriver,
    PmemHost,
    PmemOracle,
    serves,
    setups,
)

GIB = 1 << 30
SHMEM_REGION = 1  # the device's feature bit
REGIONS_MAX = 256
SHMEM_CONFIG = struct.Struct(f"=II{REGIONS_MAX}Q")
WINDOW = f"0x{IMAGE_ADDRESS:x}"


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PmemOracle]:
    """A program and its idle state."""
    folder = tmp_path_factory.mktemp("mapping")
    host = PmemHost(folder, folder / "image")
    try:
        yield PmemOracle(host)
    finally:
        host.kill()


@pytest.fixture
def host(oracle: PmemOracle) -> Iterator[PmemHost]:
    """The same program; it is unharmed after the test."""
    yield oracle.host
    oracle.unharmed()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., PmemHost]]:
    """Start a program of the test's own."""
    started: list[PmemHost] = []

    def start(*options: str, size: int = IMAGE_SIZE) -> PmemHost:
        started.append(PmemHost(tmp_path, tmp_path / "image", *options, size=size))
        return started[-1]

    yield start
    for host in started:
        assert host.program.alive(), host.program.log()
        assert "Traceback" not in host.program.log(), host.program.log()
        host.kill()


# -- what is sent --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2 * MIB, 256 * MIB, 4 * GIB], ids=["2M", "256M", "4G"])
def test_shared_memory_is_one_region_as_large_as_the_disk(
    size: int, start: Callable[..., PmemHost]
) -> None:
    host = start(size=size)
    with host.realize() as guest:
        reply = guest.machine.front.ask(Request.GET_SHMEM_CONFIG)
        assert len(reply.payload) == 2056
        assert reply.payload == SHMEM_CONFIG.pack(1, 0, size, *(0,) * (REGIONS_MAX - 1))
        guest.machine.start()
        guest.receive_mapping(size)
        guest.answer()
        assert guest.told_nothing()


@setups(RINGS)
@pytest.mark.parametrize("readonly", [False, True], ids=["writable", "readonly"])
def test_the_vmm_is_handed_the_image_itself(
    setup: Setup, readonly: bool, start: Callable[..., PmemHost]
) -> None:
    host = start(*(["--readonly"] if readonly else []))
    with host.realize(setup) as guest:
        guest.machine.start()
        guest.receive_mapping(flags=0 if readonly else 1)
        given, image = os.fstat(guest.image_fd), host.image.stat()
        assert (given.st_dev, given.st_ino) == (image.st_dev, image.st_ino)
        access = fcntl.fcntl(guest.image_fd, fcntl.F_GETFL) & os.O_ACCMODE
        assert access == (os.O_RDONLY if readonly else os.O_RDWR)
        guest.answer()
        serves(guest)


def test_a_window_needs_no_request(start: Callable[..., PmemHost]) -> None:
    host = start("--mode=window", f"--window-address={WINDOW}")
    with host.realize() as guest:
        front = guest.machine.front
        assert not guest.machine.offer.protocol_features & ProtocolFeature.SHMEM_MAP
        assert not guest.machine.offer.features & SHMEM_REGION
        assert guest.machine.offer.config == struct.pack("<QQ", IMAGE_ADDRESS, IMAGE_SIZE)
        guest.machine.start()
        assert guest.told_nothing()
        with host.image.open("r+b") as file:
            region = WireRegion(IMAGE_ADDRESS, IMAGE_SIZE, IMAGE_ADDRESS, 0)
            assert front.add_mem_reg(region, file.fileno()) == 0
        assert host.status()["mapped"]
        serves(guest)


# -- when it is sent -----------------------------------------------------------------------------


@setups(RINGS)
def test_nothing_is_sent_before_the_device_is_started(setup: Setup, host: PmemHost) -> None:
    """QEMU has no device then, and crashes."""
    with host.realize(setup) as guest:
        machine, front = guest.machine, guest.machine.front
        (queue,) = machine.queues
        assert guest.told_nothing()
        assert front.set_features(machine.features) == 0
        assert guest.told_nothing()
        handshake.send_memory(front, machine.memory)
        assert guest.told_nothing()
        handshake.set_up_ring(front, machine.memory, 0, queue)
        assert guest.told_nothing()
        assert front.set_vring_enable(0, True) == 0
        guest.take_image()
        serves(guest)


@setups(RINGS)
def test_nothing_is_sent_between_a_stop_and_a_start(setup: Setup, host: PmemHost) -> None:
    with host.realize(setup) as guest:
        for _ in range(5):
            guest.machine.start(with_memory=guest.machine.bases is None)
            guest.receive_mapping()
            guest.answer(1)  # so that it is tried again
            assert host.shows(mapped=False)
            guest.machine.stop()
            assert guest.told_nothing()
        guest.machine.start(with_memory=False)
        guest.take_image()
        serves(guest)


@setups(RINGS)
def test_an_image_the_vmm_has_is_not_sent_again(setup: Setup, host: PmemHost) -> None:
    with host.boot(setup) as guest:
        for restart in (guest.machine.restart_afresh, lambda: guest.machine.restart_ring(0)) * 3:
            restart()
            assert guest.told_nothing()
            assert host.status()["mapped"]
            serves(guest)


@setups(RINGS)
def test_an_image_the_vmm_gave_up_is_sent_again(setup: Setup, host: PmemHost) -> None:
    with host.boot(setup) as guest:
        for _ in range(3):
            guest.machine.stop()
            guest.send_table(image=False)
            assert not host.status()["mapped"]
            guest.machine.start(with_memory=False)
            guest.take_image()
            assert host.shows(mapped=True)
        serves(guest)


def test_a_driver_that_knows_no_shared_memory_is_sent_nothing(host: PmemHost) -> None:
    with host.realize(Setup(device_features=0)) as guest:
        guest.machine.start()
        assert guest.told_nothing()
        assert not host.status()["mapped"]
        serves(guest)


# -- H104: what the VMM answers ------------------------------------------------------------------


def raw_answer(guest: PmemDriver, request: int, flags: int, payload: bytes) -> None:
    """An answer of this kind."""
    channel = guest.machine.front.backend_requests
    assert channel is not None
    channel.send(request, payload, flags=flags)


def hang_up(guest: PmemDriver) -> None:
    """Close the back-end channel and nothing else."""
    channel = guest.machine.front.backend_requests
    assert channel is not None
    channel.close()


def hang_up_inside(guest: PmemDriver) -> None:
    """The same in the middle of an answer."""
    channel = guest.machine.front.backend_requests
    assert channel is not None
    channel.raw(
        struct.pack("=3I", BackendRequest.SHMEM_MAP, Flags.VERSION | Flags.REPLY, 8) + b"\0"
    )
    channel.close()


_GOOD_FLAGS = Flags.VERSION | Flags.REPLY
_ZERO = bytes(8)
REFUSALS = {
    f"verdict_{verdict:#x}": partial(
        raw_answer,
        request=BackendRequest.SHMEM_MAP,
        flags=_GOOD_FLAGS,
        payload=struct.pack("=Q", verdict),
    )
    for verdict in (1, 22, 1 << 32, (1 << 64) - 22)
}
GARBAGE: dict[str, Callable[[PmemDriver], None]] = {
    name: partial(raw_answer, request=request, flags=flags, payload=payload)
    for name, request, flags, payload in (
        ("another_request", BackendRequest.SHMEM_UNMAP, _GOOD_FLAGS, _ZERO),
        ("config_change", BackendRequest.CONFIG_CHANGE_MSG, _GOOD_FLAGS, _ZERO),
        ("unknown_request", 0xFFFF_FFFF, _GOOD_FLAGS, _ZERO),
        ("no_reply_flag", BackendRequest.SHMEM_MAP, Flags.VERSION, _ZERO),
        ("version_0", BackendRequest.SHMEM_MAP, Flags.REPLY, _ZERO),
        ("empty", BackendRequest.SHMEM_MAP, _GOOD_FLAGS, b""),
        ("4_bytes", BackendRequest.SHMEM_MAP, _GOOD_FLAGS, bytes(4)),
        ("16_bytes", BackendRequest.SHMEM_MAP, _GOOD_FLAGS, bytes(16)),
        ("64_KiB", BackendRequest.SHMEM_MAP, _GOOD_FLAGS, bytes(1 << 16)),
    )
} | {"hang_up": hang_up, "hang_up_inside": hang_up_inside}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_vmm_may_refuse_the_image(name: str, host: PmemHost) -> None:
    with host.realize() as guest:
        guest.machine.start()
        guest.receive_mapping()
        REFUSALS[name](guest)
        assert host.shows(mapped=False)
        assert host.stands("refused")
        serves(guest)
        guest.machine.restart_afresh()  # it may think better of it
        guest.take_image()
        assert host.shows(mapped=True)


@pytest.mark.parametrize("name", GARBAGE)
def test_a_broken_channel_costs_itself_alone(name: str, host: PmemHost) -> None:
    with host.realize() as guest:
        guest.machine.start()
        guest.receive_mapping()
        GARBAGE[name](guest)
        assert host.stands("did not answer")
        serves(guest)
        channel = guest.machine.front.backend_requests
        assert channel is not None
        assert name.startswith("hang_up") or channel.wait_closed(PROMPT_S)
        front = guest.machine.front
        assert front.set_backend_req_fd() == 0
        lost = front.next_backend_request(PROMPT_S)  # it may have been, on the old channel
        assert lost.request == BackendRequest.CONFIG_CHANGE_MSG
        front.answer_backend_request(lost)
        guest.machine.restart_afresh()
        guest.take_image()
        assert host.shows(mapped=True)
        serves(guest)


def test_a_vmm_that_never_answers_is_served(host: PmemHost) -> None:
    with host.realize() as guest:
        guest.machine.start()
        guest.receive_mapping()
        for _ in range(3):
            serves(guest)
            guest.machine.front.get_config(0, 16)
            assert not host.status()["mapped"]
            guest.machine.restart_afresh()
            assert guest.told_nothing()  # one at a time


def test_without_a_channel_the_guest_is_served_and_the_operator_told(host: PmemHost) -> None:
    features = QEMU_GENERIC_DEVICE_ACKS & ~ProtocolFeature.BACKEND_REQ
    with host.realize(Setup(protocol_features=features)) as guest:
        guest.machine.start()
        assert host.stands("did not answer")
        serves(guest)


# -- H106: a stop in the middle ------------------------------------------------------------------


@setups(RINGS)
def test_a_stop_before_the_request_is_read_takes_it_back(setup: Setup, host: PmemHost) -> None:
    """Nothing else can: it lies in QEMU's socket, and would be read after the stop."""
    with host.realize(setup) as guest:
        for _ in range(5):
            guest.machine.start(with_memory=guest.machine.bases is None)
            channel = guest.machine.front.backend_requests
            assert channel is not None
            while guest.told_nothing():
                continue
            guest.machine.stop()
            # A request of a number that does not exist: QEMU refuses it, and goes on.
            withdrawn = channel.receive()
            assert withdrawn.request == BackendRequest.SHMEM_MAP | WITHDRAWN
            assert withdrawn.payload == b""
            for fd in withdrawn.fds:  # of the image, which came with the first byte
                os.close(fd)
            assert guest.told_nothing()
        guest.machine.start(with_memory=False)
        guest.take_image()
        assert host.shows(mapped=True)
        serves(guest)


@setups(RINGS)
@pytest.mark.parametrize("verdict", [0, 1])
def test_a_stop_between_the_request_and_its_answer_is_borne(
    setup: Setup, verdict: int, host: PmemHost
) -> None:
    with host.realize(setup) as guest:
        guest.machine.start()
        guest.receive_mapping()
        guest.machine.stop()
        assert guest.told_nothing()
        guest.answer(verdict)  # late
        assert host.shows(mapped=verdict == 0)
        assert guest.told_nothing()
        if verdict == 0:
            guest.send_table()
        guest.machine.start(with_memory=False)
        if verdict:
            guest.take_image()
        assert guest.told_nothing()
        assert host.shows(mapped=True)
        serves(guest)


@setups(RINGS)
def test_an_answer_that_comes_after_the_next_start_is_borne(setup: Setup, host: PmemHost) -> None:
    with host.realize(setup) as guest:
        guest.machine.start()
        guest.receive_mapping()
        guest.machine.stop()
        guest.machine.start(with_memory=False)
        assert guest.told_nothing()  # one at a time
        guest.answer(1)
        guest.take_image()
        assert host.shows(mapped=True)
        serves(guest)


def test_a_vmm_that_goes_before_it_answers_leaves_nothing(host: PmemHost) -> None:
    for turn in range(20):
        with host.realize() as guest:
            guest.machine.start()
            if turn % 2:
                guest.receive_mapping()
