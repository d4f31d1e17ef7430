"""Requests about guest memory and the dirty log. Must not know files beyond handing them on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from vhostd.errors import FrontendError
from vhostd.protocol.features import ProtocolFeature
from vhostd.protocol.framing import Message
from vhostd.protocol.requests import Request
from vhostd.protocol.wire import Log, MemoryRegion, MemorySlot, MemoryTable
from vhostd.session.actions import FileIdentity, Outcome, RegionSource, SetLog, SetRegions
from vhostd.session.memory_table import GUEST_PAGE_SIZE, check_table, guest_end
from vhostd.session.plan import Handler, Offer, Plan, Settled
from vhostd.session.ring_layout import check_log, locate
from vhostd.session.state import GuestRegion, LogWindow, SessionState


def _set_mem_table(_offer: Offer, state: SessionState, message: Message) -> Plan:
    regions = MemoryTable.parse(message.payload).regions
    if len(message.fds) != len(regions):
        raise FrontendError(f"{len(message.fds)} descriptors for {len(regions)} memory regions")
    sources = zip(regions, message.fds, strict=True)
    return _replace_table(state, tuple(RegionSource(region, fd) for region, fd in sources))


def _add_mem_reg(_offer: Offer, state: SessionState, message: Message) -> Plan:
    region = MemorySlot.parse(message.payload).region
    kept = tuple(RegionSource(there.announced, None) for there in state.regions)
    return _replace_table(state, (*kept, RegionSource(region, message.fds[0])))


def _rem_mem_reg(_offer: Offer, state: SessionState, message: Message) -> Plan:
    """Remove the slot with this guest address, frontend address and size; the offset is ignored."""
    message.close_fds()
    told = MemorySlot.parse(message.payload).region
    kept = tuple(
        RegionSource(there.announced, None)
        for there in state.regions
        if replace(told, file_offset=there.file_offset) != there.announced
    )
    if len(kept) == len(state.regions):
        raise FrontendError(f"no such memory region: {told}")
    return _replace_table(state, kept)


def _replace_table(state: SessionState, sources: tuple[RegionSource, ...]) -> Plan:
    regions = [source.region for source in sources]
    check_table(regions, guest_addresses=ProtocolFeature.GPA_ADDRESSES in state.acked)
    _check_running_rings(state, regions)

    def settle(outcomes: Sequence[Outcome]) -> Settled:
        (identities,) = outcomes
        assert isinstance(identities, tuple), "SetRegions gives file identities"
        pairs = zip(regions, identities, strict=True)
        table = tuple(_in_force(region, identity) for region, identity in pairs)
        return replace(state, regions=table), b""

    return Plan(state, (SetRegions(sources),), settle=settle)


def _check_running_rings(state: SessionState, regions: Sequence[MemoryRegion]) -> None:
    """A ring that runs must stay where it is: whole, and at the same guest addresses."""
    for index, ring in enumerate(state.rings):
        if ring.started and locate(ring, state.features, regions) != ring.started_at:
            raise FrontendError(f"ring {index} runs elsewhere than the new memory table has it")


def _in_force(region: MemoryRegion, identity: FileIdentity) -> GuestRegion:
    return GuestRegion(
        guest_addr=region.guest_addr,
        size=region.size,
        frontend_addr=region.frontend_addr,
        file_offset=region.file_offset,
        device=identity.device,
        inode=identity.inode,
    )


def _set_log_base(_offer: Offer, state: SessionState, message: Message) -> Plan:
    log = Log.parse(message.payload)
    window = LogWindow(log.size, log.file_offset)
    end = guest_end([region.announced for region in state.regions])
    if end > log.size * 8 * GUEST_PAGE_SIZE:
        raise FrontendError(f"dirty log of {log.size} bytes for guest addresses up to {end:#x}")
    for ring in state.rings:
        if ring.size:
            check_log(ring, state.features, window)
    return Plan(replace(state, log=window), (SetLog(log, message.fds[0]),))


HANDLERS: Final[dict[Request, Handler]] = {
    Request.SET_MEM_TABLE: _set_mem_table,
    Request.ADD_MEM_REG: _add_mem_reg,
    Request.REM_MEM_REG: _rem_mem_reg,
    Request.SET_LOG_BASE: _set_log_base,
}
