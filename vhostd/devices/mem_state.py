"""What of a virtio-mem device outlives its process, as plain data. Knows shapes and limits only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from vhostd.devices.base import JsonObject
from vhostd.devices.mem_answers import Executed
from vhostd.devices.mem_blocks import Change, RecordedBlocks, Run
from vhostd.devices.mem_window import MemOptions


class MemState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a successor process needs; runs are [first block, blocks], sizes bytes.

    recent: see Answers; withheld: see Plugging.
    """

    size: int
    block_size: int
    requested_size: int
    usable_size: int
    plugged: list[Run]
    recent: list[Executed]
    violations: int
    withheld: list[Run] = []


class LastingMem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What outlives the host, too; bytes. configured: what the configuration asked for then."""

    configured: int
    requested_size: int


def decode_lasting(lasting: JsonObject) -> LastingMem:
    """Check what lasted.

    Raises:
        ValueError: it is none.
    """
    try:
        return msgspec.convert(lasting, LastingMem)
    except msgspec.ValidationError as error:
        raise ValueError(f"not what lasts of a virtio-mem device: {error}") from error


def decode(saved: JsonObject, options: MemOptions) -> MemState:
    """Check saved state against the device it is for.

    Raises:
        ValueError: it is none, or of another window.
    """
    try:
        state = msgspec.convert(saved, MemState)
    except msgspec.ValidationError as error:
        raise ValueError(f"not a virtio-mem device's saved state: {error}") from error
    if (state.size, state.block_size) != (options.size, options.block_size):
        raise ValueError("the saved state is of a window of another size or block size")
    sizes = (state.requested_size, state.usable_size)
    if any(size % state.block_size or not 0 <= size <= state.size for size in sizes):
        raise ValueError("a saved size is no multiple of the block size, or too large")
    if state.requested_size > state.usable_size:
        raise ValueError("more was requested than is usable")
    return state


def decode_runs(runs: Sequence[Run], block_count: int) -> RecordedBlocks:
    """The set that was saved as runs.

    Raises:
        ValueError: some lie outside the window.
    """
    result = RecordedBlocks(block_count)
    for first, count in runs:
        if first < 0 or count < 1 or first + count > block_count:
            raise ValueError("saved blocks lie outside the window")
        result.add(first, count)
    return result


class KeptBlocks:
    """Which blocks are plugged and which are withheld, beside the rest (base.LargeState).

    The bytes: one for each block, 1 if it is plugged; then one for each, 1 if it is withheld.
    """

    def __init__(
        self,
        plugged: RecordedBlocks,
        withheld: RecordedBlocks,
        save_rest: Callable[[], JsonObject],
    ) -> None:
        """save_rest: what else a successor needs."""
        self._plugged = plugged
        self._withheld = withheld
        self.save_rest = save_rest

    def take_changes(self) -> list[Change]:
        """See base.LargeState."""
        behind = len(self._plugged)
        withheld = self._withheld.take_changes()
        return [
            *self._plugged.take_changes(),
            *((behind + first, count, value) for first, count, value in withheld),
        ]

    def content(self) -> bytes:
        """See base.LargeState."""
        return self._plugged.content() + self._withheld.content()

    def load_content(self, content: bytes) -> None:
        """See base.LargeState."""
        count = len(self._plugged)
        self._plugged.load(content[:count])
        self._withheld.load(content[count:])
