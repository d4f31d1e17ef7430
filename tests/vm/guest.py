"""Boot a guest, run commands in it as root, watch its memory from outside.

    async with boot(stack, kernel="6.12", devices=balloon_device(path)) as guest:
        print(await guest.run("cat /proc/vmstat"))

The guest's RAM is one shared memfd called ram0. Everything ends with the block, whatever happens;
what fails inside takes the guest's console along as a note. This file must not know vhostd.
"""

import base64
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import trio
from vhostd.qmp import QmpClient, QmpClosed, qmp_over, running

from tests.vm.acceleration import Acceleration, choose
from tests.vm.channel import Boot, CommandChannel, GuestCommandError, GuestProcess
from tests.vm.hostmemory import memory_backends
from tests.vm.machine import (
    Machine,
    balloon_device,
    disk_device,
    memory_device,
    window_device,
)
from tests.vm.stack import Kernel, Stack

__all__ = [
    "Guest",
    "GuestBootError",
    "GuestCommandError",
    "GuestProcess",
    "QemuDied",
    "balloon_device",
    "boot",
    "disk_device",
    "memory_device",
    "window_device",
]

BOOT_TIMEOUT_S = 90.0
_KEPT_FAILURES = 20
_TAIL_LINES = 40


class GuestBootError(Exception):
    """QEMU or the guest did not come up; the text has the ends of the console and of stderr."""


class QemuDied(Exception):
    """QEMU ended by itself while a guest was in use."""


