"""How C says no: -errno, which becomes OSError here and nowhere else."""

from __future__ import annotations

import os


def check(result: int, what: str) -> int:
    """Return a result that is no error.

    Raises:
        OSError: it is -errno.
    """
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result
