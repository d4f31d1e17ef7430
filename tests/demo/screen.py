"""What the demo shows: bars on a terminal, one plain line a second elsewhere.

Knows numbers and steps. Must not know guests, sockets or vhostd.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from vhostd.units import MiB

BAR_COLUMNS = 40


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at everything; all sizes in bytes."""

    guest_total: int
    guest_free: int
    balloon_target: int
    balloon_actual: int
    plugged: int
    reported: int
    host: int


@dataclass(slots=True)
class Step:
    """One thing the demo does. verdict is None while it runs, "" when it is done and right."""

    asked: str
    guest_saw: str = ""
    host_got: str = ""
    verdict: str | None = None


@dataclass(slots=True)
class Screen:
    """The live view. Every method may be called at any time between start() and stop()."""

    memory_size: int
    console: Console = field(default_factory=Console)
    steps: list[Step] = field(default_factory=list)
    note: str = ""
    sample: Sample | None = None
    _live: Live | None = None
    _began: float = field(default_factory=time.monotonic)
    _last_line: str = ""

    def start(self) -> None:
        """Take the terminal, if there is one."""
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=8, transient=True)
            self._live.start()

    def stop(self) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, note: str) -> None:
        """What is happening now, in one line."""
        self.note = note
        self._line(note)
        self._refresh()

    def show(self, sample: Sample) -> None:
        """New numbers."""
        self.sample = sample
        self._line(
            f"  guest total {sample.guest_total // MiB:5} free {sample.guest_free // MiB:5}"
            f" | balloon target {sample.balloon_target // MiB:4} actual"
            f" {sample.balloon_actual // MiB:4} | plugged {sample.plugged // MiB:4}"
            f" | reported {sample.reported // MiB:5} | host {sample.host // MiB:5} MiB"
        )
        self._refresh()

    def _line(self, text: str) -> None:
        if self._live is None and text != self._last_line:
            self._last_line = text
            print(f"{time.monotonic() - self._began:5.1f} s  {text}", flush=True)

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)

    def _picture(self) -> RenderableType:
        parts: list[RenderableType] = [self._progress()]
        if self.sample is not None:
            parts.append(self._bars(self.sample))
        parts.append(Text(f"▶ {self.note}", style="bold"))
        title = f"vhostd demo · {time.monotonic() - self._began:.0f} s"
        return Panel(Group(*parts), title=title, padding=(0, 1))

    def _progress(self) -> Text:
        text = Text()
        for step in self.steps:
            mark, style = ("…", "yellow")
            if step.verdict is not None:
                mark, style = ("✗", "red") if step.verdict else ("✓", "green")
            text.append(f" {mark} {step.asked}\n", style=style)
        return text

    def _bars(self, sample: Sample) -> Table:
        table = Table.grid(padding=(0, 1))
        for name, value, style in (
            ("guest MemTotal", sample.guest_total, "blue"),
            ("guest MemFree", sample.guest_free, "cyan"),
            ("balloon target", sample.balloon_target, "magenta"),
            ("balloon actual", sample.balloon_actual, "magenta"),
            ("plugged by virtio-mem", sample.plugged, "yellow"),
            ("host memory of the guest", sample.host, "green"),
        ):
            filled = min(BAR_COLUMNS, value * BAR_COLUMNS // self.memory_size)
            bar = Text("█" * filled, style=style) + Text("░" * (BAR_COLUMNS - filled), style="dim")
            table.add_row(name, bar, f"{value // MiB:5} MiB")
        table.add_row("reported free so far", "", f"{sample.reported // MiB:5} MiB")
        return table

    def summary(self) -> bool:
        """Print what was asked, seen and got; True when every step came out right."""
        table = Table(title="vhostd demo: what came out", title_justify="left")
        for heading in ("asked", "the guest saw", "the host got", "verdict"):
            table.add_column(heading, overflow="fold")
        for step in self.steps:
            verdict = "not reached" if step.verdict is None else step.verdict or "ok"
            style = "green" if step.verdict == "" else "red"
            table.add_row(step.asked, step.guest_saw, step.host_got, Text(verdict, style=style))
        wide = self.console if self.console.is_terminal else Console(file=sys.stdout, width=140)
        wide.print(table)
        fine = all(step.verdict == "" for step in self.steps)
        took = f"{time.monotonic() - self._began:.0f} s"
        wide.print(Text(f"ok, in {took}" if fine else f"failed, in {took}", style="bold"))
        return fine
