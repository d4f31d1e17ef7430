"""Who pays for an error decides its class. Knows nothing of sockets, rings or devices."""

from __future__ import annotations


class VhostdError(Exception):
    """Base of every error vhostd raises on purpose; its text is one line for an operator."""


class FrontendError(VhostdError):
    """The VMM broke the vhost-user protocol.

    Attributes:
        fatal: True when the byte stream can no longer be trusted and the connection must end;
            False when this one request is refused and the next legal one works.
        outside: an address that is in no memory the VMM has given, where that is what is wrong.
    """

    def __init__(self, text: str, *, fatal: bool = False, outside: int | None = None) -> None:
        super().__init__(text)
        self.fatal = fatal
        self.outside = outside


class PauseVm(VhostdError):
    """The VM in which this is raised can't be served any more; the others are.

    Attributes:
        remedy: what an operator can do, one sentence.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


class GuestError(VhostdError):
    """One chain of the guest is wrong: it is given back unused and counted."""


class HostError(VhostdError, OSError):
    """The host refused something we are entitled to (out of memory, file system error)."""


class ConfigError(VhostdError):
    """The operator's configuration or command line is wrong: exit code 2.

    Attributes:
        mistakes: one line each, "where: key: what is wrong, why, what to write instead".
    """

    def __init__(self, *mistakes: str) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes
