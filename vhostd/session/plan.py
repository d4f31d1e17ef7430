"""What a handler of one request answers with, and what it may look at.

Knows no request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vhostd.errors import FrontendError
from vhostd.protocol.features import (
    BACKEND_PROTOCOL_FEATURES,
    BACKEND_VIRTIO_FEATURES,
    ProtocolFeature,
)
from vhostd.protocol.framing import Message
from vhostd.session.actions import Action, Outcome
from vhostd.session.state import RingState, SessionState


@dataclass(frozen=True, slots=True)
class Offer:
    """What a device lets a VMM negotiate; never changes while a connection lives.

    Attributes:
        device_features: the device's own virtio bits and those of the transport it can do.
        queue_count: queues it has.
        config_size: bytes of its config space.
        protocol_features: what GET_PROTOCOL_FEATURES answers.
        shmem_region_sizes: bytes of each shared memory region; SHMEM_MAP must be offered with it.
    """

    device_features: int
    queue_count: int
    config_size: int
    protocol_features: ProtocolFeature = BACKEND_PROTOCOL_FEATURES
    shmem_region_sizes: tuple[int, ...] = ()

    @property
    def features(self) -> int:
        """What GET_FEATURES answers."""
        return int(self.device_features | BACKEND_VIRTIO_FEATURES)


Settled = tuple[SessionState, bytes]
"""The state once the actions succeeded, and the payload of the request's own reply."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How one request is met.

    Attributes:
        state: the state once the actions succeeded.
        actions: what must succeed first, in order.
        payload: of the request's own reply, if it has one.
        settle: where state and payload depend on what the actions gave: takes their outcomes,
            in order, and replaces both.
    """

    state: SessionState
    actions: tuple[Action, ...] = ()
    payload: bytes = b""
    settle: Callable[[Sequence[Outcome]], Settled] | None = None


Handler = Callable[[Offer, SessionState, Message], Plan]
"""Raises FrontendError where the request is refused."""


def ring_at(state: SessionState, index: int) -> RingState:
    """The ring with this index.

    Raises:
        FrontendError: there is none.
    """
    if index >= len(state.rings):
        raise FrontendError(f"ring {index} of {len(state.rings)}")
    return state.rings[index]
