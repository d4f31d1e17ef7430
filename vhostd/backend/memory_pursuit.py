"""How a VM gets to the size `memory set` asked for: memory devices first, then the balloon.

Knows the plan's devices. Must not know connections, nor who asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from vhostd.backend.journal import Journal
from vhostd.devices.balloon import Balloon
from vhostd.devices.base import DeviceEvent, Effects, Refused
from vhostd.devices.mem import Mem
from vhostd.devices.memory_plan import MemoryGoal
from vhostd.log import LogEvent

GoalRecord: TypeAlias = tuple[int, int, bool]
"""MemoryGoal as plain data: boot memory and size in bytes, and whether its devices are done."""

GOAL_EVENTS: Final = (
    DeviceEvent.MEM_PLUGGED,
    DeviceEvent.MEM_UNPLUGGED_ALL,
    DeviceEvent.MEM_DISCARDED,
    DeviceEvent.MEM_STANDS_STILL,
)
"""After these the balloon may have another part of the goal to reach."""


class MemoryPursuit:
    """One VM's goal, or none."""

    def __init__(
        self,
        balloon: Balloon | None,
        mems: Mapping[str, Mem],
        perform: Callable[[Effects], None],
        commit: Callable[[GoalRecord | None], None],
        journal: Journal,
        goal: GoalRecord | None,
    ) -> None:
        """perform: what the balloon says; commit: records the goal; goal: a predecessor's."""
        self._balloon = balloon
        self._mems = mems
        self._perform = perform
        self._commit = commit
        self._journal = journal
        self._goal = None if goal is None else MemoryGoal(*goal)
        journal.listen(self._on_news)

    @property
    def size(self) -> int | None:
        """Bytes of usable memory that are aimed at; None: nothing is."""
        return None if self._goal is None else self._goal.size

    def begin(self, goal: MemoryGoal) -> None:
        """This is the goal from now on; go_on() does something about it."""
        self._goal = goal
        self._record()

    def give_up(self) -> None:
        """There is none from now on."""
        self._goal = None
        self._commit(None)

    def _record(self) -> None:
        goal = self._goal
        if goal is not None:
            self._commit((goal.boot_size, goal.size, goal.devices_done))

    def _on_news(self, vm_name: str, event: str, fields: Mapping[str, object]) -> None:
        del vm_name, fields
        if event == DeviceEvent.MEM_STANDS_STILL and self._goal is not None:
            self._goal.devices_done = True
        if event in GOAL_EVENTS:
            self.go_on()

    def go_on(self) -> None:
        """Set the balloon to what the memory devices leave, once they have done what they can."""
        goal = self._goal
        if goal is None or self._balloon is None:
            return
        if all(mem.settled for mem in self._mems.values()):
            goal.devices_done = True
        self._record()
        left = goal.balloon(sum(mem.plugged_size for mem in self._mems.values()))
        # More than RAM it can't take, however far the memory devices are.
        target = min(left, self._balloon.guest_memory_size or left)
        if target < self._balloon.target or (goal.devices_done and target != self._balloon.target):
            try:
                effects = self._balloon.set_target(target)
            except Refused as error:
                self.give_up()
                self._journal.log.warning(LogEvent.GOAL_GIVEN_UP, size=goal.size, why=str(error))
            else:
                self._perform(effects)
