"""An upgrade waits for the new program: the old one serves until then, or on if it never loads."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vhostd.keeper.spare import Starter
from vhostd.keeper.speech import Complaints

from tests.daemon import children
from tests.fakes.eventfd import wait_readable
from tests.keeper.keeping import (
    ROOT,
    TIMEOUT_S,
    Keeper,
    Service,
    closing,
    keeping,
    loaded_spare,
)

SERVICE = Path(__file__).with_name("service.py")
LOADS = f"import runpy; runpy.run_path({str(SERVICE)!r}, run_name='__main__')"
ENDS = "raise SystemExit(3)"
STANDS_STILL = "import signal; signal.pause()"


class Program:
    """What the keeper starts; a release is what it says when it is started."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "program.py"
        self._gate = folder / "gate"
        os.mkfifo(self._gate)
        self.install(LOADS)

    def install(self, text: str) -> None:
        self.path.write_text(text)

    def install_gated(self) -> None:
        """It loads only once open_gate() is called; another one after that loads at once."""
        self.install(f"open({str(self._gate)!r}).close(); {LOADS}")

    def open_gate(self) -> None:
        """Waits until somebody stands before it."""
        with self._gate.open("w"):
            self.install(LOADS)


@contextmanager
def upgradable(folder: Path, **options: object) -> Iterator[tuple[Keeper, Program, Service]]:
    """A keeper with a ready service, which has stored a descriptor."""
    program = Program(folder)
    argv = [sys.executable, "-S", str(program.path), str(folder / "c")]
    with (
        closing(kept := os.eventfd(0)),
        keeping(folder, argv, spare=True, **options) as keeper,
    ):
        service = keeper.next_service()
        service.store("kept", kept)
        service.ready()
        yield keeper, program, service


def upgraded(keeper: Keeper) -> Service:
    """The next one, which has what the one before it had."""
    service = keeper.next_service()
    assert service.passed == {"kept": 1}
    service.ready()
    return service


def test_the_old_one_serves_until_the_new_one_is_loaded(folder: Path) -> None:
    with upgradable(folder) as (keeper, program, service):
        program.install_gated()
        keeper.signal(signal.SIGHUP)
        keeper.wait_line(f"upgrading: PID {service.pid} serves until")
        service.ready()
        (loading,) = (pid for pid in children(keeper.process.pid) if pid != service.pid)
        program.open_gate()
        assert upgraded(keeper).pid == loading
        assert service.ends()
        log = keeper.wait_line(f"restarted PID {loading} with 1 desc")
        assert f"PID {service.pid} ended with 0" in log


def test_a_program_that_cannot_be_loaded_is_not_upgraded_to(folder: Path) -> None:
    with upgradable(folder) as (keeper, program, service):
        program.install(ENDS)
        keeper.signal(signal.SIGHUP)
        keeper.wait_line("no upgrade: the new program ended at once; it says why above")
        service.ready()
        assert children(keeper.process.pid) == [service.pid]
        program.install(LOADS)
        keeper.signal(signal.SIGHUP)
        upgraded(keeper)


def test_one_that_dies_after_that_is_followed_by_the_old_program(folder: Path) -> None:
    with upgradable(folder) as (keeper, program, service):
        spare = loaded_spare(keeper.process.pid, service.pid)
        program.install(ENDS)
        keeper.signal(signal.SIGHUP)
        keeper.wait_line("no upgrade")
        service.kill()
        assert upgraded(keeper).pid == spare


def test_a_program_that_stands_still_is_not_upgraded_to(folder: Path) -> None:
    with upgradable(folder, load_timeout_s=0.3) as (keeper, program, service):
        program.install(STANDS_STILL)
        keeper.signal(signal.SIGHUP)
        keeper.wait_line("no upgrade: the program has not loaded within 0.3 s")
        service.ready()
        assert children(keeper.process.pid) == [service.pid]


def test_a_death_while_the_new_one_loads_is_an_upgrade(folder: Path) -> None:
    with upgradable(folder) as (keeper, program, service):
        program.install_gated()
        keeper.signal(signal.SIGHUP)
        keeper.wait_line("upgrading")
        service.kill()
        keeper.wait_line(f"PID {service.pid} died by signal 9")
        program.open_gate()
        upgraded(keeper)


def test_asked_for_twice_it_is_the_last_program_that_counts(folder: Path) -> None:
    with upgradable(folder) as (keeper, program, service):
        program.install(STANDS_STILL)
        keeper.signal(signal.SIGHUP)
        keeper.wait_line(f"upgrading: PID {service.pid} serves")
        program.install(LOADS)
        keeper.signal(signal.SIGHUP)
        assert upgraded(keeper).pid != service.pid


def test_what_a_renewal_had_to_say_is_not_taken_for_the_next_one_s(folder: Path) -> None:
    """The keeper may hear at once that one is loaded, and that there is to be another."""
    program = Program(folder)
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    starter = Starter(
        [sys.executable, "-S", str(program.path), "nowhere"],
        environment,
        Complaints(),
        spare=True,
        load_timeout_s=TIMEOUT_S,
    )
    try:
        assert starter.renew(0)
        assert wait_readable(starter.fileno(), TIMEOUT_S)
        program.install_gated()
        assert starter.renew(0)
        assert not starter.renewed(0) and starter.renewed_by_s is not None
        program.open_gate()
        assert wait_readable(starter.fileno(), TIMEOUT_S)
        assert starter.renewed(0) and starter.renewed_by_s is None
    finally:
        starter.close()


def test_sigterm_while_the_new_one_loads_ends_all(folder: Path) -> None:
    with upgradable(folder) as (keeper, program, _service):
        program.install(STANDS_STILL)
        keeper.signal(signal.SIGHUP)
        keeper.wait_line("upgrading")
        keeper.signal(signal.SIGTERM)
        assert keeper.wait_end() == 0
