"""Layouts of headers and payloads, one frozen dataclass each: an object that exists is legal.

Knows shapes and what no state can make legal. Must not know which request carries which shape.
Source: QEMU docs/interop/vhost-user.rst as shipped with 11.1.3; host byte order, unpadded.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from struct import Struct
from typing import TYPE_CHECKING, ClassVar, Final, Protocol, Self

from vhostd.errors import FrontendError
from vhostd.flags import Flags

HEADER: Final = Struct("=III")
"""u32 request, u32 flags, u32 payload size in bytes."""

PAYLOAD_SIZE_MAX: Final = 64 * 1024
"""The largest payload read at all: 30 times the largest legal one, small enough to hold."""

MEMORY_TABLE_REGIONS_MAX: Final = 8
"""VHOST_MEMORY_BASELINE_NREGIONS: what one SET_MEM_TABLE can hold."""

CONFIG_SIZE_MAX: Final = 256
"""VHOST_USER_MAX_CONFIG_SIZE, bytes."""

SHMEM_REGIONS_MAX: Final = 256
"""VIRTIO_MAX_SHMEM_REGIONS."""


class HeaderFlag(Flags):
    """The second header field; bits without a name are ignored, as the spec reserves them."""

    VERSION = 1
    VERSION_MASK = 3
    REPLY = 4
    NEED_REPLY = 8


class VringFlag(Flags):
    """Flags of SET_VRING_ADDR."""

    LOG = 1  # VHOST_VRING_F_LOG: mark writes to the used ring in the dirty log


class Shape(Protocol):
    """What every class here offers: the payload sizes in bytes that can be this shape."""

    SIZES: ClassVar[range]


class Payload:
    """A payload of fixed layout; subclasses are frozen dataclasses in LAYOUT's order.

    Attributes:
        LAYOUT: the fields on the wire.
        SIZES: every payload size in bytes that can be this shape.
    """

    __slots__ = ()

    LAYOUT: ClassVar[Struct]
    SIZES: ClassVar[range]

    if TYPE_CHECKING:

        def __init__(self, *fields: int) -> None: ...

    def __init_subclass__(cls) -> None:
        """Derive SIZES from LAYOUT where the shape has one size only."""
        if "SIZES" not in cls.__dict__:
            cls.SIZES = range(cls.LAYOUT.size, cls.LAYOUT.size + 1)

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Read the shape.

        Raises:
            FrontendError: the size is wrong or a value can never be legal.
        """
        if len(payload) not in cls.SIZES:
            raise FrontendError(f"{cls.__name__} of {len(payload)} bytes")
        return cls(*cls.LAYOUT.unpack_from(payload))

    def pack(self) -> bytes:
        """Write the shape."""
        return self.LAYOUT.pack(*astuple(self))  # type: ignore[call-overload]


@dataclass(frozen=True, slots=True)
class Empty(Payload):
    """No payload at all."""

    LAYOUT: ClassVar = Struct("=")


@dataclass(frozen=True, slots=True)
class U64(Payload):
    """A single 64-bit integer."""

    LAYOUT: ClassVar = Struct("=Q")

    value: int


@dataclass(frozen=True, slots=True)
class VringState(Payload):
    """A ring's index and one number about it."""

    LAYOUT: ClassVar = Struct("=II")

    index: int
    num: int


@dataclass(frozen=True, slots=True)
class VringAddr(Payload):
    """Where a ring's parts are, in frontend addresses; `log` is a guest address.

    Raises:
        FrontendError: flags without a meaning.
    """

    LAYOUT: ClassVar = Struct("=IIQQQQ")

    index: int
    flags: int  # VringFlag
    desc: int
    used: int  # packed rings: device event suppression
    avail: int  # packed rings: driver event suppression
    log: int

    def __post_init__(self) -> None:
        """Check what needs no state."""
        if self.flags & ~int(VringFlag.LOG):
            raise FrontendError(f"vring address flags {self.flags:#x}")


