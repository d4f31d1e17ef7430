"""What lasts of one VM, written to the state directory when it changes.

Promise: nobody waits for the disk. Must not know what the devices' entries mean.
"""

from __future__ import annotations

import trio

from vhostd.devices.base import JsonObject
from vhostd.errors import HostError
from vhostd.handover.state_dir import StateDir
from vhostd.log import LogEvent, get_logger


class Lasting:
    """One VM's entries, by device.

    Attributes:
        why_not: why what is set does not outlive the host; None: it does.
    """

    def __init__(self, directory: StateDir, vm_name: str) -> None:
        """Read what there is; blocks as long as the disk likes."""
        self._directory = directory
        self.why_not = directory.why_not
        self._vm_name = vm_name
        self._entries = directory.read(vm_name)
        self._changed = trio.Event()

    def of(self, device: str) -> JsonObject | None:
        """What lasted of a device; None: nothing."""
        return self._entries.get(device)

    def note(self, device: str, entry: JsonObject) -> None:
        """This is to last."""
        if self._entries.get(device) != entry:
            self._entries[device] = entry
            self._changed.set()

    async def run(self) -> None:
        """Write what changes, until cancelled; then what is still to be written."""
        try:
            while True:
                await self._changed.wait()
                self._changed = trio.Event()
                entries = dict(self._entries)
                await trio.to_thread.run_sync(self._write, entries)
        finally:
            self.write_rest()

    def write_rest(self) -> None:
        """Write what is not written yet; blocks as long as the disk likes."""
        if self._changed.is_set():
            self._changed = trio.Event()
            self._write(dict(self._entries))

    def _write(self, entries: dict[str, JsonObject]) -> None:
        try:
            self._directory.write(self._vm_name, entries)
            self.why_not = self._directory.why_not
        except HostError as error:
            self.why_not = str(error)
            get_logger(vm=self._vm_name).error(
                LogEvent.HOST_ERROR,
                error=str(error),
                consequence="what was set since does not outlive the host",
            )
