"""Whether a VM's memory may be given back to the host, and what is known of it. Values only.

A device that pins guest memory for DMA (VFIO, vDPA) goes on with the old pages after a discard,
while the guest reads new ones. Must not know who is asked, or how.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec


class Finding(StrEnum):
    """What was found out about the machine."""

    UNCHECKED = "unchecked"
    """No monitor is configured: nothing is found out, what the operator configured is done."""
    UNKNOWN = "unknown"
    """The monitor has not answered yet, or does not answer any more."""
    FREE = "free"
    """Nothing pins guest memory."""
    PINNED = "pinned"
    ENCRYPTED = "encrypted"


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """What a VM's devices may do to its memory; the default allows nothing.

    Attributes:
        detail: devices that pin it, what encrypts it, or why it is not known.
    """

    finding: Finding = Finding.UNKNOWN
    detail: str = "nobody has said"

    @classmethod
    def of_machine(cls, pinning: Sequence[str], encryption: str | None) -> Verdict:
        """What the monitor said: devices that pin guest memory, and what encrypts it."""
        if encryption is not None:
            return cls(Finding.ENCRYPTED, encryption)
        if pinning:
            return cls(Finding.PINNED, ", ".join(pinning))
        return cls(Finding.FREE, "")

    def lost(self, why: str) -> Verdict:
        """What it comes to once the monitor can't be asked: a reason not to discard stays."""
        return self if self.forbids else Verdict(Finding.UNKNOWN, why)

    @property
    def may_discard(self) -> bool:
        """Whether memory may be given back to the host."""
        return self.finding in (Finding.FREE, Finding.UNCHECKED)

    @property
    def forbids(self) -> bool:
        """Whether there is a reason not to, and not only a question."""
        return self.finding in (Finding.PINNED, Finding.ENCRYPTED)

    @property
    def inhibited(self) -> str | None:
        """Why nothing is given back, or None."""
        match self.finding:
            case Finding.UNKNOWN:
                return f"it is not known whether guest memory is pinned: {self.detail}"
            case Finding.PINNED:
                return f"guest memory is pinned by {self.detail}"
            case Finding.ENCRYPTED:
                return f"guest memory is encrypted by {self.detail}"
        return None

    @property
    def frozen(self) -> str | None:
        """Why no device's size may be changed at all, or None."""
        return self.inhibited if self.finding is Finding.ENCRYPTED else None


NOBODY_CHECKS = Verdict(Finding.UNCHECKED, "")
"""Of a VM without a monitor."""
