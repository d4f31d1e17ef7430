"""Free page hinting: rounds of command ids in which a guest lists its free memory.

A hinted page may be written by the guest at any moment, even before its descriptor is used, so
without write tracking nothing may be discarded on a hint (virtio 1.x, 5.5.6.5: a page modified
since the command id was issued must stay). Blocks are therefore counted and given back.
Knows command ids; must not know config offsets.
"""

from __future__ import annotations

from enum import StrEnum
from struct import Struct
from typing import Final

from vhostd.devices.base import Chain, DeviceEvent, Effect, Event, JsonObject, Log, Refused
from vhostd.errors import GuestError

STOP: Final = 0
"""VIRTIO_BALLOON_CMD_ID_STOP: hints can't be used now; from the driver: it listed everything."""
DONE: Final = 1
"""VIRTIO_BALLOON_CMD_ID_DONE: the driver takes its hinted blocks back."""
FIRST_COMMAND: Final = 0x8000_0000
"""Where QEMU's ids start; the range below is its migration's old one."""
_LAST_COMMAND: Final = 0xFFFF_FFFF

COMMAND: Final = Struct("<I")


class HintPhase(StrEnum):
    """Where a round stands."""

    IDLE = "idle"
    REQUESTED = "requested"
    RUNNING = "running"


class Hinting:
    """The rounds of one balloon.

    Attributes:
        shown: the command id the config space must show: STOP, DONE or the round's id.
        command: id of the current or latest round; FIRST_COMMAND before any.
        driver_command: id the driver announced last; STOP when it is in no round.
        unanswered: ids that were shown and for which no STOP came; they may not be used again.
        blocks, size: listed in the current or latest round; size is in bytes.
        ignored_blocks: given back uncounted because they belong to no current round.
        rounds: rounds the guest finished.
        handled: position of the latest chain; it comes again if the ring stops before it is given
            back, and counts once.
    """

    def __init__(self) -> None:
        self.phase = HintPhase.IDLE
        self.shown = STOP
        self.command = FIRST_COMMAND
        self.driver_command = STOP
        self.unanswered: set[int] = set()
        self.blocks = 0
        self.size = 0
        self.ignored_blocks = 0
        self.rounds = 0
        self.handled: int | None = None

    def start(self) -> list[Effect]:
        """Open a round under an id that was not used before.

        Raises:
            Refused: a round is open.
        """
        if self.phase is not HintPhase.IDLE:
            raise Refused("a free page hinting round is under way; stop it first")
        self.command = self._next_command()
        self.unanswered.add(self.command)
        self.shown = self.command
        self.phase = HintPhase.REQUESTED
        self.blocks = 0
        self.size = 0
        return [Event(DeviceEvent.HINT_REQUESTED, {"command": self.command})]

    def stop(self) -> list[Effect]:
        """Break the round off: the guest takes all its memory back.

        Raises:
            Refused: no round is open.
        """
        if self.phase is HintPhase.IDLE:
            raise Refused("no free page hinting round is under way")
        return self._finish(complete=False)

    def on_chain(self, chain: Chain) -> list[Effect]:
        """Take a command id or a block; the chain itself is done with.

        Raises:
            GuestError: the command id's buffer does not hold 4 bytes.
        """
        if not chain.is_after(self.handled):
            return []
        self.handled = chain.position
        effects: list[Effect] = []
        if chain.readable_size:
            if chain.readable_size != COMMAND.size or len(chain.data) != COMMAND.size:
                raise GuestError(f"hint command of {chain.readable_size} bytes, not {COMMAND.size}")
            effects += self._on_command(COMMAND.unpack(chain.data)[0])
        if chain.writable_count:
            if self.phase is HintPhase.RUNNING and self.driver_command == self.command:
                self.blocks += chain.writable_count
                self.size += chain.writable_size
            else:
                self.ignored_blocks += chain.writable_count
        return effects

    def reset(self) -> None:
        """A new driver knows no earlier id and holds no block."""
        self.phase = HintPhase.IDLE
        self.shown = STOP
        self.driver_command = STOP
        self.unanswered.clear()
        self.handled = None

    def status(self) -> JsonObject:
        """{"phase", "command", "size" (bytes), "blocks", "ignored_blocks", "rounds"}."""
        return {
            "phase": self.phase.value,
            "command": self.command,
            "size": self.size,
            "blocks": self.blocks,
            "ignored_blocks": self.ignored_blocks,
            "rounds": self.rounds,
        }

    def _on_command(self, command: int) -> list[Effect]:
        if command == STOP:
            ended, self.driver_command = self.driver_command, STOP
            # The queue is in order: whatever was announced before this STOP is over as well.
            self.unanswered &= {self.command} if ended != self.command else set()
            if self.phase is HintPhase.RUNNING and ended == self.command:
                self.rounds += 1
                return self._finish(complete=True)
            return []
        self.driver_command = command
        if self.phase is HintPhase.REQUESTED and command == self.command:
            self.phase = HintPhase.RUNNING
            return [Event(DeviceEvent.HINT_STARTED, {"command": command})]
        if command != self.command:
            return [Log(DeviceEvent.HINT_FOREIGN_COMMAND, {"command": command})]
        return []

    def _finish(self, *, complete: bool) -> list[Effect]:
        self.phase = HintPhase.IDLE
        self.shown = DONE
        fields = {
            "command": self.command,
            "complete": complete,
            "size": self.size,
            "blocks": self.blocks,
        }
        return [Event(DeviceEvent.HINT_FINISHED, fields)]

    def _next_command(self) -> int:
        command = self.command
        while True:
            command = FIRST_COMMAND if command >= _LAST_COMMAND else command + 1
            if command not in self.unanswered:
                return command