@dataclass(frozen=True, slots=True)
class VringFile:
    """SET_VRING_KICK, _CALL and _ERR: which ring, and whether a descriptor comes along.

    Raises:
        FrontendError: bits without a meaning.
    """

    SIZES: ClassVar = U64.SIZES
    INDEX_MASK: ClassVar = 0xFF
    NO_FD: ClassVar = 0x100

    index: int
    has_fd: bool

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Read the u64 these messages carry."""
        value = U64.parse(payload).value
        if value & ~(cls.INDEX_MASK | cls.NO_FD):
            raise FrontendError(f"vring file description {value:#x}")
        return cls(value & cls.INDEX_MASK, not value & cls.NO_FD)


@dataclass(frozen=True, slots=True)
class MemoryRegion(Payload):
    """One slot of guest RAM, as SET_MEM_TABLE and ADD_MEM_REG describe it.

    Every field is in bytes; none is a page number.

    Raises:
        FrontendError: the slot is empty or wraps past the end of an address space.
    """

    LAYOUT: ClassVar = Struct("=QQQQ")

    guest_addr: int
    size: int
    frontend_addr: int  # where the VMM maps it; ring addresses arrive in this space
    file_offset: int

    def __post_init__(self) -> None:
        """Check what needs no state."""
        for start in (self.guest_addr, self.frontend_addr, self.file_offset):
            if not 0 < self.size <= 2**64 - start:
                raise FrontendError(f"memory region wraps or is empty: {self}")


@dataclass(frozen=True, slots=True)
class MemoryTable:
    """SET_MEM_TABLE: all regions at once.

    There may be room for more regions than there are, as in virtio_uml's struct of two; what is
    there is not looked at.

    Raises:
        FrontendError: none, more than MEMORY_TABLE_REGIONS_MAX, or fewer than it claims.
    """

    LAYOUT: ClassVar = Struct("=II")  # count, padding
    SIZES: ClassVar = range(
        LAYOUT.size + MemoryRegion.LAYOUT.size,
        LAYOUT.size + MEMORY_TABLE_REGIONS_MAX * MemoryRegion.LAYOUT.size + 1,
        MemoryRegion.LAYOUT.size,
    )

    regions: tuple[MemoryRegion, ...]

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Read count and regions."""
        if len(payload) not in cls.SIZES:
            raise FrontendError(f"memory table of {len(payload)} bytes")
        count, _padding = cls.LAYOUT.unpack_from(payload)
        end = cls.LAYOUT.size + count * MemoryRegion.LAYOUT.size
        if count == 0 or end > len(payload):
            raise FrontendError(f"memory table claims {count} regions in {len(payload)} bytes")
        rows = payload[cls.LAYOUT.size : end]
        return cls(tuple(MemoryRegion(*row) for row in MemoryRegion.LAYOUT.iter_unpack(rows)))


@dataclass(frozen=True, slots=True)
class MemorySlot:
    """ADD_MEM_REG and REM_MEM_REG: u64 padding, then one region."""

    LAYOUT: ClassVar = Struct("=Q")
    SIZES: ClassVar = range(40, 41)

    region: MemoryRegion

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Read the region behind the padding."""
        return cls(MemoryRegion.parse(payload[cls.LAYOUT.size :]))


@dataclass(frozen=True, slots=True)
class Log(Payload):
    """SET_LOG_BASE: the dirty log in the file sent alongside, bytes.

    Raises:
        FrontendError: empty, or it wraps.
    """

    LAYOUT: ClassVar = Struct("=QQ")

    size: int
    file_offset: int

    def __post_init__(self) -> None:
        """Check what needs no state."""
        if not 0 < self.size <= 2**64 - self.file_offset:
            raise FrontendError(f"dirty log wraps or is empty: {self}")


@dataclass(frozen=True, slots=True)
class Iotlb(Payload):
    """struct vhost_iotlb_msg; addresses and size in bytes."""

    LAYOUT: ClassVar = Struct("=QQQBB6x")

    iova: int
    size: int
    frontend_addr: int
    permissions: int
    type: int


@dataclass(frozen=True, slots=True)
class ConfigSpace:
    """GET_CONFIG and SET_CONFIG: a window of the device's config space.

    Raises:
        FrontendError: the content is not as long as claimed, empty, or beyond CONFIG_SIZE_MAX.
    """

    LAYOUT: ClassVar = Struct("=III")  # offset, size, flags
    SIZES: ClassVar = range(LAYOUT.size, LAYOUT.size + CONFIG_SIZE_MAX + 1)

    offset: int
    flags: int
    content: bytes

    def __post_init__(self) -> None:
        """Check what needs no state."""
        if not 0 < len(self.content) <= CONFIG_SIZE_MAX - self.offset:
            raise FrontendError(f"config space window {self.offset}+{len(self.content)}")

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Read offset, size, flags and as many bytes as size says."""
        if len(payload) not in cls.SIZES:
            raise FrontendError(f"config space message of {len(payload)} bytes")
        offset, size, flags = cls.LAYOUT.unpack_from(payload)
        content = payload[cls.LAYOUT.size :]
        if size != len(content):
            raise FrontendError(f"config space claims {size} bytes, has {len(content)}")
        return cls(offset, flags, content)

    def pack(self) -> bytes:
        """Write offset, size, flags and content."""
        return self.LAYOUT.pack(self.offset, len(self.content), self.flags) + self.content


