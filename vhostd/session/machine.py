"""One connection's session: each message becomes a step, and a step succeeds whole or not at all.

    step = machine.on_message(message)
    perform step.actions in order; each may give an outcome
    reply = machine.commit(step, outcomes)      all were performed
    reply = machine.refuse(step)                one raised FrontendError or HostError
    store machine.state for a successor, then send the reply, if any

The state is an immutable value and is replaced by commit() only, so a refused message cannot leave
a trace in it. Knows which handler meets which request. Must not know what any handler decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from vhostd.errors import FrontendError, VhostdError
from vhostd.protocol.features import ProtocolFeature, feature_names
from vhostd.protocol.framing import Message
from vhostd.protocol.replies import Reply, accept, refuse
from vhostd.protocol.requests import Request
from vhostd.session import memory_requests, negotiation, ring_requests
from vhostd.session.actions import Action, DeviceStopped, Outcome, StopRing
from vhostd.session.plan import Handler, Offer, Plan
from vhostd.session.state import SessionState

HANDLERS: Final[dict[Request, Handler]] = {
    **negotiation.HANDLERS,
    **memory_requests.HANDLERS,
    **ring_requests.HANDLERS,
}
"""A request in RULES but not in here is refused: its device side does not exist."""


@dataclass(frozen=True, slots=True)
class Step:
    """One message on its way through a session.

    Attributes:
        message: what came.
        actions: what its shell must do before commit(); none when it is refused.
        refusal: why it is refused, or None.
    """

    message: Message
    plan: Plan
    refusal: VhostdError | None = None

    @property
    def actions(self) -> tuple[Action, ...]:
        """What the shell must do, in order."""
        return self.plan.actions


class SessionMachine:
    """The negotiation of one connection, from its first byte or from where a predecessor stood."""

    def __init__(self, offer: Offer, state: SessionState | None = None) -> None:
        self._offer = offer
        self._state = SessionState.initial(offer.queue_count) if state is None else state
        assert len(self._state.rings) == offer.queue_count, "a state of another device"

    @property
    def state(self) -> SessionState:
        """What was agreed on so far."""
        return self._state

    def on_message(self, message: Message) -> Step:
        """Decide what a message asks for. The state is the same until commit().

        Takes over the message's descriptors: those no action carries are closed here.

        Raises:
            FrontendError: fatal; the connection must end. Refusals are no error: see Step.
        """
        try:
            step = Step(message, self._plan(message))
        except FrontendError as error:
            message.close_fds()
            if error.fatal:
                raise
            text = str(error) if message.fault else f"{message.name}: {error}"
            return Step(message, Plan(self._state), FrontendError(text, outside=error.outside))
        if not step.actions:
            message.close_fds()
        return step

    def commit(self, step: Step, outcomes: Sequence[Outcome] = ()) -> Reply | None:
        """Take the step: all its actions were performed. A refused step is answered as such.

        Args:
            step: what on_message() returned last.
            outcomes: what each action gave, in order; None for those that give nothing.

        Returns:
            What to send, or None where nothing is called for.
        """
        if step.refusal is not None:
            return refuse(step.message, self._state.acked)
        assert len(outcomes) == len(step.actions), "one outcome for each action"
        acked = self._state.acked
        plan = step.plan
        self._state, payload = plan.settle(outcomes) if plan.settle else (plan.state, plan.payload)
        return accept(step.message, acked, payload)

    def refuse(self, step: Step) -> Reply | None:
        """Give the step up: one of its actions raised. The state stays as it was.

        Returns:
            What to send, or None where nothing is called for.
        """
        step.message.close_fds()
        return refuse(step.message, self._state.acked)

    def close(self) -> tuple[Action, ...]:
        """What must be done when the connection has ended: nothing may run for it any more."""
        rings = self._state.rings
        stops = [StopRing(index) for index, ring in enumerate(rings) if ring.started]
        return (DeviceStopped(), *stops) if self._state.device_started else tuple(stops)

    def _plan(self, message: Message) -> Plan:
        if message.fault is not None:
            raise FrontendError(message.fault)
        rule = message.rule
        assert rule is not None, "a message without a rule has a fault"
        if missing := rule.needs & ~int(self._state.acked):
            names = ", ".join(feature_names(missing, ProtocolFeature))
            raise FrontendError(f"{names} was not acknowledged")
        handler = HANDLERS.get(Request(message.request))
        if handler is None:
            raise FrontendError("not supported")
        return handler(self._offer, self._state, message)
