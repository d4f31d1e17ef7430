"""A pretended VM of which one request is watched: ask, see it answered, check what came of it."""

from __future__ import annotations

import select
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from tests.fakes.channel import Channel, ConnectionLost
from tests.fakes.frontend import FrontEnd
from tests.fakes.messages import WITHDRAWN, BackendRequest
from tests.takeover.kept import Kept


class Answerer:
    """Answers what the daemon asks of the VMM, at any time, as QEMU does.

    Attributes:
        changes: config changes it was told of.
        withdrawn: requests that a stop of the device met before they were read.
        lost: the daemon hung up the channel.
        reads: whether it reads what lies there before it is hung up on.
    """

    def __init__(self, front: FrontEnd) -> None:
        """Answer on whatever is the front end's channel at the moment."""
        self.changes = 0
        self.withdrawn = 0
        self.lost = False
        self.reads = True
        self._front = front
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.is_set():
            with self._lock:
                channel = self._front.backend_requests
                ready = channel is not None and not self.lost and self._has_news(channel)
                if ready and channel is not None:
                    self._answer(channel)
            if not ready:
                self._ended.wait(0.001)

    def _has_news(self, channel: Channel) -> bool:
        poll = select.poll()
        poll.register(channel, select.POLLRDHUP | (select.POLLIN if self.reads else 0))
        return bool(poll.poll(0))

    def _answer(self, channel: Channel) -> None:
        try:
            message = channel.receive()
        except ConnectionLost:
            self.lost = True
            return
        if message.request == BackendRequest.CONFIG_CHANGE_MSG | WITHDRAWN:
            self.withdrawn += 1  # QEMU refuses it, and has nobody to tell
            return
        assert message.request == BackendRequest.CONFIG_CHANGE_MSG
        try:
            self._front.answer_backend_request(message)
        except ConnectionLost:
            self.lost = True
        else:
            self.changes += 1

    def replace(self, channel: Channel) -> None:
        """Go on with this channel, whose other end the daemon has."""
        with self._lock:
            old, self._front.backend_requests = self._front.backend_requests, channel
            self.lost = False
        if old is not None:
            old.close()

    def close(self) -> None:
        """Answer nothing any more."""
        self._ended.set()
        self._thread.join()


class Scene(ABC):
    """One kind of request in its surroundings, time and again."""

    configuration: ClassVar[str]

    @abstractmethod
    def open(self, kept: Kept) -> None:
        """Connect and start the device."""

    @abstractmethod
    def close(self) -> None:
        """Hang up."""

    @abstractmethod
    def ready(self) -> None:
        """Come to where the request is asked."""

    @abstractmethod
    def ask(self) -> None:
        """Send it, and wait for nothing."""

    @abstractmethod
    def answered(self, *, woken: bool) -> bool:
        """The answer is there; woken: the daemon's main thread has handled something since."""

    @abstractmethod
    def check(self) -> None:
        """Take the one right answer, and see that the device is what it says."""

    def finish(self) -> None:  # noqa: B027  # most have nothing left
        """See what can be seen only once."""


def readable(channel: Channel) -> bool:
    """Something lies in a socket."""
    return bool(select.select([channel], [], [], 0)[0])


def nothing(_: object) -> None:
    """What many kinds have to do before or after."""


Step = Callable[[], None]
