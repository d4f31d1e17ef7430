"""What the service manager is told: sd_notify. Knows no daemon state."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


def notify(*assignments: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Send assignments such as "READY=1" to the service manager; False when there is none.

    Source: sd_notify(3); an "@" at the start of NOTIFY_SOCKET means the abstract namespace.

    Raises:
        OSError: NOTIFY_SOCKET is set but cannot be reached.
    """
    address = environment.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.connect(address)
        channel.sendall("\n".join(assignments).encode())
    return True
