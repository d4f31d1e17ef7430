"""What vhostctl doctor finds: the host, guest kernels, and VMs by their status.

Asks the host, changes nothing. Must not know the daemon beyond its answers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeAlias

from vhostd.control.qemu_args import DEVICE_MODEL
from vhostd.units import GiB, MiB, format_size

Verdict: TypeAlias = Literal["ok", "warning", "failed"]
OK: Final = "ok"
WARNING: Final = "warning"
FAILED: Final = "failed"

QEMU: Final = "qemu-system-x86_64"
QEMU_TIMEOUT_S: Final = 20.0
CACHESTAT_KERNEL: Final = (6, 5)
FREE_SIZE_LOW: Final = GiB
PAGE_SIZE: Final = 4096

SINCE: Final = (
    ("virtio-balloon", (2, 6), "every kernel"),
    ("free page reporting", (5, 7), "memory is taken back by inflating only"),
    ("virtio-mem", (5, 17), "no device that keeps unplugged memory out of reach before 5.17"),
    ('virtio-pmem, mode = "window"', (5, 3), "no virtio-pmem before 5.3"),
    ('virtio-pmem, mode = "shmem"', (6, 9), 'use mode = "window"'),
)
"""What Linux can do, since when, and what to do without it."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at; remedy: what to do where it is not ok."""

    name: str
    verdict: Verdict
    found: str
    remedy: str | None = None

    def as_dict(self) -> dict[str, str | None]:
        """By name, for JSON."""
        return asdict(self)


def host_checks() -> list[Check]:
    """This host."""
    return [_kernel(), _kvm(), _qemu()]


def _kernel() -> Check:
    release = os.uname().release
    if _version(release) >= CACHESTAT_KERNEL:
        return Check("kernel", OK, release)
    return Check(
        "kernel",
        WARNING,
        f"{release} can't tell the page cache of an image",
        "nothing is lost but figures; Linux 6.5 has them",
    )


def _kvm() -> Check:
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return Check("KVM", OK, "/dev/kvm can be opened")
    return Check(
        "KVM", WARNING, "/dev/kvm can't be opened", "join its group, or run guests with -accel tcg"
    )


def _qemu() -> Check:
    program = shutil.which(QEMU)
    if program is None:
        return Check("QEMU", WARNING, f"no {QEMU} in PATH", "install QEMU 11.1 or newer")
    try:
        version = _output(program, "--version").partition("\n")[0]
        devices = _output(program, "-device", "help")
    except (OSError, subprocess.SubprocessError) as error:
        return Check("QEMU", FAILED, f"{program} does not run: {error}", "install it anew")
    if f'"{DEVICE_MODEL}"' in devices:
        return Check("QEMU", OK, version)
    return Check("QEMU", FAILED, f"{version} has no {DEVICE_MODEL}", "install QEMU 11.1 or newer")


def _output(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [program, *arguments], capture_output=True, check=True, timeout=QEMU_TIMEOUT_S
    )
    return done.stdout.decode(errors="replace")


def guest_checks(release: str) -> list[Check]:
    """What a guest with this Linux can use.

    Raises:
        ValueError: it is no version.
    """
    version = _version(release)
    return [
        Check(f"guest: {name}", OK, f"Linux {since[0]}.{since[1]} and later")
        if version >= since
        else Check(f"guest: {name}", WARNING, f"Linux {release} is too old", without)
        for name, since, without in SINCE
    ]


