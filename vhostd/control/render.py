"""What vhostctl shows to people: tables of VMs, balloons and statistics.

JSON objects in, text on a rich console out. Must not know where they came from.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from vhostd.units import format_size

Object: TypeAlias = Mapping[str, Any]

PIPE_WIDTH: Final = 200
"""Columns where no terminal says otherwise: lines for grep are not folded."""

_STATE_STYLE: Final = {
    "waiting": "dim",
    "connected": "cyan",
    "running": "green",
    "stopped": "yellow",
    "quarantined": "bold red",
    "paused": "bold red",
}
_COUNTS: Final = ("faults", "hugetlb", "oom", "stalls", "tag")
"""Parts of the names of statistics that are no sizes."""


def show(content: Table | Text | str) -> None:
    """Print to standard output, with colours on a terminal only and no blanks at line ends."""
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)
    with console.capture() as captured:
        console.print(content)
    for line in captured.get().splitlines():
        print(line.rstrip())


def show_vms(vms: Sequence[Object]) -> None:
    """One row a VM."""
    rows = [("VM", "STATE", "PLUGGED", "TARGET", "ACTUAL", "DISCARDED", "GUEST FREE")]
    for vm in vms:
        balloon = vm.get("balloon", {})
        sizes = (
            sum(mem["plugged"] for mem in vm["mem"]) if vm["mem"] else None,
            *(balloon.get(key) for key in ("target", "actual", "discarded")),
            balloon.get("stats", {}).get("free_memory"),
        )
        rows.append((vm["vm"], vm["state"], *map(_size, sizes)))
    _show_columns(rows, left=2, style_of=lambda row: _STATE_STYLE.get(row[1], ""), styled=1)


def _show_columns(
    rows: Sequence[Sequence[str]],
    *,
    left: int,
    style_of: Callable[[Sequence[str]], str],
    styled: int,
) -> None:
    """Columns under a heading, a thousand rows at once: rich's Table takes 3 ms for each.

    Args:
        left: the columns that begin at their left; others end at their right.
        style_of: what style a row's column number `styled` has.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = Text(no_wrap=True, overflow="ignore")
    for number, row in enumerate(rows):
        cells = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        if number:
            before = len(text) + sum(width + 2 for width in widths[:styled])
            text.append("  ".join(cells).rstrip() + "\n")
            text.stylize(style_of(row), before, before + len(row[styled]))
        else:
            text.append("  ".join(cells).rstrip() + "\n", "bold")
    text.rstrip()
    show(text)


def show_vm(vm: Object) -> None:
    """One VM in full."""
    rows: list[tuple[str, Text | str]] = [
        ("VM", Text(vm["vm"])),
        ("state", Text(vm["state"], _STATE_STYLE.get(vm["state"], ""))),
    ]
    if paused := vm.get("paused"):
        rows.append(("paused", Text(paused, "bold red")))
        rows.append(("what to do", Text(vm.get("paused_remedy") or "")))
    if stuck := vm.get("stuck"):
        rows.append(("stuck", Text(stuck, "bold red")))
    if unshared := vm.get("unshared"):
        rows.append(("unshared memory", Text(unshared, "bold red")))
    if discards := vm.get("discards"):
        rows.append(("discards", _discards(discards)))
    if balloon := vm.get("balloon"):
        rows += [
            ("balloon target", _size(balloon["target"])),
            ("balloon actual", f"{_size(balloon['actual'])} (the guest's word)"),
            *([("balloon", Text(untold, "bold red"))] if (untold := balloon["untold"]) else []),
            ("inflated", _size(balloon["inflated"])),
            ("reported free", f"{_size(balloon['reported'])} ever"),
            ("discarded", f"{_size(balloon['discarded'])} ever"),
            *([("withheld", _withheld(balloon))] if balloon["withheld"] else []),
            ("features", ", ".join(balloon["features"]) or "none negotiated"),
        ]
    for mem in vm["mem"]:
        rows += _mem_rows(mem)
    for pmem in vm["pmem"]:
        rows += _pmem_rows(pmem)
    rows += [
        (f"queue {index}", Text(f"quarantined: {fault}", "bold red"))
        for index, fault in vm.get("faults", {}).items()
    ]
    _show_rows(rows)
    if balloon and balloon["stats"]:
        show("")
        age_s = max(0, round(time.time() - balloon["stats_received_s"]))
        show_statistics(balloon["stats"] | {"age_s": age_s})


def _withheld(balloon: Object) -> str:
    return f"{_size(balloon['withheld'])} ever given up or reported while nothing was discarded"


def _discards(discards: Object) -> Text | str:
    if discards["why"]:
        return Text(f"none: {discards['why']}", "bold yellow")
    if discards["finding"] == "unchecked":
        return "allowed; nobody checks whether memory is pinned: the VM has no qmp"
    return "allowed: nothing pins guest memory"


