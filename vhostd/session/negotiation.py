"""Requests about features, ownership, status and config space. Must not know rings' set-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from vhostd.errors import FrontendError
from vhostd.protocol.features import ProtocolFeature, VirtioFeature, feature_names
from vhostd.protocol.framing import Message
from vhostd.protocol.requests import Request
from vhostd.protocol.wire import U64, ConfigSpace, ShmemConfig
from vhostd.session.actions import (
    Action,
    ConfigureConfigSpace,
    DeviceStopped,
    DriverReset,
    EnableRing,
    FeaturesSettled,
    GetConfig,
    Outcome,
    SetBackendChannel,
    SetConfig,
    SetLogging,
    StopRing,
)
from vhostd.session.driver import go_live
from vhostd.session.memory_table import MEMORY_SLOTS_MAX, check_table
from vhostd.session.plan import Handler, Offer, Plan, Settled
from vhostd.session.state import RingState, SessionState
from vhostd.units import power_of_two_up

# What SET_FEATURES may change while rings run: neither is the driver's business.
_VMM_FEATURES: Final = int(VirtioFeature.LOG_ALL | VirtioFeature.PROTOCOL_FEATURES)

_CONFIG_WRITE_FLAGS: Final = {0: False, 1: True}  # VHOST_SET_CONFIG_TYPE_FRONTEND, _MIGRATION

_STATUS_MAX: Final = 0xFF  # virtio 1.3, 2.1: one byte


def _get_features(offer: Offer, state: SessionState, _message: Message) -> Plan:
    return Plan(state, payload=U64(offer.features).pack())


def _set_features(offer: Offer, state: SessionState, message: Message) -> Plan:
    features = U64.parse(message.payload).value
    if unoffered := features & ~offer.features:
        raise FrontendError(f"features {unoffered:#x} were not offered")
    if state.running and (features ^ state.features) & ~_VMM_FEATURES:
        raise FrontendError(f"features {features:#x} while rings run with {state.features:#x}")
    actions: list[Action] = []
    if not state.running:
        actions.append(FeaturesSettled(features))
    if (features ^ state.features) & VirtioFeature.LOG_ALL:
        actions.append(SetLogging(bool(features & VirtioFeature.LOG_ALL)))
    rings = tuple(_enabled_by(features, state, ring) for ring in state.rings)
    enable = tuple(
        EnableRing(index, after.enabled)
        for index, (before, after) in enumerate(zip(state.rings, rings, strict=True))
        if after.started and after.enabled != before.enabled
    )
    settled = replace(state, features=features, features_settled=True, rings=rings)
    return go_live(state, settled, tuple(actions), enable)


def _enabled_by(features: int, state: SessionState, ring: RingState) -> RingState:
    """Rings are enabled from the start without bit 30, disabled with it (spec, "Ring states")."""
    if not features & VirtioFeature.PROTOCOL_FEATURES:
        return replace(ring, enabled=True)
    if state.features_settled and not state.has(VirtioFeature.PROTOCOL_FEATURES):
        # A running ring goes on until it is told otherwise, as the VMM asked for no stop.
        return replace(ring, enabled=ring.started)
    return ring


def _get_protocol_features(offer: Offer, state: SessionState, _message: Message) -> Plan:
    return Plan(state, payload=U64(offer.protocol_features).pack())


def _set_protocol_features(offer: Offer, state: SessionState, message: Message) -> Plan:
    features = ProtocolFeature(U64.parse(message.payload).value)
    needed = ProtocolFeature.BACKEND_REQ | ProtocolFeature.REPLY_ACK
    if ProtocolFeature.INBAND_NOTIFICATIONS in features and needed not in features:
        # The spec tells the back end to close the connection.
        raise FrontendError("in-band notifications without their channel", fatal=True)
    if unoffered := features & ~int(offer.protocol_features):
        names = ", ".join(feature_names(unoffered, ProtocolFeature))
        raise FrontendError(f"protocol features not offered: {names}")
    if state.running and features != state.protocol_features:
        raise FrontendError("other protocol features while rings run")
    regions = [region.announced for region in state.regions]
    check_table(regions, guest_addresses=ProtocolFeature.GPA_ADDRESSES in features)
    configure = ConfigureConfigSpace(
        hot=ProtocolFeature.CONFIG in features,
        reply_ack=ProtocolFeature.REPLY_ACK in features,
    )
    return Plan(replace(state, protocol_features=int(features)), (configure,))


def _set_owner(_offer: Offer, state: SessionState, _message: Message) -> Plan:
    if state.owned:
        raise FrontendError("SET_OWNER: the session has its owner")
    return Plan(replace(state, owned=True))


def _reset_owner(_offer: Offer, state: SessionState, _message: Message) -> Plan:
    """Deprecated: "back-ends [should] either ignore this message, or use it to disable all rings".

    Ignored, because some front ends sent it where others sent nothing.
    """
    return Plan(replace(state, owned=False))


def _get_queue_num(offer: Offer, state: SessionState, _message: Message) -> Plan:
    return Plan(state, payload=U64(offer.queue_count).pack())


def _get_max_mem_slots(_offer: Offer, state: SessionState, _message: Message) -> Plan:
    return Plan(state, payload=U64(MEMORY_SLOTS_MAX).pack())


def _get_shmem_config(offer: Offer, state: SessionState, _message: Message) -> Plan:
    sizes = offer.shmem_region_sizes
    if any(size != power_of_two_up(size) for size in sizes) or len(sizes) > 1:
        # QEMU 11.1 would end itself; without any region it makes a device that has none.
        raise FrontendError(f"shared memory regions of {list(sizes)} bytes can't be given")
    return Plan(state, payload=ShmemConfig(sizes).pack())


def _set_backend_req_fd(_offer: Offer, state: SessionState, message: Message) -> Plan:
    action = SetBackendChannel(message.fds[0], ProtocolFeature.REPLY_ACK in state.acked)
    return Plan(replace(state, backend_channel=True), (action,))


def _set_status(_offer: Offer, state: SessionState, message: Message) -> Plan:
    """Remember it. QEMU's generic device never sends DRIVER_OK or 0, so nothing hangs on it."""
    status = U64.parse(message.payload).value
    if status > _STATUS_MAX:
        raise FrontendError(f"device status {status:#x}")
    return Plan(replace(state, status=status))


