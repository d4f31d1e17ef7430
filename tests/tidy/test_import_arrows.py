"""Who may import whom: the tree shows a message's way, and this keeps it true."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vhostd"

# Room -> what it may import of ours. Leaves (errors, flags, units, fds) are open to all.
LEAVES = {"errors", "flags", "units", "fds", "__version__"}
ARROWS: dict[str, set[str]] = {
    "transport": {"protocol"},
    "protocol": set(),
    "session": {"protocol"},
    "devices": {"protocol"},
    "_native": set(),
    "memory": {"_native", "handover"},
    "images": {"_native"},
    "backend": {
        "transport", "protocol", "session", "devices", "memory", "images", "handover", "_native",
        "log", "config", "config_devices", "open_files", "qmp",
    },
    "metrics": {"control"},
    "keeper": {"systemd"},
    "handover": {"session", "systemd", "log"},
    "control": {"metrics", "config", "log", "images", "systemd"},
}  # fmt: skip
PURE = {"protocol", "session", "devices"}
NOT_PURE = {"trio", "cffi", "time", "socket", "asyncio", "threading"}


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


FILES = sorted(path for room in ARROWS for path in (PACKAGE / room).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def test_a_room_imports_only_what_it_may() -> None:
    wrong: dict[str, set[str]] = {}
    for path in FILES:
        allowed = ARROWS[room_of(path)] | LEAVES | {room_of(path)}
        ours = {name.split(".")[1] for name in imports_of(path) if name.startswith("vhostd.")}
        if ours - allowed:
            wrong[name_of(path)] = ours - allowed
    assert wrong == {}


def test_the_core_does_no_io() -> None:
    wrong: dict[str, set[str]] = {}
    for path in FILES:
        impure = {name.split(".")[0] for name in imports_of(path)} & NOT_PURE
        if room_of(path) in PURE and impure:
            wrong[name_of(path)] = impure
    assert wrong == {}


def test_only_the_native_room_sees_cffi() -> None:
    seers = {
        room_of(path)
        for path in PACKAGE.rglob("*.py")
        if "cffi" in {name.split(".")[0] for name in imports_of(path)}
    }
    assert seers == {"_native"}
