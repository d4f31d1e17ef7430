"""A VMM connects while the daemon dies: it is answered or hung up on, never left waiting."""

from __future__ import annotations

from tests.fakes.channel import ConnectionLost
from tests.fakes.frontend import FrontEnd
from tests.fakes.messages import Request, unpack_u64
from tests.native.rig import wait_until
from tests.takeover.balloon_scene import BALLOON, BalloonVm
from tests.takeover.kept import Kept
from tests.takeover.scene import Scene, readable


class ConnectScene(Scene):
    """The first message of a connection, and all that is made for one before it."""

    configuration = BALLOON

    def __init__(self) -> None:
        """Nobody is connected yet."""
        self._kept: Kept
        self._front: FrontEnd | None = None

    def open(self, kept: Kept) -> None:
        """Wait for a VMM."""
        self._kept = kept

    def close(self) -> None:
        """Hang up."""
        if self._front is not None:
            self._front.close()
            self._front = None

    def _wait_idle(self) -> None:
        wait_until(lambda: bool(self._kept.status()["state"] == "waiting"))

    def ready(self) -> None:
        """Nobody is connected."""
        self.close()
        self._wait_idle()

    def ask(self) -> None:
        """Connect and ask."""
        self._front = FrontEnd.connect(self._kept.socket("balloon"))
        self._front.send(Request.GET_FEATURES)

    def answered(self, *, woken: bool) -> bool:
        """There is a reply, or the end of the connection."""
        assert self._front is not None, "it has asked"
        return readable(self._front)

    def check(self) -> None:
        """One of the two came, and the next VMM is served."""
        assert self._front is not None, "it has asked"
        try:
            assert unpack_u64(self._front.receive_reply(Request.GET_FEATURES).payload)
            assert not readable(self._front), "more was answered than asked"
        except ConnectionLost:
            pass  # its VMM says so and can be started again
        self.ready()
        vm = BalloonVm(self._kept)
        try:
            vm.works()
        finally:
            vm.close()