def _get_status(_offer: Offer, state: SessionState, _message: Message) -> Plan:
    return Plan(state, payload=U64(state.status).pack())


def _reset_device(_offer: Offer, state: SessionState, _message: Message) -> Plan:
    actions: list[Action] = [DeviceStopped()] if state.device_started else []
    actions += [StopRing(index) for index, ring in enumerate(state.rings) if ring.started]
    actions.append(DriverReset())
    enabled = state.features_settled and not state.has(VirtioFeature.PROTOCOL_FEATURES)
    # Stopping closed the kick and the call of the started ones; the other eventfds stay.
    rings = tuple(
        RingState(
            call=ring.call and not ring.started,
            err=ring.err,
            enabled=enabled,
            start_number=ring.start_number,
        )
        for ring in state.rings
    )
    return Plan(replace(state, rings=rings, device_started=False, status=0), tuple(actions))


def _check_window(offer: Offer, window: ConfigSpace) -> None:
    if window.offset + len(window.content) > offer.config_size:
        raise FrontendError(
            f"config space window {window.offset}+{len(window.content)},"
            f" the device has {offer.config_size} bytes"
        )


def _get_config(offer: Offer, state: SessionState, message: Message) -> Plan:
    window = ConfigSpace.parse(message.payload)
    _check_window(offer, window)

    def settle(outcomes: Sequence[Outcome]) -> Settled:
        (content,) = outcomes
        assert isinstance(content, bytes), "GetConfig gives bytes"
        return state, replace(window, content=content).pack()

    return Plan(state, (GetConfig(window.offset, len(window.content)),), settle=settle)


def _set_config(offer: Offer, state: SessionState, message: Message) -> Plan:
    window = ConfigSpace.parse(message.payload)
    _check_window(offer, window)
    if window.flags not in _CONFIG_WRITE_FLAGS:
        raise FrontendError(f"config space flags {window.flags:#x}")
    migration = _CONFIG_WRITE_FLAGS[window.flags]
    return Plan(state, (SetConfig(window.offset, window.content, migration),))


HANDLERS: Final[dict[Request, Handler]] = {
    Request.GET_FEATURES: _get_features,
    Request.SET_FEATURES: _set_features,
    Request.GET_PROTOCOL_FEATURES: _get_protocol_features,
    Request.SET_PROTOCOL_FEATURES: _set_protocol_features,
    Request.SET_OWNER: _set_owner,
    Request.RESET_OWNER: _reset_owner,
    Request.GET_QUEUE_NUM: _get_queue_num,
    Request.GET_MAX_MEM_SLOTS: _get_max_mem_slots,
    Request.GET_SHMEM_CONFIG: _get_shmem_config,
    Request.SET_BACKEND_REQ_FD: _set_backend_req_fd,
    Request.SET_STATUS: _set_status,
    Request.GET_STATUS: _get_status,
    Request.RESET_DEVICE: _reset_device,
    Request.GET_CONFIG: _get_config,
    Request.SET_CONFIG: _set_config,
}
