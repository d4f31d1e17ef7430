"""Starts the real vhostd-mem, has its control API say what it sees, and looks for what it kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes.machine import Setup
from tests.fakes.mem import (
    BLOCK_SIZE,
    WINDOW_ADDRESS,
    WINDOW_SIZE,
    BlockState,
    MemAnswer,
    MemDriver,
)
from tests.fakes.memory import PAGE_SIZE
from tests.fakes.program import Program, executable, wait_until
from tests.hostile.oracle import Oracle

PROGRAM = "vhostd-mem"
VM_PATH = "/v1/vms/mem/mem"
REQUESTED_BLOCKS = 32  # of each test's beginning
SLACK_BLOCKS = 128  # that much more of the window is usable than is requested
USABLE_BLOCKS = REQUESTED_BLOCKS + SLACK_BLOCKS
PROOF_BLOCK = REQUESTED_BLOCKS - 2
SPARE_BLOCK = REQUESTED_BLOCKS - 1
PROMPT_S = 10.0  # for anything the program must do in bounded time

SETUPS = [
    Setup(),
    Setup(packed=True),
    Setup(event_idx=True, indirect=True),
    Setup(packed=True, event_idx=True, indirect=True),
]
RINGS = SETUPS[:2]

MemStatus = dict[str, Any]


class MemHost:
    """A running vhostd-mem with one window."""

    def __init__(self, folder: Path, *options: str, size: int = WINDOW_SIZE) -> None:
        """Start it."""
        assert executable(PROGRAM).exists(), f"{PROGRAM} is not installed next to this Python"
        self.size = size
        arguments = (
            f"--window-address={WINDOW_ADDRESS:#x}",
            f"--size={size}",
            f"--block-size={BLOCK_SIZE}",
            f"--requested-size={REQUESTED_BLOCKS * BLOCK_SIZE}",
            f"--runtime-dir={folder}",
            *options,
        )
        self.program = Program.start(PROGRAM, folder, arguments)
        self._control = folder / "control.sock"

    def boot(self, setup: Setup | None = None, blocks: int = REQUESTED_BLOCKS) -> MemDriver:
        """Request so many blocks, and return a guest that runs and has plugged none."""
        self.resize(blocks)
        return MemDriver.boot(self.program.socket_path, setup, size=self.size)

    @contextmanager
    def control(self) -> Iterator[httpx.Client]:
        """A client of the control API that keeps its connection."""
        transport = httpx.HTTPTransport(uds=str(self._control))
        with httpx.Client(transport=transport, base_url="http://vhostd", timeout=30) as client:
            yield client

    def resize(self, blocks: int) -> None:
        """Set the requested size."""
        with self.control() as client:
            resize(client, blocks)

    def status(self) -> MemStatus:
        """What an operator sees of the device."""
        with self.control() as client:
            (status,) = client.get(VM_PATH).raise_for_status().json()
        found: MemStatus = status
        return found

    def kill(self) -> None:
        """End it."""
        self.program.kill()


def setups(choices: list[Setup]) -> pytest.MarkDecorator:
    """Run a test with each of these rings."""
    return pytest.mark.parametrize("setup", choices, ids=lambda setup: setup.label)


def resize(client: httpx.Client, blocks: int) -> None:
    """Set the requested size."""
    client.put(VM_PATH, json={"size": blocks * BLOCK_SIZE}).raise_for_status()


def serves(guest: MemDriver) -> None:
    """Plug, use and unplug a block, and find it empty when it is plugged again."""
    assert guest.plug(PROOF_BLOCK) is MemAnswer.ACK
    guest.fill(PROOF_BLOCK, 1, 0xA5)
    assert guest.state(PROOF_BLOCK) is BlockState.PLUGGED
    assert guest.unplug(PROOF_BLOCK) is MemAnswer.ACK
    assert guest.state(PROOF_BLOCK) is BlockState.UNPLUGGED
    # The answer to this waits until the memory has gone.
    assert guest.plug(PROOF_BLOCK) is MemAnswer.ACK
    assert guest.pages(PROOF_BLOCK) == 0, "unplug punched no hole"
    assert guest.unplug(PROOF_BLOCK) is MemAnswer.ACK


def cut_holes(guest: MemDriver) -> None:
    """Plug and fill blocks 0 to 7, and unplug four of them."""
    assert guest.plug(0, 8) is MemAnswer.ACK
    for block in range(8):
        guest.fill(block, 1, block + 1)
    assert guest.unplug(1) is MemAnswer.ACK
    assert guest.unplug(4, 3) is MemAnswer.ACK


def check_holes(guest: MemDriver, host: MemHost) -> None:
    """The pages of those four are gone, and the others keep every byte."""
    assert wait_until(lambda: host.status()["discarding"] == 0, PROMPT_S)
    whole = BLOCK_SIZE // PAGE_SIZE
    pages = [whole, 0, whole, whole, 0, 0, 0, whole]
    assert [guest.pages(block) for block in range(8)] == pages
    assert guest.window.blocks() == 4 * BLOCK_SIZE
    for block in (0, 2, 3, 7):
        assert guest.filled(block, 1, block + 1)
    assert guest.config().plugged_size == 4 * BLOCK_SIZE
    states = [guest.state(block) for block in range(8)]
    assert [state is BlockState.PLUGGED for state in states] == [count > 0 for count in pages]
    assert guest.state(8, USABLE_BLOCKS - 8) is BlockState.UNPLUGGED


class MemOracle(Oracle):
    """The same looks at a program whose device is a virtio-mem."""

    def __init__(self, host: MemHost) -> None:
        """Serve legal guests first, then look."""
        self.host = host
        super().__init__(host.program)

    def serve_legally(self, setup: Setup | None = None) -> None:
        """A new connection, the whole handshake, and an effect on the window's memory."""
        with self.host.boot(setup) as guest:
            serves(guest)
            guest.take_config_changes()
