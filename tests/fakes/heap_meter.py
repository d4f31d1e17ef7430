"""How many bytes of a program's heap are in use, to the byte: the end tests hold.

heap_shim.c counts below the program, heap_inside/ answers inside it. Resident memory grows and
shrinks by arenas and pools, so that it shows a leak only after a thousand hits. This shows the
second one. Must not know what the program is.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.fakes.preload import build_library, environment_of, preloading

HERE: Final = Path(__file__).parent
TIMEOUT_S: Final = 30.0
LOOK_AGAIN_S: Final = 0.05  # what changes in the meantime is seen in no other way
EQUAL_LOOKS: Final = 3


class HeapMeter:
    """Asks one program, which was started inside starting()."""

    def __init__(self, folder: Path) -> None:
        """Build what has to stand below the program; the folder keeps it and a socket."""
        self._library = build_library(HERE / "heap_shim.c", folder)
        self._path = folder / "heap.sock"
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT_S)

    @contextmanager
    def starting(self, *numbers: str) -> Iterator[None]:
        """Start the program inside the block, and wait there until it runs.

        numbers: "module:NAME=5" sets a module's number before the program begins, so that what it
        keeps is soon as much as it ever will be.
        """
        changes = {
            "HEAP_METER_SET": " ".join(numbers),
            "LD_PRELOAD": preloading(self._library),
            "PYTHONMALLOC": "malloc",
            "PYTHONPATH": str(HERE / "heap_inside"),
            "HEAP_METER": str(self._path),
        }
        with environment_of(changes):
            yield
        self._socket.connect(str(self._path))

    def at_rest(self) -> int:
        """Return the bytes in use once they change no more; a connection takes a while to end.

        Raises:
            TimeoutError: they change all the time.
        """
        deadline_s = time.monotonic() + TIMEOUT_S
        size, equal_looks = self.in_use(), 0
        while equal_looks < EQUAL_LOOKS:
            time.sleep(LOOK_AGAIN_S)
            before, size = size, self.in_use()
            equal_looks = equal_looks + 1 if size == before else 0
            if time.monotonic() > deadline_s:
                raise TimeoutError("the program's heap does not come to rest")
        return size

    def in_use(self) -> int:
        """Return the bytes in use, garbage not among them."""
        self._socket.send(b"?")
        answer = self._socket.recv(8)
        assert len(answer) == 8, "the program under the meter has gone"
        return int.from_bytes(answer, "little")

    def close(self) -> None:
        """Ask no more."""
        self._socket.close()
