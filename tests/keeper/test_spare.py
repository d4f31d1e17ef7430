"""A spare process takes over at once, with everything; and one that is not there is not missed."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import pytest

from tests.daemon import children
from tests.keeper.keeping import (
    TIMEOUT_S,
    Keeper,
    Service,
    closing,
    keeping,
    loaded_spare,
)

MANY = 600  # descriptors; more than two messages bear
ROUNDS = 20


def spare_of(keeper: Keeper, service: Service) -> int:
    return loaded_spare(keeper.process.pid, service.pid)


def ended(pid: int) -> bool:
    """Wait until a process that is no child of ours has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with closing(fd):
        return bool(select.select([fd], [], [], TIMEOUT_S)[0])


def ready_service(keeper: Keeper) -> Service:
    service = keeper.next_service()
    service.ready()
    return service


def test_the_spare_is_the_successor_and_has_everything(folder: Path) -> None:
    fds = [os.eventfd(number + 1) for number in range(MANY)]
    with closing(*fds), keeping(folder, spare=True, watchdog_s=30) as keeper:
        service = ready_service(keeper)
        for number, fd in enumerate(fds):
            service.store(f"fd.{number}", fd)
        for _ in range(2):
            spare = spare_of(keeper, service)
            service = keeper.successor_of(service)
            assert service.pid == spare
            assert service.passed == {f"fd.{number}": 1 for number in range(MANY)}
            for number in (0, 249, 250, 251, MANY - 1):
                (given,) = service.give(f"fd.{number}")
                with closing(given):
                    value = os.eventfd_read(given)
                    os.eventfd_write(given, value)
                assert value == number + 1
            environment = service.hello["environment"]
            assert environment["WATCHDOG_PID"] == str(service.pid)
            assert "LISTEN_PID" not in environment and "LISTEN_FDNAMES" not in environment
            service.ready()


def test_an_upgrade_does_not_begin_with_the_old_program(folder: Path) -> None:
    with keeping(folder, spare=True) as keeper:
        service = ready_service(keeper)
        spare = spare_of(keeper, service)
        keeper.signal(signal.SIGHUP)
        successor = ready_service(keeper)
        assert successor.pid != spare
        assert ended(spare)
        assert spare_of(keeper, successor) != spare


def test_a_spare_that_died_is_not_missed(folder: Path) -> None:
    with closing(kept := os.eventfd(0)), keeping(folder, spare=True) as keeper:
        service = ready_service(keeper)
        service.store("kept", kept)
        spare = spare_of(keeper, service)
        os.kill(spare, signal.SIGKILL)
        service = keeper.successor_of(service)
        assert service.pid != spare and service.passed == {"kept": 1}
        service.ready()
        assert spare_of(keeper, service) != spare


def test_a_service_that_dies_before_there_is_a_spare_is_followed(folder: Path) -> None:
    with closing(kept := os.eventfd(0)), keeping(folder, spare=True) as keeper:
        service = keeper.next_service()
        service.store("kept", kept)
        for _ in range(5):
            service.ready()
            service = keeper.successor_of(service)
            assert service.passed == {"kept": 1}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["TERM", "KILL"])
def test_no_spare_outlives_its_keeper(folder: Path, number: signal.Signals) -> None:
    with keeping(folder, spare=True) as keeper:
        spare = spare_of(keeper, ready_service(keeper))
        keeper.signal(number)
        keeper.wait_end()
        assert ended(spare)


def test_spares_leak_nothing(folder: Path) -> None:
    with closing(kept := os.eventfd(0)), keeping(folder, spare=True) as keeper:
        service = ready_service(keeper)
        service.store("kept", kept)
        spare_of(keeper, service)
        before = keeper.open_fds()
        for _ in range(ROUNDS):
            service = keeper.successor_of(service)
            service.ready()
            spare_of(keeper, service)
        assert keeper.open_fds() == before
        assert len(children(keeper.process.pid)) == 2