def _mem_rows(mem: Object) -> list[tuple[str, Text | str]]:
    name, plugged, requested = mem["id"], _size(mem["plugged"]), _size(mem["requested"])
    where = f"window of {_size(mem['size'])} at {mem['address']:#x}, guest node {mem['node']}"
    rows: list[tuple[str, Text | str]] = [
        (name, f"{plugged} plugged of {requested} requested: {mem['standing']}"),
        (f"{name} blocks", f"{_size(mem['block_size'])} each; {where}"),
    ]
    if mem["withheld"]:
        rows.append((f"{name} withheld", f"{_size(mem['withheld'])} unplugged and not given back"))
    if mem["violations"]:
        now = f"{_size(mem['violating_size'])} in unplugged blocks now"
        rows.append((f"{name} violations", Text(f"{mem['violations']} ever, {now}", "bold red")))
    return rows


def _pmem_rows(pmem: Object) -> list[tuple[str, Text | str]]:
    name = pmem["id"]
    bad = pmem["failed"] or pmem["removed"]
    kind = f"{pmem['mode']}{', read-only' if pmem['readonly'] else ''}"
    rows: list[tuple[str, Text | str]] = [
        (name, Text(f"{_size(pmem['size'])}, {kind}: {pmem['standing']}", "bold red" * bool(bad))),
        (f"{name} image", Text(pmem["file"])),
        (f"{name} flushes", f"{pmem['flushes']}, {pmem['flush_errors']} failed"),
    ]
    if pmem["cached"] is not None:
        cache = ", ".join(f"{_size(pmem[key])} {key}" for key in ("cached", "dirty", "writeback"))
        rows.append((f"{name} page cache", cache))
    return rows


def show_dropped(told: Object) -> None:
    """What dropping a page cache came to."""
    before, after = told["cached_before"], told["cached_after"]
    rows = [("page cache", f"{_size(before)} before, {_size(after)} now")]
    if told["why_not_all"]:
        rows.append(("not all", told["why_not_all"]))
    _show_rows(rows)


def show_checks(checks: Sequence[Object]) -> None:
    """One row for each thing looked at, and what to do below those that are not ok."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    styles = {"ok": "green", "warning": "yellow", "failed": "bold red"}
    for check in checks:
        verdict = check["verdict"]
        table.add_row(Text(verdict, styles[verdict]), Text(check["name"]), Text(check["found"]))
        if check["remedy"]:
            table.add_row("", "", Text(f"-> {check['remedy']}"))
    show(table)


def show_plan(plan: Object) -> None:
    """What was asked of whom for a guest to get to a size."""
    rows: list[tuple[str, Text | str]] = [("usable", _size(plan["size"]))]
    rows += [(name, f"{_size(requested)} requested") for name, requested in plan["mem"].items()]
    rows.append(("balloon", f"{_size(plan['balloon'])} to be given up"))
    _show_rows(rows)


def show_progress(statuses: Iterable[Object]) -> Object:
    """A memory device on its way: a bar on a terminal, a line for each change elsewhere.

    Returns:
        The last status.
    """
    last: Object = {}
    if not sys.stdout.isatty():
        for last in statuses:
            print(
                f"{last['id']}: {_size(last['plugged'])} of {_size(last['requested'])}", flush=True
            )
        return last
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[size]} of {task.fields[goal]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress:
        task = None
        for last in statuses:
            plugged, requested = last["plugged"], last["requested"]
            size, goal = _size(plugged), _size(requested)
            if task is None:
                start = plugged
                whole = abs(requested - start) or 1
                task = progress.add_task(last["id"], total=whole, size=size, goal=goal)
            done = whole - min(whole, abs(requested - plugged))
            progress.update(task, completed=done, size=size, goal=goal)
    return last


def show_statistics(statistics: Object) -> None:
    """What a guest says about its memory, and how long ago."""
    if not statistics:
        show("the guest has sent no statistics yet")
        return
    numbers = {name: value for name, value in statistics.items() if name != "age_s"}
    _show_rows(
        [
            ("age", f"{statistics['age_s']} s"),
            *(
                (name.replace("_", " "), str(value) if _is_count(name) else format_size(value))
                for name, value in numbers.items()
            ),
        ]
    )


def show_hint(hint: Object) -> None:
    """A free page hinting round."""
    _show_rows(
        [
            ("phase", hint["phase"]),
            ("hinted", f"{format_size(hint['size'])} in {hint['blocks']} blocks"),
            ("rounds finished", str(hint["rounds"])),
        ]
    )


def event_line(event: Object) -> str:
    """One event on one line: time, VM, name, and the rest as key=value."""
    moment = datetime.fromtimestamp(event["time_s"], UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    rest = " ".join(
        f"{key}={value}"
        for key, value in event.items()
        if key not in ("id", "time_s", "vm", "event")
    )
    return f"{moment} {event['vm']} {event['event']} {rest}".rstrip()


def _show_rows(rows: Sequence[tuple[str, Text | str]]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value if isinstance(value, Text) else Text(value))
    show(table)


def _is_count(name: str) -> bool:
    return any(part in name for part in _COUNTS)


def _size(size: int | None) -> str:
    return "-" if size is None else format_size(size)
