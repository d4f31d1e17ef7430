"""Another vCPU: rewrites ring memory at full speed while the device parses it (H82).

Run as a process: python -m tests.hostile.hammer FD SEED OFFSET SIZE [OFFSET SIZE ...]. It writes
plausible and absurd descriptor words into the named ranges of the memory file until it is killed.
"""

from __future__ import annotations

import mmap
import random
import struct
import sys

WORDS = (
    *(0, 1, 2, 3, 4, 5, 7, 0x80, 0x81, 0x84, 0x8000, 0x8080, 127, 128, 0xFFFF),  # flags, indexes
    *(4, 8, 10, 16, 32, 4096, 1 << 20, 0xFFFF_FFFF),  # lengths
    *(12 << 20, 13 << 20, 40 << 20, 64 << 20, 1 << 50, (1 << 64) - 8),  # addresses
)
HALF_WORD_MAX = 0xFFFF


def hammer(fd: int, seed: int, ranges: list[tuple[int, int]]) -> None:
    """Write until killed."""
    source = random.Random(seed)
    size = max(offset + length for offset, length in ranges)
    memory = mmap.mmap(fd, (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE)
    values = [source.choice(WORDS) for _ in range(4096)]
    places = [offset + 2 * source.randrange(length // 2) for offset, length in ranges * 1024]
    # Random draws leave some out, and a device that waits at one of those waits for ever.
    places += [offset + at for offset, length in ranges for at in range(0, length, 2)]
    while True:
        source.shuffle(places)
        for place, value in zip(places, values, strict=False):
            if value <= HALF_WORD_MAX:
                struct.pack_into("<H", memory, place, value)
            else:
                struct.pack_into("<Q", memory, place & ~7, value)


def main() -> None:
    """Read the ranges from the command line."""
    fd, seed, *numbers = map(int, sys.argv[1:])
    hammer(fd, seed, list(zip(numbers[::2], numbers[1::2], strict=True)))


if __name__ == "__main__":
    main()
