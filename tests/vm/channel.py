"""The host's end of the guest agent's serial line: commands in, output and exit status out.

The frames are described in agent.c. The line outlives reboots: whatever was under way then fails,
and nothing is believed until the agent of the next boot has announced itself.
This file must not know how the guest was started.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

import trio

# A command that says more than this is a mistake in the test, not something to collect.
MAX_OUTPUT = 16 * 1024 * 1024
_HEADER = re.compile(rb"\x01([a-z]+) (\d+) (\d+)\n")
_READY = b"\x01ready 0 "


class GuestCommandError(Exception):
    """A command in the guest failed, timed out or vanished; the text has what it printed.

    Attributes:
        status: exit status (128 + signal number if killed), None if it never ended.
        output: what it printed until then.
    """

    def __init__(self, text: str, status: int | None, output: str) -> None:
        super().__init__(f"{text}\n{output}".rstrip())
        self.status = status
        self.output = output


@dataclass(frozen=True)
class Boot:
    """What the agent says of the boot it runs in."""

    release: str
    boot_id: str


class GuestProcess:
    """A command running in the guest, with its standard input kept open."""

    def __init__(self, channel: "CommandChannel", identifier: int, command: str) -> None:
        self.command = command
        self.status: int | None = None
        self._channel = channel
        self._identifier = identifier
        self._failure: str | None = None
        self._output = bytearray()
        self._read = 0
        self._changed = trio.lowlevel.ParkingLot()

    @property
    def output(self) -> str:
        """All it has printed so far, standard error included."""
        return self._output.decode(errors="replace")

    async def wait(self, timeout_s: float = 30) -> str:
        """Wait for its end, return all it printed. Raises GuestCommandError unless it exited 0."""
        await self._until(lambda: self.status is not None, "did not end", timeout_s)
        if self.status != 0:
            raise GuestCommandError(
                f"guest command exited {self.status}: {self.command}", self.status, self.output
            )
        return self.output

    async def read_line(self, timeout_s: float = 30) -> str:
        """The next line it prints, without the newline.

        Raises GuestCommandError if it ends, or `timeout_s` pass, without another line.
        """

        def line_is_there() -> bool:
            return self._output.find(b"\n", self._read) >= 0

        await self._until(
            lambda: line_is_there() or self.status is not None, "printed no line", timeout_s
        )
        if not line_is_there():
            raise GuestCommandError(
                f"guest command exited {self.status} without another line: {self.command}",
                self.status,
                self.output,
            )
        end = self._output.index(b"\n", self._read)
        line = self._output[self._read : end].decode(errors="replace")
        self._read = end + 1
        return line

    async def write_line(self, line: str) -> None:
        """Send `line` and a newline to its standard input."""
        await self.write(line.encode() + b"\n")

    async def write(self, data: bytes) -> None:
        """Send `data`, at most 32 KiB, to its standard input."""
        # The guest's tty layer drops what exceeds its 64 KiB of slack.
        if len(data) > 32768:
            raise ValueError(f"{len(data)} bytes at once to a guest's standard input")
        await self._channel.send("input", self._identifier, data)

    async def ask(self, line: str, timeout_s: float = 30) -> str:
        """Send `line`, return the next line it prints."""
        await self.write_line(line)
        return await self.read_line(timeout_s)

    async def close_input(self) -> None:
        """Let it read the end of its standard input."""
        await self._channel.send("eof", self._identifier)

    async def kill(self) -> None:
        """Kill it and what it started (SIGKILL to its process group)."""
        await self._channel.send("kill", self._identifier)

    async def _until(self, holds: Callable[[], bool], complaint: str, timeout_s: float) -> None:
        with trio.move_on_after(timeout_s) as scope:
            while not holds() and self._failure is None:
                await self._changed.park()
        if holds():
            return
        reason = self._failure
        if reason is None and scope.cancelled_caught:
            reason = f"guest command {complaint} within {timeout_s:g} s"
        raise GuestCommandError(f"{reason}: {self.command}", self.status, self.output)

    def accept_output(self, data: bytes) -> None:
        """The channel's: bytes it printed."""
        self._output += data
        if len(self._output) > MAX_OUTPUT:
            self.fail(f"guest command printed more than {MAX_OUTPUT} bytes")
        self._changed.unpark_all()

    def accept_exit(self, status: int) -> None:
        """The channel's: it has ended."""
        self.status = status
        self._changed.unpark_all()

    def fail(self, reason: str) -> None:
        """The channel's: nothing more will be heard of it."""
        if self.status is None and self._failure is None:
            self._failure = reason
        self._changed.unpark_all()


