"""Lines, functions and files stay small enough to read in one go."""

import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
COLUMNS_MAX = 100
FUNCTION_LINES_MAX = 60
FILE_LINES_MAX = 400


def tracked(*patterns: str) -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [ROOT / name for name in listing.stdout.split() if (ROOT / name).exists()]


SOURCES = tracked("*.py", "*.c", "*.h")
PYTHON = [path for path in SOURCES if path.suffix == ".py"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_files_fit() -> None:
    wrong: list[str] = []
    for path in SOURCES:
        lines = path.read_text().splitlines()
        if len(lines) > FILE_LINES_MAX:
            wrong.append(f"{name_of(path)}: {len(lines)} lines")
        wrong += [
            f"{name_of(path)}:{number}: {len(line)} columns"
            for number, line in enumerate(lines, 1)
            if len(line) > COLUMNS_MAX
        ]
    assert wrong == []


def test_functions_fit_and_files_say_what_they_are() -> None:
    wrong: list[str] = []
    for path in PYTHON:
        tree = ast.parse(path.read_text())
        if tree.body and not ast.get_docstring(tree):
            wrong.append(f"{name_of(path)}: no docstring")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > FUNCTION_LINES_MAX:
                    wrong.append(f"{name_of(path)}:{node.lineno}: {node.name}: {size} lines")
    assert wrong == []


def test_nothing_speaks_of_one_machine() -> None:
    """Absolute paths of a developer's machine do not belong into the project."""
    found = subprocess.run(
        ["git", "grep", "-nE", "/(work|farm|root)/[a-z]", "--", ".", ":!tests/tidy"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == ""
