"""Which memfd of a QEMU is which memory backend.

QEMU calls every one of them memory-backend-memfd, so the way goes from the backend's name to its
address in QEMU, from there to the inode mapped, and to the open file of that inode.
This file must not know what the memory is used for.
"""

import re
from pathlib import Path

from vhostd.qmp import QmpClient


def _inode_mapped_at(pid: int, address: int) -> int | None:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, _, _, _, inode, *_ = line.split()
        start, end = (int(part, 16) for part in span.split("-"))
        if start <= address < end:
            return int(inode)
    return None


def _memfds(pid: int) -> dict[int, Path]:
    """QEMU's open memfds by inode."""
    found: dict[int, Path] = {}
    for entry in sorted(Path(f"/proc/{pid}/fd").iterdir(), key=lambda path: int(path.name)):
        try:
            if str(entry.readlink()).startswith("/memfd:"):
                found.setdefault(entry.stat().st_ino, entry)
        except FileNotFoundError:
            continue  # closed between listing and looking
    return found


# "Block Name    PSize    Offset    Used    Total    HVA    RO"; the name may be empty.
_BLOCK = re.compile(
    r"\s*(?P<name>\S*?)\s+\d+ [KMG]iB\s+0x(?P<offset>[0-9a-f]+)\s+0x[0-9a-f]+"
    r"\s+0x(?P<size>[0-9a-f]+)\s+0x(?P<address>[0-9a-f]+)\s+r[wo]\s*"
)


async def memory_backends(qmp: QmpClient, pid: int) -> dict[str, Path]:
    """The memory backends of QEMU process `pid` that are memfds: name -> /proc/PID/fd/N.

    QEMU leaves blocks without a name that belong to a device which cannot migrate (a hidden
    window): those are told apart by their size, and equal ones by their order.
    """
    table = (await qmp.execute("x-query-ramblock"))["human-readable-text"]
    sizes = {device["id"]: device["size"] for device in await qmp.execute("query-memdev")}
    memfds = _memfds(pid)
    found: dict[str, Path] = {}
    unnamed: list[tuple[int, int, Path]] = []
    for block in filter(None, map(_BLOCK.fullmatch, table.splitlines())):
        file = memfds.get(_inode_mapped_at(pid, int(block["address"], 16)) or 0)
        if file is None:
            continue
        name = block["name"].removeprefix("/objects/")
        if name:
            found[name] = file
        else:
            unnamed.append((int(block["offset"], 16), int(block["size"], 16), file))
    for _, size, file in sorted(unnamed):
        candidates = sorted(n for n, s in sizes.items() if s == size and n not in found)
        if candidates:
            found[candidates[0]] = file
    return found