class CommandChannel:
    """The serial line with the agent at its other end."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.failure: str | None = None
        self._stream = stream
        self._sending = trio.Lock()
        self._received = bytearray()
        self._identifiers = itertools.count(1)
        self._processes: dict[int, GuestProcess] = {}
        self._boot: Boot | None = None
        self._changed = trio.lowlevel.ParkingLot()

    async def read(self) -> None:
        """Take in what the guest sends, until QEMU closes the line. Runs in the background."""
        try:
            async for data in self._stream:
                self._received += data
                await self._take_frames()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # QEMU was killed: the same end as an orderly one
        self._give_up("QEMU has ended")
        self.failure = "QEMU has ended"
        self._changed.unpark_all()

    async def wait_ready(self) -> Boot:
        """Wait until the agent of the present boot answers. Raises GuestCommandError if QEMU ends.

        Has no time limit of its own.
        """
        while self._boot is None:
            if self.failure is not None:
                raise GuestCommandError(f"no guest to talk to: {self.failure}", None, "")
            await self._changed.park()
        return self._boot

    def expect_boot(self, reason: str) -> None:
        """The guest is rebooting: fail what runs there and believe nothing until it announces."""
        self._give_up(reason)
        self._boot = None
        self._received.clear()

    async def start(self, command: str) -> GuestProcess:
        """Run `command` with the guest's sh and keep its standard input open."""
        return await self._begin("start", command)

    async def run(self, command: str, timeout_s: float) -> str:
        """Run `command` with the guest's sh, return all it printed. Raises GuestCommandError.

        It is killed in the guest if `timeout_s` pass or the call is cancelled.
        """
        process = await self._begin("run", command)
        try:
            return await process.wait(timeout_s)
        finally:
            if process.status is None and self.failure is None and self._boot is not None:
                with trio.move_on_after(1, shield=True):
                    await process.kill()

    async def _begin(self, verb: str, command: str) -> GuestProcess:
        await self.wait_ready()
        identifier = next(self._identifiers)
        process = GuestProcess(self, identifier, command)
        self._processes[identifier] = process
        await self.send(verb, identifier, command.encode())
        return process

    async def send(self, verb: str, identifier: int, payload: bytes = b"") -> None:
        """Send one frame. Raises GuestCommandError if QEMU has ended."""
        frame = b"\x01%s %d %d\n%s" % (verb.encode(), identifier, len(payload), payload)
        async with self._sending:
            try:
                await self._stream.send_all(frame)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise GuestCommandError("no guest to talk to: QEMU has ended", None, "") from error

    def _give_up(self, reason: str) -> None:
        for process in self._processes.values():
            process.fail(reason)
        self._processes.clear()

    async def _take_frames(self) -> None:
        while True:
            if self._boot is None:
                start = self._received.find(_READY)
                if start < 0:
                    # Firmware and kernel may chatter on the line; keep what may be the beginning.
                    del self._received[: -len(_READY)]
                    return
                del self._received[:start]
            header = _HEADER.match(self._received)
            if header is None:
                return
            end = header.end() + int(header[3])
            if len(self._received) < end:
                return
            payload = bytes(self._received[header.end() : end])
            verb, identifier = header[1].decode(), int(header[2])
            del self._received[:end]
            await self._handle(verb, identifier, payload)

    async def _handle(self, verb: str, identifier: int, payload: bytes) -> None:
        if verb == "ready":
            self._give_up("the guest rebooted")
            await self.send("hello", 0)
            self._boot = Boot(*payload.decode().split())
            self._changed.unpark_all()
            return
        process = self._processes.get(identifier)
        if process is None:
            return
        if verb == "output":
            process.accept_output(payload)
        elif verb == "exit":
            del self._processes[identifier]
            process.accept_exit(int(payload))
