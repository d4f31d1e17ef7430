"""A VMM's QMP monitor in a thread: a machine with or without a device that pins memory.

Speaks when it is told to. Must not know vhostd.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GREETING = {"QMP": {"version": {"qemu": {"major": 11, "minor": 1, "micro": 0}}, "capabilities": []}}
VFIO = {"gpu0": "vfio-pci"}


class FakeMonitor:
    """Answers every client.

    Attributes:
        devices: type by name, as QOM has them.
        backends: of memory, as query-memdev has them.
        speaks: while not set nobody is answered.
        asked: set whenever a client has heard of all devices.
    """

    def __init__(self, path: Path, devices: dict[str, str]) -> None:
        self.devices = devices
        self.backends = [{"id": "ram0", "share": True}]
        self.speaks = threading.Event()
        self.asked = threading.Event()
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._clients: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Hang up on everybody."""
        self.speaks.set()
        for end in (self._listening, *self._clients):
            # Closing alone would not wake who waits.
            end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            self._clients.append(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        self.speaks.wait()
        try:
            with client.makefile("rwb") as lines:
                lines.write(json.dumps(GREETING).encode() + b"\n")
                lines.flush()
                for line in lines:
                    request = json.loads(line)
                    answer = {"return": self._answer(request), "id": request["id"]}
                    lines.write(json.dumps(answer).encode() + b"\n")
                    lines.flush()
                    if request.get("arguments", {}).get("path") == "/machine/peripheral-anon":
                        self.asked.set()
        except OSError:
            return  # hung up

    def _answer(self, request: dict[str, object]) -> object:
        if request["execute"] == "qom-list":
            if request["arguments"] != {"path": "/machine/peripheral"}:
                return []
            return [{"name": name, "type": f"child<{of}>"} for name, of in self.devices.items()]
        if request["execute"] == "query-memdev":
            return self.backends
        return "" if request["execute"] == "qom-get" else {}


@contextmanager
def monitor(path: Path, devices: dict[str, str], *, speaks: bool = True) -> Iterator[FakeMonitor]:
    """A monitor that listens at a path."""
    found = FakeMonitor(path, devices)
    if speaks:
        found.speaks.set()
    try:
        yield found
    finally:
        found.close()
