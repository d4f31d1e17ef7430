"""What a session asks its shell to do, and what the shell hands back.

The shell performs a step's actions in order, one at a time. SetRegions, SetLog, StartRing,
RestartRing, SetRingCall, SetRingErr, SetBackendChannel, GetConfig and SetConfig may raise
FrontendError or HostError, and then have changed nothing and kept no descriptor; the others must
succeed. A step never holds two actions that may raise. Descriptors in an action become the shell's
when it succeeds. Knows no way to do any of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from vhostd.fds import OwnedFd
from vhostd.protocol.wire import Log, MemoryRegion
from vhostd.session.state import RingAddresses


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """st_dev and st_ino: what two descriptors of one file have in common."""

    device: int
    inode: int


@dataclass(frozen=True, slots=True)
class RingPosition:
    """Where a ring stands, in descriptors. Split rings use next_avail only."""

    next_avail: int = 0
    next_used: int = 0
    avail_wrap: int = 0  # packed rings: the wrap counters, 0 or 1
    used_wrap: int = 0


@dataclass(frozen=True, slots=True)
class StoppedRing:
    """Where a ring stood when it stopped; taken: a chain was taken from it since it started."""

    position: RingPosition
    taken: bool


@dataclass(frozen=True, slots=True)
class RingSetup:
    """One ring, checked: every part is aligned and inside one region of the memory table.

    Attributes:
        index: the queue's number.
        size: descriptors.
        features: virtio features in force (VirtioFeature).
        addresses: guest addresses.
        log_used: mark writes to the used ring in the dirty log, at guest address log_addr.
        position: where it starts.
        enabled: the VMM has it enabled.
        start_number: see RingState.
    """

    index: int
    size: int
    features: int
    addresses: RingAddresses
    log_used: bool
    log_addr: int
    position: RingPosition
    enabled: bool
    start_number: int = 0


@dataclass(frozen=True, slots=True)
class RegionSource:
    """A slot of the new memory table; file is None where the shell has this very slot already."""

    region: MemoryRegion
    file: OwnedFd | None


@dataclass(frozen=True, slots=True)
class SetRegions:
    """Replace the memory table. Outcome: a FileIdentity for each region, in order."""

    regions: tuple[RegionSource, ...]


@dataclass(frozen=True, slots=True)
class SetLog:
    """Use this dirty log instead of the one there is; it is written to while logging is on."""

    log: Log
    file: OwnedFd


@dataclass(frozen=True, slots=True)
class SetLogging:
    """Turn marking writes in the dirty log on or off (VHOST_F_LOG_ALL)."""

    enabled: bool


@dataclass(frozen=True, slots=True)
class StartRing:
    """Start a stopped ring with the call and err eventfds the shell holds for it, if any.

    It is not served before it is enabled by its own action.
    """

    setup: RingSetup
    kick: OwnedFd


@dataclass(frozen=True, slots=True)
class RestartRing:
    """Stop a started ring and start it with this set-up where it stood; setup.position is stale.

    kick None keeps the eventfd it has; call and err are kept in any case.
    """

    setup: RingSetup
    kick: OwnedFd | None


@dataclass(frozen=True, slots=True)
class StopRing:
    """Stop a started ring; close its kick and call. Outcome: a StoppedRing.

    Its err eventfd stays: QEMU sends it once in the life of a connection.
    """

    index: int


@dataclass(frozen=True, slots=True)
class EnableRing:
    """Serve a started ring, or stop serving it.

    The ring must be looked at once without a kick: the driver's first kick may be lost.
    """

    index: int
    enabled: bool


@dataclass(frozen=True, slots=True)
class SetRingCall:
    """Use this eventfd for used notifications, the ring started or not; None = none."""

    index: int
    file: OwnedFd | None


@dataclass(frozen=True, slots=True)
class SetRingErr:
    """Use this eventfd to report a broken ring, the ring started or not; None = none."""

    index: int
    file: OwnedFd | None


@dataclass(frozen=True, slots=True)
class SetBackendChannel:
    """Use this socket for back-end requests instead of the one there is.

    reply_ack: requests may ask for an acknowledgement.
    """

    file: OwnedFd
    reply_ack: bool


@dataclass(frozen=True, slots=True)
class ConfigureConfigSpace:
    """How the native worker treats GET_CONFIG and SET_CONFIG.

    hot: it may answer them itself. reply_ack: it must acknowledge SET_CONFIG when asked to.
    """

    hot: bool
    reply_ack: bool


@dataclass(frozen=True, slots=True)
class GetConfig:
    """Read a window of the config space, bytes. Outcome: its content."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class SetConfig:
    """Write a window of the config space; fields the guest may not write keep their value.

    migration: the VMM restores a device, so that read-only fields are meant as well.
    """

    offset: int
    content: bytes
    migration: bool


@dataclass(frozen=True, slots=True)
class FeaturesSettled:
    """The virtio features (VirtioFeature and the device's own) until the next of these."""

    features: int


@dataclass(frozen=True, slots=True)
class DeviceStarted:
    """A ring went live: back-end requests may be sent from here on."""


@dataclass(frozen=True, slots=True)
class DeviceStopped:
    """The VMM began to stop the device: no back-end request may be sent any more.

    Rings may still be served. QEMU 11.1 crashes on a request that arrives when it has stopped.
    """


@dataclass(frozen=True, slots=True)
class DriverReset:
    """No ring is served, and what is known of the driver is over.

    RESET_DEVICE came, or a new driver is about to be served.
    """


Action = (
    SetRegions
    | SetLog
    | SetLogging
    | StartRing
    | RestartRing
    | StopRing
    | EnableRing
    | SetRingCall
    | SetRingErr
    | SetBackendChannel
    | ConfigureConfigSpace
    | GetConfig
    | SetConfig
    | FeaturesSettled
    | DeviceStarted
    | DeviceStopped
    | DriverReset
)

Outcome = StoppedRing | tuple[FileIdentity, ...] | bytes | None
"""What performing an action gave; None for every action whose docstring names no outcome."""