class Guest:
    """A running guest. Made by boot()."""

    def __init__(
        self, kernel: Kernel, folder: Path, command: Sequence[str], modprobe: Sequence[str]
    ) -> None:
        self.kernel = kernel
        self.folder = folder
        self.qmp_path = folder / "qmp.sock"
        self.qmp: QmpClient
        self._modprobe = tuple(modprobe)
        self._memory: dict[str, Path] = {}
        self._end_was_expected = False
        self._process, self._qmp_stream, self._agent_stream = _start(command, folder)
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        self._channel = CommandChannel(self._agent_stream)

    async def run(self, command: str, timeout_s: float = 30) -> str:
        """Run `command` with sh as root, return what it printed (standard error included).

        Raises GuestCommandError, with the output, if it does not exit 0 within `timeout_s`.
        """
        return await self._channel.run(command, timeout_s)

    async def start(self, command: str) -> GuestProcess:
        """Run `command` in the background, with its standard input at hand: see GuestProcess."""
        return await self._channel.start(command)

    async def write_file(self, path: str, data: bytes) -> None:
        """Write `data` to the file `path` in the guest."""
        # Each piece is a command of its own: the line has no flow control but the answer.
        for start in range(0, len(data), 16384):
            text = base64.b64encode(data[start : start + 16384]).decode()
            await self.run(f"echo {text} | base64 -d {'>>' if start else '>'} '{path}'")
        if not data:
            await self.run(f": > '{path}'")

    async def meminfo(self) -> dict[str, int]:
        """/proc/meminfo in bytes (HugePages_* are counts)."""
        found: dict[str, int] = {}
        for line in (await self.run("cat /proc/meminfo")).splitlines():
            name, _, value = line.partition(":")
            number, *unit = value.split()
            found[name] = int(number) * (1024 if unit else 1)
        return found

    async def vmstat(self) -> dict[str, int]:
        """/proc/vmstat: counters and numbers of 4 KiB pages."""
        lines = (await self.run("cat /proc/vmstat")).splitlines()
        return {name: int(value) for name, value in (line.split() for line in lines)}

    def memory_fd_path(self, name: str = "ram0") -> Path:
        """The memfd behind the memory backend `name`, as a path any process of ours can open.

        Knows the backends QEMU was started with. Raises KeyError if there is none of that name.
        """
        return self._memory[name]

    def host_memory(self, name: str = "ram0") -> int:
        """Bytes of host memory the memory backend `name` takes up right now."""
        return self.memory_fd_path(name).stat().st_blocks * 512

    def console_log(self) -> str:
        """All the guest's kernel has printed since it was started, reboots included."""
        return _read(self.folder / "console.log")

    def qemu_log(self) -> str:
        """All QEMU has printed."""
        return _read(self.folder / "qemu.log")

    async def system_reset(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Reset the guest as by its reset button; wait until it answers again."""
        self._channel.expect_boot("the guest was reset")
        await self.qmp.execute("system_reset")
        await self.wait_ready(timeout_s)

    async def reboot(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Let the guest's kernel reboot; wait until it answers again."""
        with self.qmp.events("RESET") as events:
            await self.start("reboot -f")
            with trio.fail_after(timeout_s):
                await events.receive()
        self._channel.expect_boot("the guest rebooted")
        await self.wait_ready(timeout_s)

    async def wait_exit(self) -> int:
        """Wait until QEMU has ended; its exit status, negative for a signal."""
        self._end_was_expected = True
        await trio.lowlevel.wait_readable(self._pidfd)
        return self._process.wait()

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        """Send QEMU a signal; its end is no failure then."""
        self._end_was_expected = True
        self._process.send_signal(signal_number)

    async def wait_ready(self, timeout_s: float = BOOT_TIMEOUT_S) -> Boot:
        """Wait until the present boot answers commands and has its modules.

        Raises GuestBootError, with the ends of the logs, if it does not within `timeout_s`.
        """
        try:
            with trio.fail_after(timeout_s):
                present = await self._channel.wait_ready()
            if self._modprobe:
                await self.run(f"modprobe -a {' '.join(self._modprobe)}", timeout_s)
        except trio.TooSlowError:
            reason = f"the guest did not answer within {timeout_s:g} s"
        except GuestCommandError as error:
            reason = f"the guest did not come up: {error}"
        else:
            return present
        raise GuestBootError(f"{reason}\n{self.describe()}")

    async def follow_resets(self) -> None:
        """Notice resets nobody here asked for. Runs in the background."""
        with self.qmp.events("RESET") as resets:
            async for _ in resets:
                self._channel.expect_boot("the guest was reset")

    async def attach(self, stack: AsyncExitStack, timeout_s: float) -> None:
        """Take hold of the started QEMU and wait until its guest answers."""
        deadline = trio.current_time() + timeout_s
        try:
            self.qmp = await stack.enter_async_context(
                qmp_over(self._qmp_stream, greeting_timeout_s=timeout_s)
            )
        except QmpClosed as error:
            # It is ending: its status and its last words are worth a moment.
            with trio.move_on_after(2):
                await trio.lowlevel.wait_readable(self._pidfd)
            raise GuestBootError(f"QEMU did not start: {error}\n{self.describe()}") from None
        self._memory = await memory_backends(self.qmp, self.pid)
        await stack.enter_async_context(running(self._channel.read))
        await stack.enter_async_context(running(self.follow_resets))
        await self.wait_ready(deadline - trio.current_time())

    def describe(self) -> str:
        """The ends of what QEMU and the guest's console printed, for the text of an exception."""
        status = self._process.poll()
        state = "running" if status is None else f"ended with {status}"
        return "\n".join(
            f"--- {title} ---\n{_tail(text)}"
            for title, text in (
                (f"QEMU {self.pid} ({state})", self.qemu_log()),
                (f"console of the {self.kernel.release} guest", self.console_log()),
            )
        )

    async def check_alive(self) -> None:
        """Raises QemuDied if QEMU has ended and no one asked for it."""
        if self._end_was_expected:
            return
        if self.qmp.end_reason is not None:
            # Its sockets close before it can be waited for; writing a core file takes its time.
            with trio.move_on_after(30):
                await trio.lowlevel.wait_readable(self._pidfd)
        status = self._process.poll()
        if status is not None:
            raise QemuDied(f"QEMU ended by itself with status {status}")

    async def close(self) -> None:
        """End QEMU for good."""
        self._process.kill()
        self._process.wait()
        os.close(self._pidfd)
        for stream in (self._qmp_stream, self._agent_stream):
            await trio.aclose_forcefully(stream)


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-_TAIL_LINES:])


