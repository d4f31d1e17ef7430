"""The kinds of messages that the daemon's Python handles, each with what it must come to.

Those of rings are in ring_kinds.py.
"""

from __future__ import annotations

import os
import socket
import struct

from tests.fakes import messages
from tests.fakes.channel import Channel
from tests.fakes.handshake import accepted
from tests.fakes.memory import PAGE_SIZE
from tests.fakes.messages import VRING_F_LOG, Request, VirtioFeature, u64
from tests.native.rig import wait_until
from tests.takeover.balloon_scene import EXTRA, RING, BalloonVm, Kind
from tests.takeover.ring_kinds import RINGS

LOG_ALL = int(VirtioFeature.LOG_ALL)
MIGRATION = 1  # flags of SET_CONFIG: not the guest wrote, but a VMM that takes over

# -- features and the like -------------------------------------------------------------------------


def _stop(vm: BalloonVm) -> None:
    vm.machine.stop()


def _start(vm: BalloonVm) -> None:
    vm.machine.start(with_memory=False)


def _offered(vm: BalloonVm) -> bytes:
    return u64(vm.machine.offer.features)


def _features(vm: BalloonVm) -> bytes:
    return u64(vm.machine.features)


def _other_logging(vm: BalloonVm) -> bytes:
    return u64(vm.machine.features | (LOG_ALL if vm.number % 2 else 0))


def _set_log(vm: BalloonVm) -> None:
    vm.next_number()
    vm.front.set_log_base(PAGE_SIZE, 0, vm.log)


def _disown(vm: BalloonVm) -> None:
    accepted(vm.front.reset_owner(), "RESET_OWNER")


def _own(vm: BalloonVm) -> None:
    accepted(vm.front.set_owner(), "SET_OWNER")


def _count(vm: BalloonVm) -> None:
    vm.next_number()


def _status(vm: BalloonVm) -> bytes:
    return u64(vm.number % 256)


def _status_is_kept(vm: BalloonVm) -> None:
    assert vm.front.get_status() == vm.number % 256


def _set_status(vm: BalloonVm) -> None:
    accepted(vm.front.set_status(vm.next_number() % 256), "SET_STATUS")


def _start_afresh(vm: BalloonVm) -> None:
    vm.machine.bases = None
    for queue in vm.machine.queues:
        queue.reset()
    _start(vm)


FEATURES = [
    Kind("get-features", Request.GET_FEATURES, answer=_offered),
    Kind("set-features-running", Request.SET_FEATURES, _features),
    Kind(
        "set-features-stopped",
        Request.SET_FEATURES,
        _features,
        ready=_stop,
        after=_start,
    ),
    Kind("set-features-logging", Request.SET_FEATURES, _other_logging, ready=_set_log),
    Kind(
        "get-protocol-features",
        Request.GET_PROTOCOL_FEATURES,
        answer=lambda vm: u64(vm.machine.offer.protocol_features),
    ),
    Kind(
        "set-protocol-features",
        Request.SET_PROTOCOL_FEATURES,
        lambda vm: u64(vm.front.protocol_features),
    ),
    Kind("get-queue-num", Request.GET_QUEUE_NUM, answer=lambda vm: u64(5)),
    Kind(
        "get-max-mem-slots",
        Request.GET_MAX_MEM_SLOTS,
        answer=lambda vm: u64(vm.machine.offer.memory_slots),
    ),
    # Done twice it would be refused.
    Kind("set-owner", Request.SET_OWNER, ready=_disown),
    Kind("reset-owner", Request.RESET_OWNER, after=_own),
    Kind("set-status", Request.SET_STATUS, _status, ready=_count, after=_status_is_kept),
    Kind("get-status", Request.GET_STATUS, answer=_status, ready=_set_status),
    Kind("reset-device", Request.RESET_DEVICE, after=_start_afresh),
]


# -- config space and back-end requests ------------------------------------------------------------


def _actual(vm: BalloonVm) -> bytes:
    return messages.config(0, struct.pack("<4I", 0, vm.number, 0, 0))


def _migrated_actual(vm: BalloonVm) -> bytes:
    return messages.config(0, struct.pack("<4I", 0, vm.number, 0, 0), flags=MIGRATION)


