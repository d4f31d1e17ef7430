"""GET_SHMEM_CONFIG: what is announced, and what must never be."""

from __future__ import annotations

import pytest
from vhostd.protocol.features import BACKEND_PROTOCOL_FEATURES as ALL
from vhostd.protocol.features import ProtocolFeature
from vhostd.protocol.requests import Request
from vhostd.session.plan import Offer

from tests.fakes.backend import shmem_config
from tests.fakes.messages import u64
from tests.session.conversation import OFFERED, Conversation


def test_a_shared_memory_region_is_announced() -> None:
    offer = Offer(OFFERED, 1, 16, ALL | ProtocolFeature.SHMEM_MAP, (4 << 30,))
    talk = Conversation(offer)
    talk.send(Request.SET_PROTOCOL_FEATURES, u64(offer.protocol_features))

    assert talk.send(Request.GET_SHMEM_CONFIG) == shmem_config([4 << 30])


@pytest.mark.parametrize("sizes", [(3 << 30,), (3 << 30, 1 << 30), (1 << 30, 1 << 30)])
def test_what_would_end_qemu_is_not_announced(sizes: tuple[int, ...]) -> None:
    """QEMU 11.1 asserts that the sum is a power of two, and that each region has a capability."""
    offer = Offer(OFFERED, 1, 16, ALL | ProtocolFeature.SHMEM_MAP, sizes)
    talk = Conversation(offer)
    talk.send(Request.SET_PROTOCOL_FEATURES, u64(offer.protocol_features))

    assert talk.send(Request.GET_SHMEM_CONFIG) == shmem_config([])
