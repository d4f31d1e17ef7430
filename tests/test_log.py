"""Log lines: one line a record in both formats, libraries included, and a guest can't flood it."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from vhostd import log


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_a_json_line_carries_name_level_time_and_bound_fields() -> None:
    stream = io.StringIO()
    log.configure("json", stream=stream)

    log.get_logger(vm="web").warning(log.LogEvent.CHAIN_REJECTED, queue=2, size=5)

    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert record.pop("time").endswith("Z")
    assert record == {
        "event": "chain_rejected",
        "level": "warning",
        "vm": "web",
        "queue": 2,
        "size": 5,
    }


def test_the_default_away_from_a_terminal_is_json() -> None:
    stream = io.StringIO()
    log.configure(stream=stream)
    log.get_logger().info(log.LogEvent.DAEMON_STARTED)
    assert json.loads(stream.getvalue())["event"] == "daemon_started"


def test_console_lines_hold_no_colour_codes_away_from_a_terminal() -> None:
    stream = io.StringIO()
    log.configure("console", stream=stream)
    log.get_logger(vm="web").info(log.LogEvent.VM_STARTED)
    assert "vm_started" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_what_a_library_logs_is_a_json_line_as_well_exception_included() -> None:
    stream = io.StringIO()
    log.configure("json", stream=stream)
    try:
        raise OSError("boom")
    except OSError:
        logging.getLogger("hypercorn.error").exception("Error in ASGI Framework")

    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert record["logger"] == "hypercorn.error"
    assert record["level"] == "error"
    assert "boom" in record["exception"]


def test_a_line_a_guest_can_cause_passes_once_a_second_and_tells_how_many_did_not() -> None:
    now_s = 0.0
    limiter = log.RateLimiter(lambda: now_s)

    assert limiter.admit(("web", 2, "chain_rejected")) == 0
    assert [limiter.admit(("web", 2, "chain_rejected")) for _ in range(1000)] == [None] * 1000
    assert limiter.admit(("web", 3, "chain_rejected")) == 0
    now_s = 1.0
    assert limiter.admit(("web", 2, "chain_rejected")) == 1000
    now_s = 2.0
    assert limiter.admit(("web", 2, "chain_rejected")) == 0


def test_the_limiter_remembers_a_bounded_number_of_keys() -> None:
    limiter = log.RateLimiter(lambda: 0.0, keys_max=10)
    for key in range(100):
        limiter.admit(key)
    assert limiter.admit(99) is None
    assert limiter.admit(0) == 0


def test_lines_tell_the_journal_their_priority_and_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "journal").open("w+") as journal, (tmp_path / "file").open("w+") as file:
        status = os.fstat(journal.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        for stream in (journal, file):
            for log_format in ("json", "console"):
                log.configure(log_format, stream=stream)
                log.get_logger().info("one")
                log.get_logger().warning("two")
                log.get_logger().error("three")
                logging.getLogger("library").error("four\nlines")
            stream.flush()
        lines = (tmp_path / "journal").read_text().splitlines()
        priorities = "".join(line[:3] for line in lines)
        assert priorities == "<6><4><3><3>" + "<6><4><3><3><3>"  # console: two lines are two
        assert json.loads(lines[0][3:])["event"] == "one"
        assert not any(
            line.startswith("<") for line in (tmp_path / "file").read_text().splitlines()
        )
