"""Lines, functions and files stay small enough to read in one go."""

import ast
import subprocess
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_file_fits(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= FILE_LINES_MAX
    assert [number for number, line in enumerate(lines, 1) if len(line) > COLUMNS_MAX] == []


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_functions_fit_and_the_file_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text())
    long = [
        f"{node.name}: {(node.end_lineno or node.lineno) - node.lineno + 1} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or node.lineno) - node.lineno + 1 > FUNCTION_LINES_MAX
    ]
    assert long == []
    assert not tree.body or ast.get_docstring(tree)


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
