"""One connection's queues and config space, as the worker serves them.

Methods marked "parked" may be called only while the device's worker is parked (asserted in C).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Final, Self

from vhostd._native._core import ffi, lib
from vhostd._native.failure import check
from vhostd._native.image import Image
from vhostd._native.memory import Log, Region
from vhostd._native.values import (
    BalloonCounters,
    BalloonFlag,
    Chain,
    Event,
    Fault,
    Handler,
    PmemCounters,
    RingPosition,
    RingSetup,
    RingStatistics,
)
from vhostd._native.worker import Worker

_ADDRESS_UNKNOWN: Final = (1 << 64) - 1


class Device:
    """Queues, config bytes and counters.

    Args:
        queue_count: at most 8.
        config_size: bytes, at most 256.
        config_writable: config_size bytes, a 1 bit for each bit the guest may write.

    Raises:
        OSError: no memory or descriptor for it.
    """

    def __init__(self, queue_count: int, config_size: int, config_writable: bytes) -> None:
        _check_mask(config_size, config_writable)
        error = ffi.new("int *")
        handle = lib.vhd_device_create(queue_count, config_size, config_writable, error)
        if not handle:
            check(error[0], "device")
        self._own(handle, config_size)

    @classmethod
    def adopt(
        cls, fd: int, reply_fd: int, queue_count: int, config_size: int, config_writable: bytes
    ) -> Self:
        """Take over from a dead predecessor; its rings are not started, Event.CONFIG is raised.

        Config bytes that are ours, not the guest's, must be published anew: that may have been cut.

        Args:
            fd: what was its shared_fd; duplicated.
            reply_fd: what was its reply_fd, the same open file; duplicated.
            queue_count: as it had, like all that follow.
            config_size: bytes.
            config_writable: as for a new one.

        Raises:
            OSError: EPROTO another version made them, or for another kind of device, or they are
                not these memfds; or no memory or descriptor for it.
        """
        _check_mask(config_size, config_writable)
        error = ffi.new("int *")
        handle = lib.vhd_device_adopt(
            fd, reply_fd, queue_count, config_size, config_writable, error
        )
        if not handle:
            check(error[0], "device of a predecessor")
        device = cls.__new__(cls)
        device._own(handle, config_size)
        return device

    def _own(self, handle: Any, config_size: int) -> None:  # noqa: ANN401  # see _position()
        self._handle = handle
        self._shared: Any = lib.vhd_device_shared(self._handle)
        self._config_size = config_size
        self._regions: list[Region] = []
        self._bytes: Any = ffi.new("uint8_t[]", lib.VHD_CONTROL_READABLE_MAX)

    def close(self) -> None:
        """Free it; it must be detached. Twice is fine."""
        handle, self._handle = self._handle, ffi.NULL
        self._shared = ffi.NULL
        lib.vhd_device_destroy(handle)

    def attach(self, worker: Worker) -> None:
        """Let the worker serve it. Parked.

        Raises:
            OSError: ENOSPC, the worker has 64 devices.
        """
        check(lib.vhd_device_attach(self._handle, worker.handle), "attach device")

    def detach(self) -> None:
        """Stop its rings and take it from the worker. Parked."""
        lib.vhd_device_detach(self._handle)

    def take_events(self) -> Event:
        """What happened since the last call."""
        return Event(lib.vhd_device_take_events(self._handle))

    @property
    def shared_fd(self) -> int:
        """The memfd behind counters, config bytes and ring positions; stays ours."""
        fd: int = lib.vhd_device_shared_fd(self._handle)
        return fd

    @property
    def reply_fd(self) -> int:
        """The memfd replies are sent from, whose file position matters; stays ours."""
        fd: int = lib.vhd_device_reply_fd(self._handle)
        return fd

    # -- socket and config space ---------------------------------------------------------------

    def set_socket(self, fd: int) -> None:
        """The connection, which Python owns at first; it stays the caller's. Parked.

        It becomes non-blocking. An adopted device must get the one its predecessor had.
        """
        lib.vhd_socket_set(self._handle, fd)

    def arm_socket(self) -> None:
        """Hand the socket to the worker, until Event.SOCKET hands it back."""
        check(lib.vhd_socket_arm(self._handle), "watch socket")

    def configure_socket(self, hot: bool, reply_ack: bool) -> None:
        """hot: the worker answers config requests. reply_ack: it acknowledges them when asked."""
        lib.vhd_socket_configure(self._handle, hot, reply_ack)

    # A request is answered once even if we are killed: look at it with MSG_PEEK, handle it,
    # prepare, finish. A death before prepare_reply() leaves it to be handled again, one after it
    # to be finished.

    @property
    def reply_numbers(self) -> tuple[int, int]:
        """Numbers of the reply that is prepared (0: none) and of the latest that is finished."""
        raw = self._shared.reply
        return raw.pending, raw.finished

    def prepare_reply(self, number: int, consume_size: int, data: bytes = b"") -> None:
        """Say that the request at the head of the socket was handled. Nothing is sent yet.

        Args:
            number: above 0 and that of the one before, see reply_numbers.
            consume_size: bytes of the request, all of which are there; descriptors that came with
                them are closed.
            data: its reply, at most 8192 bytes, may be none; descriptors can't go with it.

        Raises:
            OSError: EBUSY the last one is not finished, EINVAL too large, ENOTCONN no socket.
        """
        result = lib.vhd_reply_prepare(self._handle, number, consume_size, data, len(data))
        check(result, "prepare reply")

    def finish_reply(self) -> bool:
        """Take the request from the socket and send the reply, as far as that was not done.

        A successor calls it before it looks at the socket. Nothing prepared: nothing to do.

        Returns:
            False: the socket is full; call again when it is writable, and do nothing else with it.

        Raises:
            OSError: EPIPE or ECONNRESET the VMM is gone, EPROTO the request was not all there;
                these end it, nothing is owed any more.
        """
        result = lib.vhd_reply_finish(self._handle)
        if result == -errno.EAGAIN:
            return False
        check(result, "send reply")
        return True

    def publish_config(self, offset: int, data: bytes) -> None:
        """Change bytes of the config space."""
        lib.vhd_config_publish(self._handle, offset, data, len(data))

    def read_config(self) -> bytes:
        """The whole config space."""
        content = ffi.new("uint8_t[]", self._config_size)
        lib.vhd_config_read(self._handle, content, self._config_size)
        return bytes(ffi.buffer(content))

    # -- memory --------------------------------------------------------------------------------

    def set_regions(self, regions: Sequence[Region]) -> None:
        """Replace the memory table. Parked.

        Raises:
            OSError: EINVAL regions overlap or leave their file; EFAULT a started ring would lie
                outside. The old table stays.
        """
        table = ffi.new("struct vhd_region[]", len(regions))
        for slot, region in zip(table, regions, strict=True):
            slot.guest_addr = region.guest_addr
            slot.size = region.size
            slot.file_offset = region.file_offset
            slot.mapping = region.mapping.handle
            slot.preallocated = region.preallocated
        check(lib.vhd_device_set_regions(self._handle, table, len(regions)), "memory table")
        self._regions = list(regions)  # keeps the mappings alive as long as C points to them

    def set_log(self, log: Log | None, log_all: bool) -> None:
        """Use a dirty log; log_all: also for what the device itself writes. Parked."""
        lib.vhd_device_set_log(self._handle, ffi.NULL if log is None else log.handle, log_all)

    # -- rings ---------------------------------------------------------------------------------

    def start_ring(self, index: int, setup: RingSetup) -> None:
        """Start a stopped ring, disabled. Parked.

        The worker reads the rest from guest memory when it runs again, and before it parks again;
        where that memory is gone the ring is quarantined (Fault.SIGBUS).

        Raises:
            OSError: EINVAL its size is not legal; EFAULT a part is misaligned, overlaps another
                or does not lie in one region; ENOMEM.
        """
        check(lib.vhd_ring_start(self._handle, index, _raw_setup(setup)), f"ring {index}")

    def resume_ring(self, index: int, setup: RingSetup) -> None:
        """Start a ring of an adopted device, disabled, where the predecessor left it. Parked.

        Where that is it finds out itself if setup.start_number is that of the predecessor's last
        start, even if it was stopped since; otherwise it starts at setup.position. The driver is
        interrupted once. A ring in quarantine stays there. Where it stands, ring_statistics() tells
        once the worker was parked again: chains from there on come, some perhaps again.

        Raises:
            OSError: as start_ring().
        """
        check(lib.vhd_ring_resume(self._handle, index, _raw_setup(setup)), f"ring {index}")

    def enable_ring(self, index: int, enabled: bool) -> None:
        """Serve a started ring, or not; it is looked at once without a kick. Parked."""
        lib.vhd_ring_enable(self._handle, index, enabled)

    def set_handler(self, index: int, handler: Handler) -> None:
        """Who serves a ring. Parked."""
        lib.vhd_ring_set_handler(self._handle, index, handler.value)

    def set_call(self, index: int, fd: int) -> None:
        """The eventfd for used notifications, borrowed; -1 = none. Parked."""
        lib.vhd_ring_set_call(self._handle, index, fd)

    def set_err(self, index: int, fd: int) -> None:
        """The eventfd for a broken ring, borrowed; -1 = none. Parked."""
        lib.vhd_ring_set_err(self._handle, index, fd)

    def stop_ring(self, index: int) -> RingPosition:
        """Stop a ring; chains not completed come again where it stands now. Parked."""
        position = ffi.new("struct vhd_ring_position *")
        lib.vhd_ring_stop(self._handle, index, position)
        return _position(position)

    def take_chain(self, index: int) -> Chain | None:
        """The next chain of a control queue, if there is one."""
        chain = ffi.new("struct vhd_chain *")
        if not lib.vhd_chain_take(self._handle, index, chain, self._bytes):
            return None
        return Chain(
            token=chain.token,
            position=chain.position,
            data=bytes(ffi.buffer(self._bytes, chain.copied_size)),
            readable_size=chain.readable_size,
            writable_count=chain.writable_count,
            writable_size=chain.writable_size,
            writable_addr=chain.writable_addr,
        )

    def complete_chain(self, index: int, token: int, data: bytes = b"") -> None:
        """Give a chain back with data in its writable part; in the order chains were taken.

        Raises:
            OSError: ESTALE the ring was stopped since, or it was completed before; EINVAL more
                than 256 bytes.
        """
        result = lib.vhd_chain_complete(self._handle, index, token, data, len(data))
        check(result, f"chain of queue {index}")

    # -- balloon and counters ------------------------------------------------------------------

    def balloon_configure(self, flags: BalloonFlag) -> None:
        """How pages are treated from now on."""
        lib.vhd_balloon_configure(self._handle, int(flags))

    def balloon_reset(self) -> None:
        """Nothing is in the balloon any more. Parked."""
        lib.vhd_balloon_reset(self._handle)

    def balloon_counters(self) -> BalloonCounters:
        """What the data plane counted so far."""
        raw = self._shared.balloon
        return BalloonCounters(*(getattr(raw, field.name) for field in fields(BalloonCounters)))

    def set_image(self, image: Image | None) -> None:
        """Whose syncs a FLUSH ring asks for. Parked."""
        lib.vhd_device_set_image(self._handle, ffi.NULL if image is None else image.handle)

    def pmem_counters(self) -> PmemCounters:
        """What became of flush requests so far."""
        raw = self._shared.pmem
        return PmemCounters(raw.flushes, raw.flush_errors, raw.malformed, raw.batches)

    def config_counters(self) -> tuple[int, int]:
        """Config reads and writes the worker answered."""
        return self._shared.config_reads, self._shared.config_writes

    def ring_statistics(self, index: int) -> RingStatistics:
        """Where a ring stands and what it counted."""
        raw = self._shared.rings[index]
        fault = Fault(raw.fault)
        outside = fault is Fault.ADDRESS and raw.fault_addr != _ADDRESS_UNKNOWN
        return RingStatistics(
            position=_position(raw.position),
            started=bool(raw.started),
            enabled=bool(raw.enabled),
            fault=fault,
            fault_addr=raw.fault_addr if outside else None,
            taken=bool(raw.taken),
            kicks=raw.kicks,
            chains=raw.chains,
            used=raw.used,
            calls=raw.calls,
            calls_dropped=raw.calls_dropped,
            faults=raw.faults,
            rejected=raw.rejected,
        )


def _check_mask(config_size: int, config_writable: bytes) -> None:
    if len(config_writable) != config_size:
        raise ValueError("config_writable must have a byte for each of the config space")


def _raw_setup(setup: RingSetup) -> Any:  # noqa: ANN401  # see _position()
    position = setup.position
    return ffi.new(
        "struct vhd_ring_setup *",
        {
            "size": setup.size,
            "features": int(setup.features),
            "desc_addr": setup.desc_addr,
            "avail_addr": setup.avail_addr,
            "used_addr": setup.used_addr,
            "log_addr": setup.log_addr,
            "position": {
                "next_avail": position.next_avail,
                "next_used": position.next_used,
                "avail_wrap": position.avail_wrap,
                "used_wrap": position.used_wrap,
            },
            "handler": setup.handler.value,
            "kick_fd": setup.kick_fd,
            "call_fd": setup.call_fd,
            "err_fd": setup.err_fd,
            "start_number": setup.start_number,
        },
    )


def _position(raw: Any) -> RingPosition:  # noqa: ANN401  # a cffi struct has no better type
    return RingPosition(raw.next_avail, raw.next_used, raw.avail_wrap, raw.used_wrap)
