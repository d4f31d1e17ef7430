"""The image as a piece of guest memory: never mapped by the daemon, never holed, never a ring."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio

from tests.daemon import VhostdProcess
from tests.fakes.balloon import BalloonDriver
from tests.fakes.channel import ConnectionLost
from tests.fakes.frontend import FrontEnd
from tests.fakes.machine import Machine, Setup
from tests.fakes.memory import MIB, PAGE_SIZE
from tests.fakes.messages import ProtocolFeature, VirtioFeature, WireRegion
from tests.hostile.pmem_machine import (
    DONE,
    FAILED,
    IMAGE_ADDRESS,
    IMAGE_FRONTEND_ADDR,
    IMAGE_SIZE,
    RESPONSE_SIZE,
    RINGS,
    PmemDriver,
    PmemHost,
    PmemOracle,
    memory_folder,
    serves,
    setups,
)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PmemOracle]:
    """A program and its idle state."""
    folder = tmp_path_factory.mktemp("memory")
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


def image_maps(pid: int, image: Path) -> list[str]:
    """Where a process has mapped a file."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line for line in maps if line.endswith(str(image))]


@setups(RINGS)
def test_the_image_is_never_mapped(setup: Setup, host: PmemHost) -> None:
    with host.boot(setup):
        assert host.status()["mapped"]
        assert image_maps(host.program.pid, host.image) == []
        boot = [line for line in host.program.maps() if "memfd:ram" in line]
        assert boot, "the guest's memory itself must be"


def test_an_image_that_shrinks_to_nothing_harms_only_itself(tmp_path: Path) -> None:
    host = PmemHost(tmp_path, tmp_path / "image")
    try:
        with host.boot() as guest:
            os.truncate(host.image, 0)
            while guest.exchange() == (RESPONSE_SIZE, DONE):
                continue  # until it is noticed
            assert guest.exchange() == (RESPONSE_SIZE, FAILED)
            assert host.shows(failed=f"the file has shrunk to 0 bytes, {IMAGE_SIZE} are in use")
            assert guest.machine.stop() is not None
        assert host.program.alive(), host.program.log()
    finally:
        host.kill()


@setups(RINGS)
def test_no_ring_may_lie_in_the_image(setup: Setup, host: PmemHost) -> None:
    before = host.image.read_bytes()
    with host.boot(setup) as guest:
        machine, front = guest.machine, guest.machine.front
        machine.stop()
        own = ProtocolFeature.GPA_ADDRESSES in front.protocol_features
        at = IMAGE_ADDRESS if own else IMAGE_FRONTEND_ADDR
        (queue,) = machine.queues
        assert front.set_vring_num(0, queue.size) == 0
        assert front.set_vring_base(0, queue.start_base()) == 0
        verdicts = [
            front.set_vring_addr(0, at, at + PAGE_SIZE, at + 2 * PAGE_SIZE),
            front.set_vring_kick(0, queue.kick_fd),
        ]
        assert any(verdicts), "a ring in the image was accepted"
        machine.bases = None
        queue.reset()
        machine.start(with_memory=False)
        serves(guest)
    assert host.image.read_bytes() == before


def vm_configuration(folder: Path, mode: str) -> str:
    """A VM with one device of each kind."""
    lines = [
        "[vm.all]",
        "[vm.all.balloon]",
        'socket = "balloon.sock"',
        "[[vm.all.mem]]",
        'id = "mem0"',
        'socket = "mem.sock"',
        "window_address = 0x200000000",
        'size = "64M"',
        "[[vm.all.pmem]]",
        'id = "disk0"',
        'socket = "disk.sock"',
        f'file = "{folder / "image"}"',
        f"size = {IMAGE_SIZE}",
        f'mode = "{mode}"',
    ]
    window = [f"window_address = {IMAGE_ADDRESS}"] if mode == "window" else []
    return "\n".join([*lines, *window])


