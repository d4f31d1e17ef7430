"""What a service asks of the store: FDSTORE=1 and FDSTOREREMOVE=1 of sd_notify(3).

Must not know who asks, nor what else a message says.
"""

from __future__ import annotations

from typing import Final

from vhostd.keeper.notify_socket import Notification, Refused
from vhostd.keeper.speech import Complaints
from vhostd.keeper.store import AlreadyStored, FdStore, StoreFull
from vhostd.systemd import is_fd_name

_STORED_NAME: Final = "stored"  # sd_notify(3): what FDSTORE=1 without FDNAME is called


def change_store(store: FdStore, message: Notification, complaints: Complaints) -> None:
    """Do what a message says; what is stored of it is taken out of it.

    Raises:
        Refused: it is not as it must be.
    """
    removes = message.says("FDSTOREREMOVE")
    name = message.assignments.get("FDNAME", "" if removes else _STORED_NAME)
    if not is_fd_name(name):
        raise Refused("refused a message with a bad name of a descriptor")
    if removes:
        # As systemd has it: with FDSTORE=1 in the same message nothing is stored.
        store.remove(name)
        return
    if not message.fds:
        raise Refused("refused an FDSTORE=1 without a descriptor")
    while message.fds:
        try:
            store.add(name, message.fds.pop(0), poll=not message.says("FDPOLL", "0"))
        except AlreadyStored as known:
            if known.name != name:
                complaints.complain("a descriptor keeps its first name", f"{name} is {known.name}")
        except StoreFull as full:
            complaints.complain("the store is full", str(full))
