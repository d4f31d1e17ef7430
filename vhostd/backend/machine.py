"""The machine around a VM's devices: the one place that says whether memory may be discarded.

Hears the monitor, records its verdict, and tells the devices. Until it has spoken nothing may be
discarded. Must not know messages, or what a device does with a verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vhostd.backend.journal import Journal
from vhostd.backend.monitor import Monitor
from vhostd.devices.balloon import Balloon
from vhostd.devices.base import Effects
from vhostd.devices.mem import Mem
from vhostd.devices.verdict import NOBODY_CHECKS, Verdict
from vhostd.log import LogEvent

JsonObject = dict[str, Any]


class Machine:
    """One VM's machine (monitor.MonitorOwner).

    Attributes:
        monitor: its VMM's, or None where none is configured.
        unshared: memory backends of which the VMM says that they are not shared with us.
    """

    def __init__(
        self,
        qmp: Path | None,
        balloon: Balloon | None,
        mems: Mapping[str, Mem],
        perform: Callable[[str, Effects], None],
        connected: Callable[[], int],
        commit: Callable[[Verdict], None],
        journal: Journal,
        recorded: Verdict | None,
    ) -> None:
        """Tell the devices what is known before any of them is served.

        Args:
            balloon, mems: the devices that discard.
            perform: carries out what a device wants.
            connected: how many devices a VMM is connected to.
            commit: records a verdict.
            recorded: a predecessor's verdict. A reason not to discard stays; that there was none
                may have changed meanwhile.
        """
        self.monitor = None if qmp is None else Monitor(qmp, self, journal)
        self._qmp = qmp
        self._judged: dict[str, Balloon | Mem] = {
            **({} if balloon is None else {"balloon": balloon}),
            **mems,
        }
        self._mems = mems
        self._perform = perform
        self._connected = connected
        self._commit = commit
        self._journal = journal
        self.unshared: Sequence[str] = ()
        self._verdict = NOBODY_CHECKS
        if qmp is not None:
            self._verdict = self._unheard if recorded is None else recorded.lost(self._silent)
        for device in self._judged.values():
            device.on_verdict(self._verdict)

    @property
    def _silent(self) -> str:
        return f"the VMM has not answered yet at {self._qmp}"

    @property
    def _unheard(self) -> Verdict:
        return Verdict().lost(self._silent)

    @property
    def vmm_present(self) -> bool:
        """A VMM is connected to one of the devices."""
        return self._connected() > 0

    def on_connected(self, *, resumed: bool) -> None:
        """A VMM is connected to one more device; resumed: a predecessor served it already."""
        if self.monitor is None:
            return
        if not resumed:
            # Another VMM, maybe, whose memory is pinned though that of the last one was not.
            self._judge(self._unheard)
            self.unshared = ()
        self.monitor.vmm_connected(first=self._connected() == 1)

    def stop_vm(self, why: str) -> None:
        """Have the VMM pause the VM."""
        if self.monitor is None:
            self._journal.log.error(
                LogEvent.VM_NOT_STOPPED, why=why, reason="no QMP socket is configured"
            )
        else:
            self.monitor.stop_vm(why)

    # -- what the monitor says -----------------------------------------------------------------

    def on_system_reset(self) -> None:
        """The machine was reset: no memory of a window is in use any more."""
        for name, mem in self._mems.items():
            self._perform(name, mem.on_system_reset())

    def on_machine(self, pinning: Sequence[str], encryption: str | None) -> None:
        """Give no memory back while devices pin it; change nothing about encrypted memory."""
        self._judge(Verdict.of_machine(pinning, encryption))

    def on_memory_backends(self, unshared: Sequence[str]) -> None:
        """What a guest writes to them is not what vhostd reads."""
        if unshared == self.unshared:
            return
        self.unshared = unshared
        if not unshared:
            return
        told = {"backends": list(unshared)}
        self._journal.guest_caused(
            "unshared",
            LogEvent.MEMORY_UNSHARED,
            **told,
            consequence="requests of the guest that lie in it can't be served: give it share=on",
        )
        self._journal.publish(LogEvent.MEMORY_UNSHARED, told)

    def on_unreachable(self, why: str) -> None:
        """Nobody can say any more whether a device that pins memory was plugged."""
        self._judge(self._verdict.lost(why))

    def _judge(self, verdict: Verdict) -> None:
        if verdict == self._verdict:
            return
        self._verdict = verdict
        # Recorded before anything is discarded because of it.
        self._commit(verdict)
        told = {"finding": verdict.finding.value, "why": verdict.inhibited}
        self._journal.guest_caused("verdict", LogEvent.VERDICT, **told)
        self._journal.publish(LogEvent.VERDICT, told)
        for name, device in self._judged.items():
            self._perform(name, device.on_verdict(verdict))

    # -- what an operator sees -----------------------------------------------------------------

    def status(self) -> JsonObject:
        """Whether memory is given back to the host, and why not."""
        verdict = self._verdict
        return {
            "allowed": verdict.may_discard,
            "finding": verdict.finding.value,
            "why": verdict.inhibited,
        }
