"""A process that has loaded the program before it is needed, and waits for its turn.

Loading takes longer than all else of a take-over, and guests wait meanwhile. Both ends are here:
the keeper's, and the program's own. Must not know what the program does.
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Final

from vhostd.errors import HostError
from vhostd.fds import OwnedFd
from vhostd.keeper.child import Child, start
from vhostd.keeper.speech import Complaints, say
from vhostd.systemd import LISTEN_FDS_START

NAME: Final = "vhostd-spare"
"""Of the one descriptor a spare is passed: a socket to its keeper."""

HAND_OVER_TIMEOUT_S: Final = 1.0
"""How long a spare that has loaded the program may take to take descriptors in."""

SPARE_DELAY_S: Final = 0.5
"""From a service that is ready to a spare one, so that guests come first."""

LOAD_TIMEOUT_S: Final = 30.0
"""A program that takes longer to load is not upgraded to."""

UPGRADE: Final = "VHOSTD_UPGRADE"
"""In the environment of a spare that is to take the place of a service that is well."""

_BATCH: Final = 250  # descriptors a message; SCM_MAX_FD is 253
_LOADED: Final = b"L"
_SIZE: Final = struct.Struct("=Q")
_FD: Final = array.array("i").itemsize


class Spare:
    """The keeper's end."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start one; arguments as of child.start().

        Raises:
            OSError: no process or socket could be had.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._child = start(argv, environment, [(NAME, theirs.fileno())])
            except OSError:
                ours.close()
                raise
        self._socket = ours
        ours.settimeout(HAND_OVER_TIMEOUT_S)

    def fileno(self) -> int:
        """Readable once it is loaded, or has ended."""
        return self._socket.fileno()

    @property
    def loaded(self) -> bool:
        """It waits for its turn, and lives."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        poller.register(self._child, select.POLLIN)
        ready = {fd for fd, _ in poller.poll(0)}
        return (
            self._child.fileno() not in ready
            and self._socket.fileno() in ready
            and self._socket.recv(1, socket.MSG_PEEK) == _LOADED
        )

    def begin(self, stored: Sequence[tuple[str, int]]) -> Child:
        """It is its turn now; stored: name and descriptor, which stay the caller's.

        Raises:
            OSError: it did not take them; drop() it.
        """
        names = json.dumps([name for name, _ in stored]).encode()
        fds = [fd for _, fd in stored]
        self._socket.sendall(_SIZE.pack(len(names)) + names)
        for first in range(0, len(fds), _BATCH):
            socket.send_fds(self._socket, [b"F"], fds[first : first + _BATCH])
        self._socket.close()
        self._child.begin_life()
        return self._child

    def drop(self) -> None:
        """It is not needed."""
        self._child.send_signal(signal.SIGKILL)
        self._child.reap()
        self._socket.close()


class Starter:
    """Starts services, and has a spare one ready if that is wanted.

    At an upgrade there is a second one for a while, which loads the new program: where it can't,
    the one with the old program is there as before. fileno() is readable when renewed() has
    something to say.

    Attributes:
        spare_due_s: when the next spare is to be started, on the monotonic clock; None: not.
        renewed_by_s: when a renewal is given up; None: none is under way.
    """

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        complaints: Complaints,
        *,
        spare: bool,
        load_timeout_s: float,
    ) -> None:
        """Arguments as of child.start(); spare: have one; load_timeout_s: see LOAD_TIMEOUT_S."""
        self._argv = argv
        self._environment = environment
        self._complaints = complaints
        self._wanted = spare
        self._spare: Spare | None = None
        self._renewal: Spare | None = None
        self._load_timeout_s = load_timeout_s
        self._loading = select.epoll()
        self.spare_due_s: float | None = None
        self.renewed_by_s: float | None = None

    def fileno(self) -> int:
        """To select for."""
        return self._loading.fileno()

    def close(self) -> None:
        """Let go of everything."""
        self.drop_spares()
        self._loading.close()

    def start(self, stored: Sequence[tuple[str, int]]) -> Child:
        """A new service, which is the spare one if that is loaded; stored: as of child.start().

        Raises:
            OSError: no process could be had.
        """
        self.spare_due_s = None
        spare, self._spare = self._spare, None
        if spare is not None and spare.loaded:
            try:
                return spare.begin(stored)
            except OSError as error:
                self._complaints.complain("a spare process failed", str(error))
        if spare is not None:
            spare.drop()
        self._drop_renewal()  # what is loaded now is the new program
        return start(self._argv, self._environment, stored)

    def plan_spare(self, now_s: float) -> None:
        """The service serves: there is time for a spare soon."""
        if self._wanted and self._spare is None and self.renewed_by_s is None:
            self.spare_due_s = now_s + SPARE_DELAY_S

    def on_deadline(self, now_s: float) -> None:
        """Start a spare, or give up waiting for one, if its time has come."""
        if self.spare_due_s is not None and now_s >= self.spare_due_s:
            self.spare_due_s = None
            self._spare = self._new_spare({})
        if self.renewed_by_s is not None and now_s >= self.renewed_by_s:
            self._give_up(f"the program has not loaded within {self._load_timeout_s} s", now_s)

    def _new_spare(self, more: Mapping[str, str]) -> Spare | None:
        try:
            return Spare(self._argv, {**self._environment, **more})
        except OSError as error:
            self._complaints.complain("no spare process can be started", str(error.strerror))
            return None

    def renew(self, now_s: float) -> bool:
        """Have a spare load the program as it is now; False: there is to be none."""
        if not self._wanted:
            return False
        self._drop_renewal()
        self.spare_due_s = None
        self._renewal = self._new_spare({UPGRADE: "1"})
        if self._renewal is not None:
            self._loading.register(self._renewal, select.EPOLLIN)
            self.renewed_by_s = now_s + self._load_timeout_s
        return True

    def renewed(self, now_s: float) -> bool:
        """Whether a renewal is over, so that the spare has the program loaded as it is now."""
        if self._renewal is None or not self._loading.poll(0):
            return False  # it was another that had something to say, and is gone
        if not self._renewal.loaded:
            self._give_up("the new program ended at once; it says why above", now_s)
            return False
        self._loading.unregister(self._renewal)
        renewal, self._renewal = self._renewal, None
        self.drop_spares()
        self._spare = renewal
        return True

    def _give_up(self, why: str, now_s: float) -> None:
        self._drop_renewal()
        self.plan_spare(now_s)
        say(f"no upgrade: {why}")

    def _drop_renewal(self) -> None:
        self.renewed_by_s = None
        renewal, self._renewal = self._renewal, None
        if renewal is not None:
            renewal.drop()

    def drop_spares(self) -> None:
        """There is to be none for now."""
        self._drop_renewal()
        self.spare_due_s = None
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.drop()


def is_spare(environment: Mapping[str, str], pid: int) -> bool:
    """Whether this process is to wait for its turn."""
    return environment.get("LISTEN_FDNAMES") == NAME and environment.get("LISTEN_PID") == str(pid)


def is_upgrade(environment: Mapping[str, str]) -> bool:
    """Whether this spare is to take the place of a service that is well, so that it had better not
    come to its turn with a configuration that can't be served."""
    return UPGRADE in environment


