"""Rings and balloon under gcc's sanitizers: C tests, and the fuzzers' corpora once more.

Must not know the Python bindings: everything here is compiled from c_src alone.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = [
    ROOT / "c_src" / f"{name}.c"
    for name in (
        *("guest_mem", "chain", "ring", "ring_split", "ring_packed"),
        *("dirty_log", "sigbus", "balloon", "mapping", "given_up"),
        *("shared_before", "backing", "memfd", "discard"),
    )
]
FLAGS = [
    *("-std=gnu11", "-D_GNU_SOURCE", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-UNDEBUG"),
    *("-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
]
FUZZ = ROOT / "tests" / "fuzz"


def run(*command: str | Path) -> str:
    """Run to the end and return what it printed; anything but exit 0 fails the test."""
    environment = {**os.environ, "ASAN_OPTIONS": "", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(program: Path, *sources: Path) -> Path:
    """Compile the sources with the core into program."""
    run("gcc", *FLAGS, f"-I{ROOT / 'c_src'}", "-o", program, *sources, *CORE)
    return program


@pytest.mark.parametrize("name", ["test_ring", "test_events"])
def test_what_the_c_tests_claim_is_true(name: str, tmp_path: Path) -> None:
    run(build(tmp_path / name, Path(__file__).parent / "c" / f"{name}.c"))


def test_a_wait_for_the_vmm_ends_with_parking(tmp_path: Path) -> None:
    program = tmp_path / "interrupt"
    source = Path(__file__).parent / "c" / "test_interrupt.c"
    run("gcc", *FLAGS, f"-I{ROOT / 'c_src'}", "-o", program, source)
    run(program)


@pytest.mark.parametrize("target", ["ring", "balloon"])
def test_no_input_of_the_corpus_breaks_the_core(target: str, tmp_path: Path) -> None:
    program = build(tmp_path / target, FUZZ / f"fuzz_{target}.c", FUZZ / "replay.c")
    corpus = FUZZ / "corpus" / target
    count = len(list(corpus.iterdir()))
    assert count > 50
    assert run(program, corpus) == f"{count} inputs replayed\n"