def _actual_is_known(vm: BalloonVm) -> None:
    assert vm.driver.config().actual == vm.number
    status = vm.kept.status()["balloon"]
    assert status["actual"] == vm.number * PAGE_SIZE


def _write_actual(vm: BalloonVm) -> None:
    vm.driver.write_actual(vm.next_number())


def _both_ends(vm: BalloonVm) -> list[int]:
    vm.pair = socket.socketpair()
    return [vm.pair[1].fileno()]


def _use_channel(vm: BalloonVm) -> None:
    ours, theirs = vm.pair
    theirs.close()
    vm.answerer.replace(Channel(ours))
    before = vm.answerer.changes
    vm.kept.wish("PUT", "/balloon", target=PAGE_SIZE * vm.next_number())
    wait_until(lambda: vm.answerer.changes > before)


CONFIG = [
    Kind(
        "get-config",
        Request.GET_CONFIG,
        lambda vm: messages.config(0, bytes(16)),
        answer=_actual,
        ready=_write_actual,
    ),
    # Only a message that finds the socket in Python's hands is Python's.
    Kind(
        "get-config-behind",
        Request.GET_CONFIG,
        lambda vm: messages.config(0, bytes(16)),
        answer=_actual,
        ready=_write_actual,
        behind=Request.GET_QUEUE_NUM,
    ),
    Kind(
        "set-config",
        Request.SET_CONFIG,
        _actual,
        ready=_count,
        after=_actual_is_known,
        told_later=True,
    ),
    Kind(
        "set-config-behind",
        Request.SET_CONFIG,
        _actual,
        ready=_count,
        after=_actual_is_known,
        behind=Request.GET_QUEUE_NUM,
    ),
    Kind(
        "set-config-migration",
        Request.SET_CONFIG,
        _migrated_actual,
        ready=_count,
        after=_actual_is_known,
    ),
    Kind(
        "set-backend-req-fd",
        Request.SET_BACKEND_REQ_FD,
        fds=_both_ends,
        after=_use_channel,
    ),
]

# -- memory ----------------------------------------------------------------------------------------


def _extra(vm: BalloonVm) -> bytes:
    return messages.memory_slot(EXTRA)


def _extra_fd(vm: BalloonVm) -> list[int]:
    return [vm.extra.fd]


def _add(vm: BalloonVm) -> None:
    accepted(vm.front.add_mem_reg(EXTRA, vm.extra.fd), "ADD_MEM_REG")


def _take_away(vm: BalloonVm) -> None:
    vm.extra_works(there=True)
    accepted(vm.front.rem_mem_reg(EXTRA, [vm.extra.fd]), "REM_MEM_REG")


def _table(vm: BalloonVm) -> bytes:
    regions = [*vm.machine.memory.wire_regions(guest_addresses=True), EXTRA]
    return messages.memory_table(regions)


def _dirt_is_marked(vm: BalloonVm) -> None:
    queue = vm.ring
    accepted(vm.front.set_features(vm.machine.features | LOG_ALL), "SET_FEATURES")
    parts = (queue.parts.desc, queue.parts.avail, queue.parts.used)
    told = vm.front.set_vring_addr(RING, *parts, VRING_F_LOG, queue.parts.used)
    accepted(told, "SET_VRING_ADDR")
    vm.works()
    page = queue.parts.used // PAGE_SIZE
    (byte,) = os.pread(vm.log, 1, page // 8)
    assert byte & 1 << page % 8, "a used ring was written to, and not marked in the log"


MEMORY = [
    Kind("add-mem-reg", Request.ADD_MEM_REG, _extra, _extra_fd, after=_take_away),
    Kind(
        "rem-mem-reg",
        Request.REM_MEM_REG,
        _extra,
        _extra_fd,
        ready=_add,
        after=lambda vm: vm.extra_works(there=False),
    ),
    Kind(
        "set-mem-table",
        Request.SET_MEM_TABLE,
        _table,
        lambda vm: [vm.machine.memory.fd, vm.extra.fd],
        after=_take_away,
    ),
    Kind(
        "set-log-base",
        Request.SET_LOG_BASE,
        lambda vm: messages.log(PAGE_SIZE, 0),
        lambda vm: [vm.log],
        finish=_dirt_is_marked,
    ),
]


MESSAGES = [*FEATURES, *CONFIG, *MEMORY, *RINGS]