def _start(
    command: Sequence[str], folder: Path
) -> tuple[subprocess.Popen[bytes], trio.SocketStream, trio.SocketStream]:
    """Start QEMU with a connected QMP monitor and agent line: chardevs `qmp` and `agent`."""
    # Connected pairs: no path to outgrow 108 bytes, nothing to wait for, and an end of file
    # the moment QEMU dies.
    pairs = {name: socket.socketpair() for name in ("qmp", "agent")}
    options = []
    for name, (_, theirs) in pairs.items():
        options += ["-chardev", f"socket,id={name},fd={theirs.fileno()}"]
    with (folder / "qemu.log").open("wb") as log:
        process = subprocess.Popen(
            # However we end, QEMU ends with us.
            ["setpriv", "--pdeathsig", "KILL", "--", *command, *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,  # Ctrl-C on the terminal is for us, who end it in order
            pass_fds=[theirs.fileno() for _, theirs in pairs.values()],
        )
    streams = []
    for ours, theirs in pairs.values():
        theirs.close()
        streams.append(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
    return process, streams[0], streams[1]


async def acceleration_of(stack: Stack) -> Acceleration:
    """What guests run with on this host, unless told otherwise."""
    return await choose(stack, partial(_boots, stack))


async def _boots(stack: Stack, acceleration: Acceleration) -> bool:
    kernel = next(iter(stack.kernels))
    try:
        async with boot(
            stack, kernel, memory="256M", timeout_s=10, modprobe=(), acceleration=acceleration
        ):
            return True
    except (GuestBootError, QemuDied):
        return False


def _keep_logs(guest: Guest, cache: Path) -> Path:
    """Copy the logs of a failed guest to where they outlive it; the oldest make room."""
    failures = cache / "failures"
    failures.mkdir(exist_ok=True)
    for old in sorted(failures.iterdir())[: -(_KEPT_FAILURES - 1)]:
        shutil.rmtree(old, ignore_errors=True)
    kept = failures / f"{time.strftime('%Y%m%dT%H%M%S')}-{guest.pid}"
    kept.mkdir()
    for name in ("console.log", "qemu.log"):
        if (guest.folder / name).exists():
            shutil.copy(guest.folder / name, kept / name)
    return kept


@asynccontextmanager
async def boot(
    stack: Stack,
    kernel: str = "6.12",
    memory: str = "1G",
    smp: int = 2,
    devices: Sequence[str] = (),
    append: str = "",
    *,
    max_memory: str | None = None,
    nodes: int = 1,
    shared: bool = True,
    modprobe: Sequence[str] = ("virtio_balloon",),
    timeout_s: float = BOOT_TIMEOUT_S,
    acceleration: Acceleration | None = None,
) -> AsyncIterator[Guest]:
    """A running guest, its agent answering and the `modprobe` modules loaded.

    `devices` are further QEMU options; `append` goes to the kernel's command line; `max_memory`
    ("16G") opens a hot-plug range for window_device(); `nodes` is how many NUMA nodes the guest
    has; `shared`: the RAM is seen by others than QEMU. Raises GuestBootError if it does not come
    up within `timeout_s`, and QemuDied at the end if QEMU ended by itself meanwhile.
    """
    chosen = acceleration or await acceleration_of(stack)
    machine = Machine(
        stack.kernel(kernel), memory, max_memory, smp, append, tuple(devices), nodes, shared
    )
    folder = Path(tempfile.mkdtemp(prefix="vhostd-vm-"))
    try:
        command = [*stack.qemu.command, *chosen.options, *machine.options(folder)]
        guest = Guest(machine.kernel, folder, command, modprobe)
        try:
            async with AsyncExitStack() as held:
                await guest.attach(held, timeout_s)
                yield guest
                await guest.check_alive()
        except Exception as error:
            kept = _keep_logs(guest, stack.cache)
            if not isinstance(error, GuestBootError):
                error.add_note(guest.describe())
            error.add_note(f"whole logs: {kept}")
            raise
        finally:
            await guest.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