@pytest.mark.parametrize("mode", ["shmem", "window"])
async def test_memory_slots_and_shared_memory_are_never_offered_in_one_vm(
    mode: str, tmp_path: Path
) -> None:
    """QEMU 11.1 crashes at a reboot with both."""
    with (tmp_path / "image").open("wb") as file:
        file.truncate(IMAGE_SIZE)
    async with VhostdProcess.start(tmp_path, vm_configuration(tmp_path, mode)) as daemon:
        offered = {}
        for name in ("balloon", "mem", "disk"):
            with FrontEnd.connect(tmp_path / f"{name}.sock") as front:
                assert front.get_features() & VirtioFeature.PROTOCOL_FEATURES
                offered[name] = front.get_protocol_features()
        assert await daemon.status("all")
    for name, features in offered.items():
        has_slots = bool(features & ProtocolFeature.CONFIGURE_MEM_SLOTS)
        assert has_slots == (mode == "window"), name
        has_shmem = bool(features & ProtocolFeature.SHMEM_MAP)
        assert has_shmem == (mode == "shmem" and name == "disk"), name


@contextmanager
def image_inflated(folder: Path, pid: int, image: Path) -> Iterator[None]:
    """Have the balloon give up each page of the image, and one of boot memory."""
    with (
        PmemDriver.realize(folder / "disk.sock"),
        Machine.boot(folder / "balloon.sock") as machine,
        image.open("r+b") as file,
    ):
        front, memory = machine.front, machine.memory
        own = ProtocolFeature.GPA_ADDRESSES in front.protocol_features
        at = IMAGE_ADDRESS if own else IMAGE_FRONTEND_ADDR
        regions = [
            *memory.wire_regions(guest_addresses=own),
            WireRegion(IMAGE_ADDRESS, IMAGE_SIZE, at, 0),
        ]
        fds = [memory.fd] * (len(regions) - 1) + [file.fileno()]
        assert front.set_mem_table(regions, fds) == 0
        assert image_maps(pid, image) == []
        guest = BalloonDriver(machine)
        memory.touch(16 * MIB, PAGE_SIZE)
        first = IMAGE_ADDRESS // PAGE_SIZE
        guest.inflate(range(first, first + IMAGE_SIZE // PAGE_SIZE))
        guest.report([(IMAGE_ADDRESS, IMAGE_SIZE)])
        guest.inflate([16 * MIB // PAGE_SIZE])
        assert not memory.page_present(16 * MIB), "the balloon does not work at all"
        yield


@pytest.mark.parametrize("mode", ["shmem", "window"])
async def test_a_balloon_punches_no_hole_into_an_image(mode: str, tmp_path: Path) -> None:
    """On a file system where it could: the guest's balloon has a page of the disk listed."""
    content = bytes(range(256)) * (IMAGE_SIZE // 256)
    with memory_folder() as fast:
        image = fast / "image"
        image.write_bytes(content)
        async with VhostdProcess.start(tmp_path, vm_configuration(fast, mode)) as daemon:
            with image_inflated(tmp_path, daemon.process.pid, image):
                status = (await daemon.status("all"))["balloon"]
        assert image.read_bytes() == content
        assert image.stat().st_blocks * 512 == IMAGE_SIZE
    assert status["inflated"] == PAGE_SIZE


CONFIG = """
[vm.a.balloon]
stats_interval_s = 0
[vm.b.balloon]
stats_interval_s = 0
[[vm.b.mem]]
id = "mem0"
window_address = 0x300000000
size = "64MiB"
[[vm.b.pmem]]
id = "disk0"
file = "{image}"
size = {size}
mode = "window"
window_address = 0x240000000
"""
CONTENT = b"\xab" * IMAGE_SIZE


def named_as_memory(socket: Path, file: Path) -> None:
    """A VMM names a file as memory, and its guest gives up a page of it to the balloon."""
    with Machine.boot(socket, Setup()) as machine:
        fd = os.open(file, os.O_RDWR)
        region = WireRegion(IMAGE_ADDRESS, IMAGE_SIZE, IMAGE_ADDRESS, 0)
        answer = machine.front.add_mem_reg(region, fd)
        os.close(fd)
        BalloonDriver(machine).inflate([IMAGE_ADDRESS // PAGE_SIZE])
    assert answer == 0


@pytest.mark.parametrize("vm", ["a", "b"], ids=["of another VM", "of the same VM"])
async def test_a_balloon_never_punches_a_disk_that_waits_for_its_vmm(
    vm: str, tmp_path: Path
) -> None:
    with memory_folder() as fast:
        image = fast / "image"
        image.write_bytes(CONTENT)
        config = CONFIG.format(image=image, size=IMAGE_SIZE)
        async with VhostdProcess.start(tmp_path, config) as daemon:
            await trio.to_thread.run_sync(named_as_memory, tmp_path / f"{vm}-balloon.sock", image)
            assert image_maps(daemon.process.pid, image) == []
        assert image.read_bytes() == CONTENT


CONTRADICTED = CONFIG.replace("64MiB", "128MiB")
NOT_DESCRIBED = CONFIG[: CONFIG.index("[vm.b")]


@pytest.mark.parametrize("later", [CONTRADICTED, NOT_DESCRIBED], ids=["contradicted", "gone"])
async def test_a_balloon_never_punches_a_disk_of_a_vm_that_is_paused(
    later: str, tmp_path: Path
) -> None:
    with memory_folder() as fast:
        image = fast / "image"
        image.write_bytes(CONTENT)
        names = {"image": image, "size": IMAGE_SIZE}
        async with VhostdProcess.start(tmp_path, CONFIG.format(**names), "--keep") as daemon:
            with FrontEnd.connect(tmp_path / "b-disk0.sock") as disk:
                await trio.to_thread.run_sync(disk.get_features)
                await daemon.ctl("mem", "resize", "b", "32M")
                (tmp_path / "vhostd.toml").write_text(later.format(**names))
                before = daemon.worker
                os.kill(before, signal.SIGKILL)
                await daemon.replaced(before, "a")
                assert (await daemon.status("b"))["state"] == "paused"
                await trio.to_thread.run_sync(named_as_memory, tmp_path / "a-balloon.sock", image)
                assert image_maps(daemon.worker, image) == []
        assert image.read_bytes() == CONTENT


async def test_a_file_that_is_memory_already_does_not_become_a_disk(tmp_path: Path) -> None:
    with memory_folder() as fast:
        first, ram, link = fast / "first", fast / "ram", fast / "disk"
        for file in (first, ram):
            file.write_bytes(CONTENT)
        link.symlink_to(first)
        config = CONFIG.format(image=link, size=IMAGE_SIZE)
        async with VhostdProcess.start(tmp_path, config) as daemon:
            with Machine.boot(tmp_path / "a-balloon.sock", Setup()) as machine:
                fd = os.open(ram, os.O_RDWR)
                region = WireRegion(IMAGE_ADDRESS, IMAGE_SIZE, IMAGE_ADDRESS, 0)
                assert await trio.to_thread.run_sync(machine.front.add_mem_reg, region, fd) == 0
                os.close(fd)
                assert image_maps(daemon.process.pid, ram), "that it is not memory shows nothing"
                link.unlink()
                link.symlink_to(ram)
                with FrontEnd.connect(tmp_path / "b-disk0.sock") as disk, suppress(ConnectionLost):
                    await trio.to_thread.run_sync(disk.get_features)
                (pmem,) = (await daemon.status("b"))["pmem"]
                assert "guest memory of VM 'a'" in pmem["refused"]
            link.unlink()
            link.symlink_to(first)
            with FrontEnd.connect(tmp_path / "b-disk0.sock") as disk:
                await trio.to_thread.run_sync(disk.get_features)