def _version(release: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None:
        raise ValueError(f"{release!r} is no version of Linux; write one such as 6.12")
    return int(found[1]), int(found[2])


def unreachable(why: str) -> Check:
    """There is no daemon to be asked."""
    return Check("daemon", FAILED, why, "start it, or name its socket with --socket")


def daemon_checks(socket: str, statuses: Sequence[Mapping[str, Any]]) -> list[Check]:
    """The daemon that answered, and its VMs."""
    checks = [Check("daemon", OK, f"serves {len(statuses)} VMs at {socket}")]
    for status in statuses:
        found = list(_vm_checks(status))
        checks += found or [Check(status["vm"], OK, status["state"])]
    return checks


_NOTHING_GIVEN_BACK: Final = {
    "pinned": "no memory is given back to the host while that device is there",
    "encrypted": "leave the size of this VM as it is",
    "unknown": "no memory is given back until the VMM's QMP socket answers: is qmp its path, is no"
    " other client connected to it (QEMU serves one client of a socket at a time), and may vhostd"
    " write to it (systemd: the drop-in other-owners.conf, docs/operations.md)?",
}


_SHARE: Final = (
    "start QEMU with share=on for all guest memory, boot RAM and DIMMs, as vhostctl qemu-args"
    " prints it: vhostd can't see other memory, and what the guest asks there hangs"
)

_NEW_CHANNEL: Final = (
    "the guest reads the present values when it boots again; for a new channel unplug the device"
    " and plug it again, or end QEMU and start the VM anew"
)


_END_VMM: Final = (
    "end its VMM; where the next one is not served then, restart vhostd: other guests do not notice"
)


def _vm_checks(status: Mapping[str, Any]) -> Iterator[Check]:
    name = status["vm"]
    if paused := status.get("paused"):
        yield Check(name, FAILED, f"paused: {paused}", status.get("paused_remedy"))
    if not_kept := status.get("not_kept"):
        yield Check(
            name, WARNING, not_kept, "until then its guest loses its devices when vhostd ends"
        )
    if stuck := status.get("stuck"):
        yield Check(name, FAILED, stuck, _END_VMM)
    unshared = status.get("unshared")
    if unshared:
        yield Check(f"{name} memory", FAILED, unshared, _SHARE)
    if not_lasting := status.get("not_lasting"):
        yield Check(
            name,
            WARNING,
            f"sizes that are set do not outlive the host: {not_lasting}",
            "make room or the directory, then set them once more",
        )
    for queue, fault in status["faults"].items():
        if fault == "address" and unshared:
            continue
        yield Check(
            f"{name} queue {queue}",
            FAILED,
            f"quarantined: {fault}",
            "the guest's driver is at fault; it is served again once it is set up anew",
        )
    discards = status.get("discards")
    if discards is not None and discards["why"] and status["state"] != "waiting":
        yield Check(
            f"{name} memory", WARNING, discards["why"], _NOTHING_GIVEN_BACK[discards["finding"]]
        )
    balloon = status.get("balloon")
    if balloon is not None and balloon["poison_value"] and "page_reporting" in balloon["features"]:
        yield Check(
            f"{name} balloon",
            WARNING,
            "the guest fills free pages with a pattern, so what it reports free is not given back",
            "boot it without page_poison=1; init_on_free=1 does not stand in the way",
        )
    devices = {"balloon": balloon} if balloon is not None else {}
    devices |= {device["id"]: device for device in (*status["mem"], *status["pmem"])}
    for id, device in devices.items():
        if device.get("untold"):
            yield Check(f"{name} {id}", FAILED, device["untold"], _NEW_CHANNEL)
    for mem in status["mem"]:
        yield from _mem_checks(f"{name} {mem['id']}", mem)
    for pmem in status["pmem"]:
        yield from _pmem_checks(f"{name} {pmem['id']}", pmem)


def _mem_checks(name: str, mem: Mapping[str, Any]) -> Iterator[Check]:
    if mem["state"] == "running" and not mem["window"]:
        yield Check(name, FAILED, mem["standing"], "start QEMU with what vhostctl qemu-args prints")
    if mem["page_size"] > PAGE_SIZE and not mem["prealloc"]:
        yield Check(
            name,
            WARNING,
            f"its window is on huge pages of {format_size(mem['page_size'])}, and they are taken"
            " when the guest touches them: where the pool has none left, QEMU dies",
            "set prealloc = true: what can't be had is not plugged",
        )
    if mem["violations"]:
        yield Check(
            name,
            FAILED,
            f"the guest used memory it was not given, in {mem['violations']} blocks",
            'set on_violation = "discard" or "stop"',
        )


def _pmem_checks(name: str, pmem: Mapping[str, Any]) -> Iterator[Check]:
    if pmem["failed"]:
        yield Check(
            name, FAILED, f"flushes fail: {pmem['failed']}", "see to it, then vhostctl pmem clear"
        )
    elif pmem["state"] == "running" and not pmem["mapped"]:
        yield Check(
            name,
            FAILED,
            pmem["standing"],
            'for a kernel before Linux 6.9 set mode = "window"; for a port without room start QEMU'
            f" with pref64-reserve={2 * pmem['size'] // MiB}M at the port, or have the disk there"
            " at boot; else see vhostctl qemu-args, or the log",
        )
    elif pmem["refused"] and pmem["state"] == "waiting":
        yield Check(name, FAILED, pmem["refused"], "a VMM that connects is turned away")
    elif pmem["refused"]:
        yield Check(name, WARNING, pmem["refused"], "the next VMM that connects is turned away")
    if pmem["removed"]:
        yield Check(
            name, FAILED, f"{pmem['file']} was removed", "copy the data from inside the guest"
        )
    free = pmem["free"]
    if free is not None and free < FREE_SIZE_LOW and pmem["allocated"] < pmem["size"]:
        yield Check(
            name,
            WARNING,
            f"{pmem['file']} may grow, and its file system has {format_size(free)} left",
            "make room: a guest whose page finds none is stopped or lost",
        )
