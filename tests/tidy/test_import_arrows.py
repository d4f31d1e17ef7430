"""Who may import whom: the tree shows a message's way, and this keeps it true."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vhostd"

# Room -> what it may import of ours. Leaves (errors, units, fds) are open to all.
LEAVES = {"errors", "units", "fds", "__version__"}
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
        "log", "config", "config_devices", "qmp",
    },
    "metrics": {"control"},
    "keeper": {"systemd"},
    "handover": {"session", "systemd", "log"},
    "control": {"metrics", "config", "log", "images"},
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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    allowed = ARROWS[room] | LEAVES | {room}
    ours = {name.split(".")[1] for name in imports_of(path) if name.startswith("vhostd.")}
    assert ours - allowed == set()


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.relative_to(PACKAGE).parts[0] in PURE],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_the_core_does_no_io(path: Path) -> None:
    assert {name.split(".")[0] for name in imports_of(path)} & NOT_PURE == set()


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_only_the_native_room_sees_cffi(path: Path) -> None:
    if path.relative_to(PACKAGE).parts[0] != "_native":
        assert "cffi" not in {name.split(".")[0] for name in imports_of(path)}
