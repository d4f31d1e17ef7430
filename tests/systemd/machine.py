"""A machine whose PID 1 is systemd: namespaces on this host, no virtual one.

Knows unshare, nsenter and cgroup2. Must not know vhostd.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

BOOT_SCRIPT: Final = Path(__file__).parent / "boot_pid1.sh"
BOOT_TIMEOUT_S: Final = 60.0
COMMAND_TIMEOUT_S: Final = 60.0
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MASKED: Final = (
    "systemd-udevd.service", "systemd-udevd-control.socket", "systemd-udevd-kernel.socket",
    "systemd-udev-trigger.service", "systemd-networkd.service", "systemd-networkd.socket",
    "systemd-tmpfiles-setup-dev.service", "systemd-tmpfiles-setup-dev-early.service",
    "systemd-hwdb-update.service", "systemd-resolved.service", "systemd-timesyncd.service",
    "systemd-binfmt.service", "systemd-modules-load.service", "systemd-sysctl.service",
    "systemd-firstboot.service", "systemd-machine-id-commit.service", "systemd-sysusers.service",
    "ldconfig.service", "keyboard-setup.service", "console-setup.service", "apparmor.service",
    "dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount",
    "getty.target", "systemd-logind.service", "ssh.service", "plymouth-quit.service",
    "plymouth-quit-wait.service", "systemd-update-utmp-runlevel.service",
    "sys-kernel-tracing.mount", "sys-fs-fuse-connections.mount", "sys-kernel-config.mount",
)  # fmt: skip
"""Of the host itself, not of a service in namespaces."""


class MachineFailed(Exception):
    """systemd did not boot; the text is what it printed."""


class CommandFailed(Exception):
    """A command inside exited with another status than 0.

    Attributes:
        status: its exit code.
        output: what it printed, standard error included.
    """

    def __init__(self, words: Sequence[str], status: int, output: str) -> None:
        super().__init__(f"{' '.join(words)}: exit {status}: {output.strip()}")
        self.status = status
        self.output = output


def why_not() -> str | None:
    """Why no systemd can be booted here; None: it can be tried."""
    if os.geteuid() != 0:
        return "systemd as PID 1 in namespaces needs root"
    if _cgroup2() is None:
        return "no cgroup2 hierarchy is mounted"
    missing = [name for name in ("unshare", "nsenter") if shutil.which(name) is None]
    return f"{missing[0]} (util-linux) is not installed" if missing else None


def _cgroup2() -> Path | None:
    """Our own place in the cgroup2 hierarchy."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, target, kind, *_ = line.split()
        if kind == "cgroup2":
            own = Path("/proc/self/cgroup").read_text().splitlines()
            path = next(line.partition("::")[2] for line in own if line.startswith("0::"))
            return Path(target) / path.lstrip("/")
    return None


