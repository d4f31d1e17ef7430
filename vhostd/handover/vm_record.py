"""What a VM's state memfd says: plain data, versioned. Knows shapes, and no behaviour.

Source of the parts: session.state.SessionState as it is, and what each Device.save() returns.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from vhostd.handover.state_memfd import StateDamaged, StateVersionUnknown
from vhostd.session.state import SessionState

VERSION: Final = 2
"""Of VmRecord; a release reads its own and the one before."""

VERSIONS_READ: Final = (1, 2)


class Owed(msgspec.Struct, frozen=True, array_like=True):
    """A request that was handled, and the answer the VMM may not have yet.

    Attributes:
        sequence: of the requests of one connection; vhd_reply_prepare() knows the latest.
        request_size: bytes it has, or had, at the head of the socket.
        reply: what answers it; empty: nothing does.
    """

    sequence: int
    request_size: int
    reply: bytes


class DeviceRecord(msgspec.Struct, frozen=True):
    """One device; session and owed are of its connection, None where there is none.

    changes: what is to be made of its large state, which may be done already; None: it has none.
    outside: an address of a ring that could not start, in no memory the VMM has given; or None.
    """

    device: dict[str, Any]
    session: SessionState | None = None
    owed: Owed | None = None
    changes: list[tuple[int, int, int]] | None = None
    outside: int | None = None


class VmRecord(msgspec.Struct, frozen=True):
    """One VM. devices: encoded DeviceRecords, by id.

    goal: boot memory and size `memory set` asked for, bytes, and whether its devices are done.
    verdict: what the monitor said last (devices.verdict): finding and detail.
    next_event: no event of the stream has this number or a higher one, nearly.
    """

    version: int
    vm: str
    devices: dict[str, msgspec.Raw]
    goal: tuple[int, int, bool] | None = None
    next_event: int = 0
    verdict: tuple[str, str] | None = None


def encode_device(record: DeviceRecord) -> msgspec.Raw:
    """As bytes that can stand in a VmRecord."""
    return msgspec.Raw(msgspec.msgpack.encode(record))


def encode(record: VmRecord) -> bytes:
    """As the payload of a state memfd."""
    return msgspec.msgpack.encode(record)


class _Version(msgspec.Struct):
    version: int


def decode(payload: bytes) -> VmRecord:
    """Read the payload of a state memfd.

    Raises:
        StateVersionUnknown: of a release whose records this one does not read.
        StateDamaged: it is none.
    """
    try:
        version = msgspec.msgpack.decode(payload, type=_Version).version
        if version not in VERSIONS_READ:
            raise StateVersionUnknown(
                f"state version {version}; this release reads {', '.join(map(str, VERSIONS_READ))}"
            )
        return msgspec.msgpack.decode(payload, type=VmRecord)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise StateDamaged(f"not a VM's state: {error}") from error


def decode_device(raw: msgspec.Raw) -> DeviceRecord:
    """Read one device of a VmRecord.

    Raises:
        StateDamaged: it is none.
    """
    try:
        return msgspec.msgpack.decode(raw, type=DeviceRecord)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise StateDamaged(f"not a device's state: {error}") from error
