"""The balloon's feature bits and what they decide: offers, names, which queue is which.

Pure tables and functions. Must not hold a device's state.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from vhostd.devices.base import GuestRange, Role
from vhostd.flags import Flags
from vhostd.protocol.features import VirtioFeature


class BalloonFeature(Flags):
    """Device feature bits: virtio 1.x, 5.5.3; VIRTIO_BALLOON_F_ in Linux."""

    MUST_TELL_HOST = 1 << 0
    STATS_VQ = 1 << 1
    DEFLATE_ON_OOM = 1 << 2
    FREE_PAGE_HINT = 1 << 3
    PAGE_POISON = 1 << 4
    PAGE_REPORTING = 1 << 5


@dataclass(frozen=True, slots=True)
class BalloonOptions:
    """What an operator may choose; defaults are the configuration's.

    Attributes:
        stats_interval_s: how often the guest is asked for statistics; 0: only on request.
        packed, in_order: ring layouts offered; a guest that knows neither takes the split ring.
        windows: guest memory that belongs to other devices and is no RAM of the balloon's guest
            unless they say so.
    """

    free_page_reporting: bool = True
    free_page_hinting: bool = True
    deflate_on_oom: bool = True
    page_poison: bool = True
    packed: bool = True
    in_order: bool = True
    stats_interval_s: float = 5
    windows: tuple[GuestRange, ...] = ()


def offered_features(options: BalloonOptions) -> int:
    """Feature bits to offer, transport bits included.

    RING_RESET is not among them: QEMU's generic vhost-user device does not pass a queue reset
    on, so a driver that used it would wait for ever. A device must not offer what it can't do.
    """
    # MUST_TELL_HOST and STATS_VQ cost nothing, and a driver that takes STATS_VQ and
    # FREE_PAGE_HINT has its reporting queue where the specification says (see resolve_roles).
    features = int(
        VirtioFeature.VERSION_1
        | VirtioFeature.RING_INDIRECT_DESC
        | VirtioFeature.RING_EVENT_IDX
        | BalloonFeature.MUST_TELL_HOST
        | BalloonFeature.STATS_VQ
    )
    choices: tuple[tuple[bool, int], ...] = (
        (options.deflate_on_oom, BalloonFeature.DEFLATE_ON_OOM),
        (options.free_page_hinting, BalloonFeature.FREE_PAGE_HINT),
        # Without it a guest that poisons its pages (init_on_free=1) gives up reporting as well.
        (options.page_poison, BalloonFeature.PAGE_POISON),
        (options.free_page_reporting, BalloonFeature.PAGE_REPORTING),
        (options.packed, VirtioFeature.RING_PACKED),
        (options.in_order, VirtioFeature.IN_ORDER),
    )
    for wanted, bit in choices:
        if wanted:
            features |= bit
    return features


_ALWAYS: Final[Mapping[int, Role]] = {0: Role.INFLATE, 1: Role.DEFLATE}
# Feature, role, and the index virtio 1.x, 5.5.2 gives it. In the order drivers count them.
_OPTIONAL: Final = (
    (BalloonFeature.STATS_VQ, Role.STATISTICS, 2),
    (BalloonFeature.FREE_PAGE_HINT, Role.FREE_PAGE_HINT, 3),
    (BalloonFeature.PAGE_REPORTING, Role.REPORTING, 4),
)


def resolve_roles(features: int, started: Collection[int]) -> dict[int, Role]:
    """What each started queue is for; indexes whose role is not clear yet are left out.

    The specification numbers the optional queues 2, 3, 4. Linux counts only those whose feature
    was negotiated, so that reporting may be queue 2. Which of the two a driver does shows in the
    set of queues it starts; while that set (they start one by one) fits both, only those indexes
    are named on which both agree.
    """
    negotiated = [(role, index) for bit, role, index in _OPTIONAL if features & bit]
    literal = {index: role for role, index in negotiated}
    compacted = {position: role for position, (role, _) in enumerate(negotiated, 2)}
    optional = {index for index in started if index not in _ALWAYS}
    if optional <= compacted.keys() and optional <= literal.keys():
        numbering = dict(compacted.items() & literal.items())
    elif optional <= compacted.keys():
        numbering = compacted
    else:
        # Beyond the compacted numbers: a driver that follows the specification, and perhaps
        # sets up queues without their feature, which then have no role.
        numbering = literal
    numbering.update(_ALWAYS)
    return {index: numbering[index] for index in sorted(started) if index in numbering}


_TRANSPORT_NAMES: Final = (
    VirtioFeature.RING_INDIRECT_DESC,
    VirtioFeature.RING_EVENT_IDX,
    VirtioFeature.VERSION_1,
    VirtioFeature.RING_PACKED,
    VirtioFeature.IN_ORDER,
)


def balloon_feature_names(features: int) -> list[str]:
    """The specification's names in lower case, "page_reporting", lowest bit first."""
    bits = (*BalloonFeature, *_TRANSPORT_NAMES)
    return [str(bit.name).lower() for bit in bits if features & bit]