@dataclass
class Machine:
    """What is to be booted, then the running machine.

    Attributes:
        folder: everything of it is below.
        tree: the files it boots from.
        binds: source, target inside, and whether it may be written.
        pid: of its PID 1, as this host counts.
    """

    folder: Path
    tree: Path
    binds: list[tuple[Path, str, bool]] = field(default_factory=list)
    pid: int = 0

    def __post_init__(self) -> None:
        """Begin with no unit that is not the tests'."""
        self.shared = self.folder / "shared"
        self.shared.mkdir(parents=True)
        units = self.folder / "files/etc/systemd/system"
        units.mkdir(parents=True)
        for name in MASKED:
            (units / name).symlink_to("/dev/null")

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Put a file there before the boot."""
        inside = self.folder / "files" / path.lstrip("/")
        inside.parent.mkdir(parents=True, exist_ok=True)
        inside.write_text(text)
        inside.chmod(mode)

    def path(self, inside: str) -> Path:
        """A path inside the running machine, for programs outside."""
        return Path(f"/proc/{self.pid}/root") / inside.lstrip("/")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Machine]:
        """Boot it; it ends with the block, and everything in it.

        Raises:
            MachineFailed: it did not come up.
        """
        above = _cgroup2()
        assert above is not None, "see why_not()"
        cgroup = above / f"vhostd-test-{os.getpid()}-{self.folder.name}"
        cgroup.mkdir()
        binds = [f"{source} {at} {'rw' if rw else 'ro'}\n" for source, at, rw in self.binds]
        (self.folder / "binds").write_text("".join(binds))
        console = self.folder / "console.log"
        ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        ready.bind(str(self.shared / "ready"))
        with console.open("ab") as log:
            process = subprocess.Popen(  # noqa: ASYNC220  # returns at once
                [
                    *("setpriv", "--pdeathsig", "KILL", "--"),
                    *("bash", str(BOOT_SCRIPT), str(self.folder), str(self.tree), str(cgroup)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        try:
            with ready:  # not longer: PID 1 tells of each job there, and waits for who is slow
                await self._wait_booted(process, ready)
            yield self
        except Exception as error:
            error.add_note(console.read_text(errors="replace")[-4000:])
            raise
        finally:
            self._end(process, cgroup)

    async def _wait_booted(self, process: subprocess.Popen[bytes], ready: socket.socket) -> None:
        ready.setblocking(False)
        with trio.move_on_after(BOOT_TIMEOUT_S):
            while process.poll() is None:
                with trio.move_on_after(1.0):  # whether it died meanwhile
                    await trio.lowlevel.wait_readable(ready)
                    if b"READY=1" in ready.recv(4096).split(b"\n"):
                        self.pid = _only_child(process.pid)
                        return
        raise MachineFailed(f"systemd did not boot from {self.tree}")

    async def wait_end(self) -> None:
        """Wait until its PID 1 has ended."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            trio.lowlevel.notify_closing(pidfd)
            os.close(pidfd)

    def _end(self, process: subprocess.Popen[bytes], cgroup: Path) -> None:
        # The death of a namespace's PID 1 is that of all in it.
        with suppress(ProcessLookupError, IndexError):
            os.kill(_only_child(process.pid), signal.SIGKILL)
        process.kill()
        process.wait()
        for place, _, _ in os.walk(cgroup, topdown=False):
            _remove_cgroup(Path(place))

    async def run(self, *words: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Run a command inside as root; what it printed.

        Raises:
            CommandFailed: it exited with another status than 0.
        """
        with trio.fail_after(timeout_s):
            done = await trio.run_process(
                [
                    *("nsenter", "-t", str(self.pid), "-m", "-p", "-C", "-i", "-u", "-n"),
                    *("--root", "--wd", "env", "-i", f"PATH={PATH}", *words),
                ],
                capture_stdout=True,
                stderr=subprocess.STDOUT,
                check=False,
            )
        output = done.stdout.decode(errors="replace")
        if done.returncode != 0:
            raise CommandFailed(words, done.returncode, output)
        return output

    async def version(self) -> int:
        """Of its systemd, such as 252."""
        return int((await self.run("systemctl", "--version")).split()[1])

    async def property(self, unit: str, name: str) -> str:
        """A property of a unit, systemctl(1)."""
        return (await self.run("systemctl", "show", "--value", "-p", name, unit)).strip()

    async def journal(self, unit: str, *options: str) -> str:
        """What a unit printed, and what was said of it, up to now."""
        await self.run("journalctl", "--sync")  # what journald has not written yet
        return await self.run("journalctl", "--no-pager", "-o", "cat", "-u", unit, *options)

    def outer_pid(self, inner: int) -> int:
        """The number this host has for a process inside.

        Raises:
            ProcessLookupError: there is none.
        """
        ours = (self.path("/proc").parent.parent / "ns/pid").readlink()
        for path in Path("/proc").glob("[0-9]*/status"):
            with suppress(OSError):
                if (path.parent / "ns/pid").readlink() != ours:
                    continue
                line = next(x for x in path.read_text().splitlines() if x.startswith("NSpid:"))
                if int(line.split()[-1]) == inner:
                    return int(path.parent.name)
        raise ProcessLookupError(inner)


def _remove_cgroup(path: Path) -> None:
    """Its processes were killed: wait until the last is gone, as "populated" tells."""
    for _ in range(500):
        try:
            path.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            with (path / "cgroup.events").open() as events:
                events.read()
                # POLLPRI comes with a change, kernel's cgroup-v2.rst.
                poller = select.poll()
                poller.register(events, select.POLLPRI)
                poller.poll(20)
        else:
            return
    raise MachineFailed(f"{path} keeps processes that do not die")


def _only_child(pid: int) -> int:
    words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(words[0])