@dataclass(frozen=True, slots=True)
class VringArea(Payload):
    """VRING_HOST_NOTIFIER_MSG: a ring's notify window in the file sent alongside, bytes."""

    LAYOUT: ClassVar = Struct("=QQQ")

    index_and_flags: int
    size: int
    file_offset: int


@dataclass(frozen=True, slots=True)
class Inflight(Payload):
    """The in-flight buffer, bytes. C front ends send the 4 bytes their struct is padded with."""

    LAYOUT: ClassVar = Struct("=QQHH")
    SIZES: ClassVar = range(20, 25)

    mmap_size: int
    file_offset: int
    queue_count: int
    queue_size: int  # descriptors


@dataclass(frozen=True, slots=True)
class SharedObject:
    """The 16 bytes of a UUID."""

    SIZES: ClassVar = range(16, 17)

    uuid: bytes


@dataclass(frozen=True, slots=True)
class DeviceState(Payload):
    """SET_DEVICE_STATE_FD: which way the state goes and when.

    Raises:
        FrontendError: a direction or phase the spec does not know.
    """

    LAYOUT: ClassVar = Struct("=II")
    SAVE: ClassVar = 0
    LOAD: ClassVar = 1
    STOPPED: ClassVar = 0

    direction: int
    phase: int

    def __post_init__(self) -> None:
        """Check what needs no state."""
        if self.direction not in (self.SAVE, self.LOAD) or self.phase != self.STOPPED:
            raise FrontendError(f"device state direction {self.direction} phase {self.phase}")


@dataclass(frozen=True, slots=True)
class ShmemMapping(Payload):
    """SHMEM_MAP and SHMEM_UNMAP: a piece of a file in a shared memory region, bytes."""

    LAYOUT: ClassVar = Struct("=B7xQQQQ")
    WRITABLE: ClassVar = 1

    region_id: int
    file_offset: int
    region_offset: int
    size: int
    flags: int


@dataclass(frozen=True, slots=True)
class ShmemConfig(Payload):
    """GET_SHMEM_CONFIG's reply: how many regions there are, and every region's size in bytes."""

    LAYOUT: ClassVar = Struct(f"=II{SHMEM_REGIONS_MAX}Q")

    region_sizes: tuple[int, ...] = ()

    def pack(self) -> bytes:
        """Write count, padding and all sizes; absent regions have size 0."""
        absent = (0,) * (SHMEM_REGIONS_MAX - len(self.region_sizes))
        return self.LAYOUT.pack(len(self.region_sizes), 0, *self.region_sizes, *absent)


@dataclass(frozen=True, slots=True)
class Opaque:
    """A payload nothing here looks into: crypto sessions."""

    SIZES: ClassVar = range(PAYLOAD_SIZE_MAX + 1)
