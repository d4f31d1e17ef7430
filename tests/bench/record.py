"""Record anew in which order a real guest gives 1 GiB to QEMU's built-in balloon.

`python -m tests.bench.record` boots a 2 GiB guest for each recording, makes it use and free its
memory, inflates and stores the page numbers QEMU's trace event shows. Must not know vhostd.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import trio
from vhostd.units import GiB

from tests.bench.guest_run import balloon_wait
from tests.bench.recording import FOLDER, SUFFIX, write
from tests.fakes.memory import PAGE_SIZE
from tests.vm.cache import StackError
from tests.vm.guest import GuestBootError, GuestCommandError, boot
from tests.vm.stack import Stack, ensure

KERNEL = "6.12"
MEMORY = "2G"
BALLOON_SIZE = GiB
PREPARE_TIMEOUT_S = 240.0
INFLATE_TIMEOUT_S = 240.0
EVENT = "virtio_balloon_handle_output"
TRACED = re.compile(rf"{EVENT} .*gpa: (0x[0-9a-f]+)")

# What is left free lies in pieces of 4 to 64 KiB: 1.45 GiB of small files, then seven of eight
# removed in random order.
SMALL_FILES = r"""
mkdir /small && mount -t tmpfs -o size=1800m,nr_inodes=1m none /small && cd /small
awk 'BEGIN { srand(7); split("1 2 4 8 16", pages); text = sprintf("%4096s", "")
    for (i = 1; i <= 5; i++) { content[i] = text; text = text text }
    for (total = 0; total < 380000; total += pages[i]) {
        i = 1 + int(rand() * 5); name = "f" total; printf "%s", content[i] > name; close(name) } }'
ls | shuf | awk 'NR % 8' | xargs rm
"""


@dataclass(frozen=True)
class Plan:
    """A recording: its name, what the guest does first, and that in words."""

    name: str
    prepare: str
    words: str


PLANS = (
    Plan("touched", "guesttool touch 1600", "a process touched 1600 MiB and ended"),
    Plan(
        "fragmented",
        SMALL_FILES,
        "1.45 GiB of files of 4 to 64 KiB were written to tmpfs, 7 of 8 removed in random order",
    ),
)


async def record(stack: Stack, plan: Plan, folder: Path) -> None:
    """Make one recording and store it."""
    trace = folder / "trace.log"
    devices = ["-device", "virtio-balloon-pci,id=balloon0"]
    devices += ["-trace", f"enable={EVENT},file={trace}"]
    async with boot(stack, kernel=KERNEL, memory=MEMORY, devices=devices) as guest:
        await guest.run(plan.prepare, timeout_s=PREPARE_TIMEOUT_S)
        before = (await guest.vmstat())["balloon_inflate"]
        wanted = before + BALLOON_SIZE // PAGE_SIZE
        await guest.qmp.execute("balloon", value=2 * GiB - BALLOON_SIZE)
        await guest.run(balloon_wait("balloon_inflate", wanted), timeout_s=INFLATE_TIMEOUT_S)
        release = guest.kernel.release
        # QEMU's log is buffered: its orderly end writes the rest of it.
        await guest.qmp.execute("quit")
        await guest.wait_exit()
    found = TRACED.findall(trace.read_text())
    pfns = array("Q", (int(address, 16) // PAGE_SIZE for address in found))
    expected = BALLOON_SIZE // PAGE_SIZE
    if len(pfns) != expected or len(set(pfns)) != expected:
        raise ValueError(f"{plan.name}: {len(pfns)} pages traced, {expected} expected, each once")
    origin = (
        f"{plan.name}: {plan.words}; then {expected} pages were inflated at once",
        f"guest: Linux {release}, {MEMORY}, 2 vCPUs; host: QEMU {stack.qemu.version},"
        f" virtio-balloon-pci, trace event {EVENT}",
    )
    path = FOLDER / f"{plan.name}{SUFFIX}"
    write(path, origin, pfns)
    print(f"{path.name}: {path.stat().st_size} bytes, {len(pfns)} pages")


async def record_all(plans: Sequence[Plan]) -> None:
    """One guest after the other."""
    stack = await trio.to_thread.run_sync(ensure, (KERNEL,))
    for plan in plans:
        with tempfile.TemporaryDirectory(prefix="vhostd-record-") as folder:
            await record(stack, plan, Path(folder))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit 1 with a reason when a guest or QEMU failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.record", description=__doc__)
    known = [plan.name for plan in PLANS]
    parser.add_argument("name", nargs="*", help=f"what to record: {', '.join(known)} (all)")
    chosen = parser.parse_args(arguments).name or known
    if unknown := set(chosen) - set(known):
        parser.error(f"no such recording: {', '.join(sorted(unknown))}")
    try:
        trio.run(record_all, [plan for plan in PLANS if plan.name in chosen])
    except (StackError, GuestBootError, GuestCommandError, ValueError) as error:
        print(f"record: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
