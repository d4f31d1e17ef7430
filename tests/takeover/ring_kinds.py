"""The kinds of messages that set up, start and stop a ring, each with what it must come to."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from tests.fakes.driver import Buffer
from tests.fakes.eventfd import new_eventfd
from tests.fakes.handshake import accepted
from tests.fakes.memory import PAGE_SIZE
from tests.fakes.messages import Request, u64, vring_state
from tests.native.rig import wait_until
from tests.takeover.balloon_scene import RING, BalloonVm, Kind
from tests.takeover.scene import nothing, readable

NOWHERE = 1 << 15  # no descriptor has this number


def _set_up_before(request: Request, vm: BalloonVm) -> None:
    vm.stop_ring()
    for step, payload, fds in vm.ring_steps():
        if step == request:
            return
        accepted(vm.front.tell(step, payload, fds), step.name)


def _set_up_after(request: Request, vm: BalloonVm) -> None:
    steps = vm.ring_steps()
    numbers = [step for step, _, _ in steps]
    for step, payload, fds in steps[numbers.index(request) + 1 :]:
        accepted(vm.front.tell(step, payload, fds), step.name)


def _payload_of(request: Request, vm: BalloonVm) -> bytes:
    return next(payload for step, payload, _ in vm.ring_steps() if step == request)


def _fds_of(request: Request, vm: BalloonVm) -> list[int]:
    return next(fds for step, _, fds in vm.ring_steps() if step == request)


def _ring_kind(request: Request) -> Kind:
    return Kind(
        request.name.lower().replace("_", "-"),
        request,
        partial(_payload_of, request),
        partial(_fds_of, request),
        ready=partial(_set_up_before, request),
        after=partial(_set_up_after, request),
    )


def _renew(role: str, vm: BalloonVm) -> None:
    name = f"{role}_fd"
    os.close(getattr(vm.ring, name))
    setattr(vm.ring, name, new_eventfd())


def _eventfd_kind(
    name: str, request: Request, role: str, finish: Callable[[BalloonVm], None] = nothing
) -> Kind:
    """A ring that runs gets another of its eventfds."""
    return Kind(
        name,
        request,
        lambda vm: u64(RING),
        lambda vm: [getattr(vm.ring, f"{role}_fd")],
        ready=partial(_renew, role),
        finish=finish,
    )


def _fault_is_told(vm: BalloonVm) -> None:
    vm.ring.add_chain([Buffer(NOWHERE << 40, PAGE_SIZE)])
    vm.ring.kick()
    assert vm.ring.wait_err(), "a broken ring was not told on its err eventfd"
    wait_until(lambda: list(vm.kept.status()["faults"]) == [str(RING)])


def _enable(value: bool, vm: BalloonVm) -> None:
    accepted(vm.front.set_vring_enable(RING, value), "SET_VRING_ENABLE")


def _set_up_again(vm: BalloonVm) -> None:
    for request, payload, fds in vm.ring_steps():
        accepted(vm.front.tell(request, payload, fds), request.name)


def _leave_unread(vm: BalloonVm) -> None:
    vm.answerer.reads = False
    vm.kept.wish("PUT", "/balloon", target=PAGE_SIZE * vm.next_number())
    channel = vm.front.backend_requests
    assert channel is not None
    wait_until(lambda: readable(channel))


def _find_it_withdrawn(vm: BalloonVm) -> None:
    changes, withdrawn = vm.answerer.changes, vm.answerer.withdrawn
    vm.answerer.reads = True
    wait_until(lambda: vm.answerer.withdrawn > withdrawn)
    assert vm.answerer.changes == changes
    _set_up_again(vm)
    wait_until(lambda: vm.answerer.changes > changes)


def _position(vm: BalloonVm) -> bytes:
    # A split ring's base is the guest's own index: all it made available has come back.
    vm.base = vm.machine.memory.read_number(vm.ring.parts.avail + 2, 2)
    return vring_state(RING, vm.base)


RINGS = [
    _ring_kind(Request.SET_VRING_NUM),
    _ring_kind(Request.SET_VRING_BASE),
    _ring_kind(Request.SET_VRING_ADDR),
    _ring_kind(Request.SET_VRING_KICK),
    _eventfd_kind("set-vring-kick-running", Request.SET_VRING_KICK, "kick"),
    _eventfd_kind("set-vring-call", Request.SET_VRING_CALL, "call"),
    _eventfd_kind("set-vring-err", Request.SET_VRING_ERR, "err", _fault_is_told),
    Kind(
        "set-vring-disable",
        Request.SET_VRING_ENABLE,
        lambda vm: vring_state(RING, 0),
        after=partial(_enable, True),
    ),
    Kind(
        "set-vring-enable",
        Request.SET_VRING_ENABLE,
        lambda vm: vring_state(RING, 1),
        ready=partial(_enable, False),
    ),
    Kind(
        "get-vring-base",
        Request.GET_VRING_BASE,
        lambda vm: vring_state(RING, 0),
        answer=_position,
        after=_set_up_again,
    ),
    # QEMU would crash on what it read of it after its stop.
    Kind(
        "get-vring-base-change-unread",
        Request.GET_VRING_BASE,
        lambda vm: vring_state(RING, 0),
        answer=_position,
        ready=_leave_unread,
        after=_find_it_withdrawn,
    ),
]
