"""KVM where it really works, else TCG.

That /dev/kvm opens proves little: inside another hypervisor it may not run a stock kernel. So a
guest is booted once with it, and the verdict kept until the host changes.
This file must not know how a guest is started.
"""

import hashlib
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from tests.vm.cache import say, write_atomically
from tests.vm.stack import Stack

DEVICE = Path("/dev/kvm")


@dataclass(frozen=True)
class Acceleration:
    """QEMU's options for one way of running the guest's processors."""

    name: str
    options: tuple[str, ...]


TCG = Acceleration("tcg", ("-accel", "tcg,thread=multi"))
KVM = Acceleration("kvm", ("-accel", "kvm", "-cpu", "host"))


def _host(stack: Stack) -> str:
    """What the verdict depends on: another boot, another device, another user, another QEMU."""
    device = DEVICE.stat()
    facts = (
        Path("/proc/sys/kernel/random/boot_id").read_text(),
        (device.st_rdev, device.st_mode, device.st_gid, os.geteuid()),
        stack.qemu.command,
        stack.qemu.version,
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()


async def choose(stack: Stack, boots: Callable[[Acceleration], Awaitable[bool]]) -> Acceleration:
    """KVM if `boots` has shown, now or earlier on this host, that a guest comes up with it."""
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return TCG
    host = _host(stack)
    verdict = stack.cache / "acceleration.json"
    if verdict.is_file():
        known = json.loads(verdict.read_text())
        if known.get("host") == host:
            return KVM if known.get("kvm") else TCG
    works = await boots(KVM)
    if not works:
        say("KVM is there but boots no guest here: using TCG")
    write_atomically(verdict, json.dumps({"host": host, "kvm": works}) + "\n")
    return KVM if works else TCG
