"""Signals as something to select for. Must not know what they mean."""

from __future__ import annotations

import signal
import socket
from contextlib import suppress
from types import FrameType
from typing import Final

HANDLED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class SignalWakeup:
    """Takes the HANDLED signals until close(); fileno() is readable when take() has some."""

    def __init__(self) -> None:
        self._arrived: list[signal.Signals] = []
        # The byte only wakes: a signal that finds the buffer full is in the list all the same.
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._on_signal) for number in HANDLED}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        signal_number = signal.Signals(number)
        if signal_number not in self._arrived:
            self._arrived.append(signal_number)

    def fileno(self) -> int:
        """Readable after a signal."""
        return self._woken.fileno()

    def take(self) -> list[signal.Signals]:
        """Signals since the last call, each once, in the order they first came."""
        with suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass
        taken, self._arrived = self._arrived, []
        return taken

    def close(self) -> None:
        """Handle them as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._woken.close()
        self._waker.close()
