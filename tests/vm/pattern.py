"""guesttool's pattern, computed on the host: finds a guest's page in its memory from outside.

This file must not know how the memory was got hold of.
"""

import mmap
import os
from pathlib import Path

PAGE = 4096
_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15


def _mix(x: int) -> int:
    x = (x + _STEP) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def page_pattern(seed: int, page: int) -> bytes:
    """The 4096 bytes `guesttool fill MIB SEED` writes to its page number `page`."""
    first = _mix(seed ^ _mix(page))
    words = ((first + i * _STEP) & _MASK for i in range(PAGE // 8))
    return b"".join(word.to_bytes(8, "little") for word in words)


def find_page(memory: Path, content: bytes) -> int | None:
    """The offset in the file `memory` of the first page holding `content`; None if nowhere.

    Reads around holes, so looking allocates nothing.
    """
    with memory.open("rb") as file:
        fd, end = file.fileno(), file.seek(0, os.SEEK_END)
        with mmap.mmap(fd, end, prot=mmap.PROT_READ) as view:
            start = 0
            while True:
                try:
                    start = os.lseek(fd, start, os.SEEK_DATA)
                except OSError:
                    return None  # ENXIO: nothing but a hole from here on
                hole = os.lseek(fd, start, os.SEEK_HOLE)
                at = view.find(content, start, hole)
                while at >= 0 and at % PAGE:
                    at = view.find(content, at + 1, hole)
                if at >= 0:
                    return at
                start = hole
