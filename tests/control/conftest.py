"""A served daemon and a client on its control socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.control.daemon import RunningDaemon, running_daemon


@pytest.fixture
def served(tmp_path: Path) -> Iterator[RunningDaemon]:
    with running_daemon(tmp_path) as running:
        yield running


@pytest.fixture
def http(served: RunningDaemon) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(uds=str(served.addresses.control))
    with httpx.Client(transport=transport, base_url="http://vhostd", timeout=10) as client:
        yield client


@pytest.fixture
def read_only(served: RunningDaemon) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(uds=str(served.addresses.read_only))
    with httpx.Client(transport=transport, base_url="http://vhostd", timeout=10) as client:
        yield client
