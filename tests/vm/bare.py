"""QEMU without a guest: it is stopped before its first instruction, so that its devices are made
and nothing else happens. For what only QEMU's own life shows. Must not know vhostd.
"""

from __future__ import annotations

import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio
from vhostd.qmp import QmpClient, QmpClosed, qmp_over

from tests.vm.stack import Stack

PORTS = 4
BUSES = ("pcie.0", "port", "bridge")
"""What topology() makes: the root bus, one of PORTS root ports, a conventional bridge."""


class QemuEnded(Exception):
    """QEMU ended; status: negative for a signal; the text is what it printed."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"QEMU ended with {status}: {text}")
        self.status = status


def topology(reserve: str = "0") -> list[str]:
    """Options for PORTS PCIe root ports port0, port1, ... and a PCI bridge `bridge`.

    reserve: of 64-bit prefetchable memory at each port, for the BARs of what is plugged later.
    """
    options: list[str] = []
    for number in range(PORTS):
        port = f"pcie-root-port,id=port{number},chassis={number + 1},slot={number + 1}"
        options += ["-device", port + (f",pref64-reserve={reserve}" if reserve != "0" else "")]
    options += ["-device", "pcie-pci-bridge,id=converter"]
    return [*options, "-device", "pci-bridge,id=bridge,bus=converter,chassis_nr=9,addr=1"]


def bus_of(kind: str, number: int) -> str:
    """The bus for the device with that number."""
    return f"port{number}" if kind == "port" else kind


@dataclass
class Bare:
    """A stopped QEMU."""

    qmp: QmpClient
    process: subprocess.Popen[bytes]

    async def lives(self) -> bool:
        """Whether its main loop answers."""
        with trio.move_on_after(10):
            await self.qmp.execute("query-status")
            return True
        return False


@asynccontextmanager
async def bare(stack: Stack, options: Sequence[str]) -> AsyncIterator[Bare]:
    """A QEMU with these options beside q35 and 256 MiB of shared RAM.

    Raises:
        QemuEnded: it did not start, or ended by itself inside the block.
    """
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryFile() as log:
        command = [
            *stack.qemu.command,
            *("-nodefaults", "-no-user-config", "-display", "none", "-S"),
            *("-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-qmp", "chardev:qmp"),
            *options,
        ]
        process = subprocess.Popen(  # noqa: ASYNC220  # returns at once
            ["setpriv", "--pdeathsig", "KILL", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

        def ended() -> QemuEnded:
            status = process.wait()
            log.seek(0)
            return QemuEnded(status, log.read().decode(errors="replace")[-2000:])

        try:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            try:
                async with qmp_over(stream, greeting_timeout_s=30) as qmp:
                    yield Bare(qmp, process)
            except QmpClosed:
                raise ended() from None
            if process.poll() is not None:
                raise ended()
        finally:
            process.kill()
            process.wait()


def chardev(id: str, path: Path) -> dict[str, object]:
    """Arguments of chardev-add for a socket."""
    address = {"type": "unix", "data": {"path": str(path)}}
    return {"id": id, "backend": {"type": "socket", "data": {"addr": address, "server": False}}}


def device(option: str, bus: str) -> dict[str, object]:
    """Arguments of device_add for what -device would have said."""
    driver, *pairs = option.split(",")
    arguments: dict[str, object] = {"driver": driver, "bus": bus}
    for pair in pairs:
        name, _, value = pair.partition("=")
        arguments[name] = int(value) if value.isdigit() else value
    return arguments
