"""The service the keeper keeps in these tests: a program that does what the test tells it to.

It says over a SEQPACKET socket what it got, then obeys one packet after the other: a JSON list of a
word and its arguments, with descriptors beside it. Must not know what the test is after.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from vhostd import systemd
from vhostd.fds import OwnedFd
from vhostd.keeper import spare

BARRIER_TIMEOUT_S = 10.0
TOLD_KEYS = ("NOTIFY_SOCKET", "LISTEN_FDNAMES", "LISTEN_PID", "WATCHDOG_USEC", "WATCHDOG_PID")


def hello(passed: dict[str, list[OwnedFd]]) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "group": os.getpgrp(),
        "started_s": time.monotonic(),
        "passed": {name: len(fds) for name, fds in passed.items()},
        "environment": {key: os.environ[key] for key in TOLD_KEYS if key in os.environ},
        "open": sorted(int(name) for name in os.listdir("/proc/self/fd")),  # noqa: PTH208
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    }


def obey(channel: socket.socket, word: str, arguments: list[Any], fds: Sequence[OwnedFd]) -> None:
    """Do one thing; whoever told us knows that it is done when we answer."""
    match word:
        case "store":
            name, poll = arguments
            systemd.store_fds(channel, name, fds, poll=poll)
        case "forget":
            systemd.forget_fds(channel, *arguments)
        case "notify":
            systemd.notify(*arguments, fds=fds)
        case "raw":
            raw(bytes.fromhex(arguments[0]), fds)
        case "exit":
            os._exit(arguments[0])
        case "store_and_die":
            for name, fd in zip(arguments, fds, strict=True):
                systemd.store_fds(channel, name, [fd])
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":  # until the file system answers, which no signal ends
            threading.Thread(target=os.close, args=(fds[0].take(),), daemon=True).start()
        case "on_signal":
            number, code = arguments
            signal.signal(number, signal.SIG_IGN if code is None else exit_with(code))
    systemd.barrier(BARRIER_TIMEOUT_S)


def raw(data: bytes, fds: Sequence[OwnedFd]) -> None:
    """Send what systemd.notify() would not."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.connect(os.environ["NOTIFY_SOCKET"])
        socket.send_fds(channel, [data], [fd.fileno() for fd in fds])


def exit_with(code: int) -> Callable[[int, FrameType | None], None]:
    def handler(number: int, frame: FrameType | None) -> None:
        os._exit(code)

    return handler


def main() -> int:
    signal.signal(signal.SIGTERM, exit_with(0))
    if spare.is_spare(os.environ, os.getpid()):
        passed = spare.wait_for_turn()
    else:
        passed = systemd.passed_fds(os.environ, os.getpid())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as control:
        control.connect(sys.argv[1])
        control.send(json.dumps(hello(passed)).encode())
        while True:
            data, numbers, _, _ = socket.recv_fds(control, 65536, 253)
            if not data:
                return 0  # the test is over
            word, *arguments = json.loads(data)
            fds = [OwnedFd(number) for number in numbers]
            given: list[int] = []
            if word == "give":
                given = [fd.fileno() for fd in passed[arguments[0]]]
            else:
                manager = systemd.connect()
                assert manager is not None
                with manager:
                    obey(manager, word, arguments, fds)
            for fd in fds:
                fd.close()  # now it is only the keeper's
            socket.send_fds(control, [b"done"], given)


if __name__ == "__main__":
    sys.exit(main())
