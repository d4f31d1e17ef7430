"""Requests about rings: set-up, start, stop, enabling. Must not know memory beyond addresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from vhostd.errors import FrontendError
from vhostd.fds import OwnedFd
from vhostd.protocol.features import VirtioFeature
from vhostd.protocol.framing import Message
from vhostd.protocol.requests import Request
from vhostd.protocol.wire import VringAddr, VringFile, VringFlag, VringState
from vhostd.session.actions import (
    Action,
    DeviceStopped,
    EnableRing,
    Outcome,
    RestartRing,
    SetRingCall,
    SetRingErr,
    StartRing,
    StoppedRing,
    StopRing,
)
from vhostd.session.driver import go_live, started_at, stopped_at
from vhostd.session.plan import Handler, Offer, Plan, Settled, ring_at
from vhostd.session.ring_layout import (
    at_beginning,
    base_in_force,
    base_of,
    check_alignment,
    check_log,
    check_size,
    locate,
    position_of,
    set_up,
)
from vhostd.session.state import RingAddresses, RingState, SessionState


def _set_vring_num(_offer: Offer, state: SessionState, message: Message) -> Plan:
    told = VringState.parse(message.payload)
    ring = ring_at(state, told.index)
    if ring.started and told.num != ring.size:
        raise FrontendError(f"ring {told.index} gets another size while it runs")
    # Before SET_FEATURES the layout is not known; the start checks again in any case.
    check_size(told.num, packed=state.packed or not state.features_settled)
    return Plan(state.with_ring(told.index, replace(ring, size=told.num)))


def _set_vring_addr(_offer: Offer, state: SessionState, message: Message) -> Plan:
    told = VringAddr.parse(message.payload)
    ring = ring_at(state, told.index)
    addresses = RingAddresses(told.desc, told.avail, told.used)
    after = replace(
        ring,
        addresses=addresses,
        log_used=bool(told.flags & VringFlag.LOG),
        log_addr=told.log,
    )
    if ring.started:
        return _relog(state, told.index, ring, after)
    check_alignment(addresses, packed=state.packed)
    # A VMM may send these first and size or memory later; whatever is there is checked at once,
    # so that the refusal names the message at fault, and the start checks all of it again.
    if ring.size and state.features_settled:
        check_log(after, state.features, state.log)
        if state.regions:
            locate(after, state.features, [region.announced for region in state.regions])
    return Plan(state.with_ring(told.index, after))


def _relog(state: SessionState, index: int, ring: RingState, after: RingState) -> Plan:
    """Migration turns logging on and off by sending a running ring its own addresses again."""
    if after.addresses != ring.addresses:
        raise FrontendError(f"ring {index} gets other addresses while it runs")
    if after == ring:
        return Plan(state)
    setup = set_up(state, index, after)
    return Plan(state.with_ring(index, after), (RestartRing(setup, None),))


def _set_vring_base(_offer: Offer, state: SessionState, message: Message) -> Plan:
    told = VringState.parse(message.payload)
    ring = ring_at(state, told.index)
    if ring.started:
        raise FrontendError(f"ring {told.index} gets a base while it runs")
    position_of(told.num, ring.size, packed=state.packed or not state.features_settled)
    return Plan(state.with_ring(told.index, replace(ring, base=told.num)))


def _get_vring_base(_offer: Offer, state: SessionState, message: Message) -> Plan:
    index = VringState.parse(message.payload).index
    ring = ring_at(state, index)
    if not ring.started:
        return Plan(state, payload=VringState(index, base_in_force(ring, state)).pack())
    actions: list[Action] = [DeviceStopped()] if state.device_started else []
    actions.append(StopRing(index))

    def settle(outcomes: Sequence[Outcome]) -> Settled:
        outcome = outcomes[-1]
        assert isinstance(outcome, StoppedRing), "StopRing says where"
        base = base_of(outcome.position, packed=state.packed)
        stood = stopped_at(ring, outcome.position, taken=outcome.taken, packed=state.packed)
        after = replace(stood, base=base, kick=False, call=False)
        stopped = replace(state.with_ring(index, after), device_started=False)
        return stopped, VringState(index, base).pack()

    return Plan(state, tuple(actions), settle=settle)


def _named_file(state: SessionState, message: Message) -> tuple[int, RingState, OwnedFd | None]:
    """The ring a SET_VRING_KICK, _CALL or _ERR names, and the descriptor it says it brings."""
    told = VringFile.parse(message.payload)
    ring = ring_at(state, told.index)
    if told.has_fd != bool(message.fds):
        raise FrontendError(f"{len(message.fds)} descriptors, {int(told.has_fd)} announced")
    return told.index, ring, message.fds[0] if told.has_fd else None


def _set_vring_kick(_offer: Offer, state: SessionState, message: Message) -> Plan:
    index, ring, kick = _named_file(state, message)
    if kick is None:
        raise FrontendError(f"ring {index} would have to be polled, which is not offered")
    if not state.features_settled:
        raise FrontendError(f"ring {index} starts before SET_FEATURES")
    if not ring.started:  # else it goes on from where it is, with a successor too
        ring = replace(ring, start_number=ring.start_number + 1)
    setup = set_up(state, index, ring)
    if ring.started:
        return Plan(state.with_ring(index, ring), (RestartRing(setup, kick),))
    begins = at_beginning(setup.position, packed=state.packed)
    after = started_at(replace(ring, kick=True), setup.addresses, begins=begins)
    enable = (EnableRing(index, True),) if ring.enabled else ()
    return go_live(state, state.with_ring(index, after), (StartRing(setup, kick),), enable)


def _set_vring_call(_offer: Offer, state: SessionState, message: Message) -> Plan:
    index, ring, file = _named_file(state, message)
    after = replace(ring, call=file is not None)
    return Plan(state.with_ring(index, after), (SetRingCall(index, file),))


def _set_vring_err(_offer: Offer, state: SessionState, message: Message) -> Plan:
    index, ring, file = _named_file(state, message)
    after = replace(ring, err=file is not None)
    return Plan(state.with_ring(index, after), (SetRingErr(index, file),))


def _set_vring_enable(_offer: Offer, state: SessionState, message: Message) -> Plan:
    """Legal for a ring that is not set up: QEMU enables queues the driver has left alone too."""
    told = VringState.parse(message.payload)
    ring = ring_at(state, told.index)
    if told.num not in (0, 1):
        raise FrontendError(f"ring {told.index} enabled with {told.num}")
    if not state.has(VirtioFeature.PROTOCOL_FEATURES):
        raise FrontendError("rings are always enabled without protocol features")
    enabled = bool(told.num)
    if enabled == ring.enabled:
        return Plan(state)
    after = state.with_ring(told.index, replace(ring, enabled=enabled))
    change = (EnableRing(told.index, enabled),) if ring.started else ()
    if enabled:
        return go_live(state, after, enable=change)
    if not state.device_started:
        return Plan(after, change)
    # The first ring to be disabled is the first sign that QEMU stops the device.
    return Plan(replace(after, device_started=False), (DeviceStopped(), *change))


HANDLERS: Final[dict[Request, Handler]] = {
    Request.SET_VRING_NUM: _set_vring_num,
    Request.SET_VRING_ADDR: _set_vring_addr,
    Request.SET_VRING_BASE: _set_vring_base,
    Request.GET_VRING_BASE: _get_vring_base,
    Request.SET_VRING_KICK: _set_vring_kick,
    Request.SET_VRING_CALL: _set_vring_call,
    Request.SET_VRING_ERR: _set_vring_err,
    Request.SET_VRING_ENABLE: _set_vring_enable,
}