def wait_for_turn() -> dict[str, list[OwnedFd]]:
    """Say that the program is loaded, and wait, however long; the descriptors that were stored.

    Raises:
        HostError: the keeper is gone: there will be no turn.
    """
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    passed: dict[str, list[OwnedFd]] = {}
    with socket.socket(fileno=LISTEN_FDS_START) as keeper:
        keeper.set_inheritable(False)
        keeper.sendall(_LOADED)
        (size,) = _SIZE.unpack(_receive(keeper, _SIZE.size))
        names = json.loads(_receive(keeper, size))
        fds: list[OwnedFd] = []
        while len(fds) < len(names):
            fds += _receive_fds(keeper)
        for name, fd in zip(names, fds, strict=True):
            passed.setdefault(name, []).append(fd)
    return passed


def _receive(keeper: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        try:
            part = keeper.recv(size - len(data))
        except ConnectionResetError:  # it was killed
            part = b""
        if not part:
            raise HostError(0, "the keeper has ended")
        data += part
    return data


def _receive_fds(keeper: socket.socket) -> list[OwnedFd]:
    room = socket.CMSG_SPACE(_BATCH * _FD)
    data, ancillary, _, _ = keeper.recvmsg(1, room, socket.MSG_CMSG_CLOEXEC)
    numbers = array.array("i")
    for _, _, content in ancillary:
        numbers.frombytes(content)
    if not data or not numbers:
        raise HostError(0, "the keeper has ended")
    return [OwnedFd(number) for number in numbers]
