"""Has the driver started afresh? QEMU's generic device sends no reset, so its rings must tell.

A guest that was only stopped and continued goes on where its rings stood. A new driver, after a
reboot or in another kernel, has new rings: all of them start at their beginning. That alone proves
nothing, since a ring that was never used is there too, and a packed ring comes back to it every
second round. But a ring of which chains were taken since its driver began can't be at its beginning
for the same driver, except once in 65536 chains, or after two rounds: then a driver that goes on is
taken for a new one, which costs what was known of it (which pages it gave up), and no data.

Asked when the first ring goes live, because only then all rings of the start are there. All that it
needs is in the recorded state, so a successor comes to the same verdict. Must not know devices.
"""

from __future__ import annotations

from dataclasses import replace

from vhostd.session.actions import Action, DeviceStarted, DriverReset, RingPosition
from vhostd.session.plan import Plan
from vhostd.session.ring_layout import at_beginning
from vhostd.session.state import RingAddresses, RingState, SessionState


def started_at(ring: RingState, addresses: RingAddresses, *, begins: bool) -> RingState:
    """The ring as it is once it starts there, at its beginning or not."""
    return replace(
        ring,
        started=True,
        began=begins,
        relocated=ring.relocated or ring.started_at != addresses,
        started_at=addresses,
    )


def stopped_at(ring: RingState, position: RingPosition, *, taken: bool, packed: bool) -> RingState:
    """The ring as it is once it stopped there; taken: a chain was, since it started."""
    served = ring.served or taken or not at_beginning(position, packed=packed)
    return replace(ring, started=False, served=served)


def go_live(
    before: SessionState,
    state: SessionState,
    start: tuple[Action, ...] = (),
    enable: tuple[Action, ...] = (),
) -> Plan:
    """Rings were started and enabled by these actions, in a state that has them so.

    If they are the first to be served, a new driver is told to the device before any of its chains
    is looked at.
    """
    if state.device_started or not enable:
        return Plan(state, (*start, *enable))
    reset: tuple[Action, ...] = ()
    if not any(ring.live for ring in before.rings):
        if _is_new(state):
            reset = (DriverReset(),)
            state = replace(state, rings=tuple(replace(r, served=False) for r in state.rings))
        state = replace(state, rings=tuple(_settled(ring) for ring in state.rings))
    state = replace(state, device_started=True)
    return Plan(state, (*start, *reset, *enable, DeviceStarted()))


def _is_new(state: SessionState) -> bool:
    started = [ring for ring in state.rings if ring.started]
    return all(ring.began for ring in started) and any(
        ring.served or ring.relocated for ring in started
    )


def _settled(ring: RingState) -> RingState:
    return replace(ring, relocated=False) if ring.started else ring
