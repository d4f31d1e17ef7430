"""A whole pretended VM: guest RAM, a front end and the queues of one device.

Ties the other modules together for tests that only want a running device. Knows no device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.fakes import handshake
from tests.fakes.driver import Queue, RingOptions
from tests.fakes.frontend import FrontEnd
from tests.fakes.memory import GuestMemory
from tests.fakes.messages import QEMU_GENERIC_DEVICE_ACKS, VirtioFeature
from tests.fakes.packed import PackedQueue
from tests.fakes.split import SplitQueue


@dataclass(frozen=True, slots=True)
class Setup:
    """What the pretended VM asks for; features it wants and is not offered are dropped."""

    packed: bool = False
    event_idx: bool = False
    indirect: bool = False
    in_order: bool = False
    device_features: int = 0xFF_FFFF  # the device's own bits 0..23
    protocol_features: int = QEMU_GENERIC_DEVICE_ACKS
    queue_count: int = 5
    queue_size: int = 128
    config_size: int = 16
    make_memory: Callable[[], GuestMemory] = GuestMemory.flat
    queue_indexes: frozenset[int] | None = None  # which of them the guest sets up; None = all

    @property
    def label(self) -> str:
        """Short text for a test id."""
        words = ["packed" if self.packed else "split"]
        words += [name for name in ("event_idx", "indirect", "in_order") if getattr(self, name)]
        return "-".join(words)

    def wanted_features(self, offered: int) -> int:
        """Return the virtio features this guest takes out of those offered."""
        wanted = self.device_features | VirtioFeature.VERSION_1 | VirtioFeature.PROTOCOL_FEATURES
        choices = {
            VirtioFeature.RING_PACKED: self.packed,
            VirtioFeature.RING_EVENT_IDX: self.event_idx,
            VirtioFeature.RING_INDIRECT_DESC: self.indirect,
            VirtioFeature.IN_ORDER: self.in_order,
        }
        for bit, chosen in choices.items():
            assert not chosen or offered & bit, f"{bit!r} is not offered"
            wanted |= bit if chosen else 0
        return wanted & offered

    def make_queue(self, memory: GuestMemory, size: int | None = None) -> Queue:
        """Lay out one queue of the chosen kind."""
        options = RingOptions(self.event_idx, self.indirect, self.in_order)
        kind = PackedQueue if self.packed else SplitQueue
        return kind(memory, size or self.queue_size, options)


@dataclass
class Machine:
    """A running pretended VM; close it, or use it as a context."""

    front: FrontEnd
    setup: Setup
    memory: GuestMemory
    queues: list[Queue]
    offer: handshake.Offer
    features: int = 0
    bases: list[int | None] | None = field(default=None)

    @classmethod
    def realize(cls, path: Path | str, setup: Setup | None = None) -> Machine:
        """Connect and negotiate as QEMU does at device creation; nothing is started."""
        return cls.realize_on(FrontEnd.connect(path), setup)

    @classmethod
    def realize_on(
        cls, front: FrontEnd, setup: Setup | None = None, *, own: bool = True
    ) -> Machine:
        """Negotiate on a connection that exists; it is closed when that fails."""
        setup = setup or Setup()
        memory = setup.make_memory()
        queues: list[Queue] = []
        try:
            queues += [setup.make_queue(memory) for _ in range(setup.queue_count)]
            offer = handshake.realize(
                front,
                queues,
                protocol_features=setup.protocol_features,
                config_size=setup.config_size,
                own=own,
            )
            features = setup.wanted_features(offer.features)
        except BaseException:
            _close_all(front, queues, memory)
            raise
        return cls(front, setup, memory, queues, offer, features)

    @classmethod
    def boot(cls, path: Path | str, setup: Setup | None = None) -> Machine:
        """Connect, negotiate and start every queue."""
        machine = cls.realize(path, setup)
        try:
            machine.start()
        except BaseException:
            machine.close()
            raise
        return machine

    def started_queues(self) -> list[Queue | None]:
        """Return the queues by index, None where the guest sets none up."""
        chosen = self.setup.queue_indexes
        return [
            queue if chosen is None or index in chosen else None
            for index, queue in enumerate(self.queues)
        ]

    def start(self, *, with_memory: bool = True) -> None:
        """Start, or go on from where stop() left the rings."""
        handshake.start(
            self.front,
            self.memory,
            self.started_queues(),
            self.features,
            bases=self.bases,
            with_memory=with_memory,
            config_size=self.setup.config_size,
        )

    def stop(self) -> list[int | None]:
        """Stop as QEMU does, remember and return the ring bases."""
        self.bases = handshake.stop(self.front, self.started_queues())
        return self.bases

    def restart_afresh(self) -> None:
        """Do what a guest reboot looks like: stop, empty rings, start from base 0."""
        self.stop()
        self.bases = None
        for queue in self.queues:
            queue.reset()
        self.start(with_memory=False)

    def restart_ring(self, index: int) -> None:
        """Stop one ring, empty it and set it up again while the others run."""
        self.front.get_vring_base(index)
        queue = self.queues[index]
        queue.reset()
        handshake.set_up_ring(self.front, self.memory, index, queue)
        handshake.accepted(self.front.set_vring_enable(index, True), "SET_VRING_ENABLE")

    def close(self) -> None:
        """Hang up and give everything back."""
        _close_all(self.front, self.queues, self.memory)
        self.queues = []

    def __enter__(self) -> Self:
        """Return the machine itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Hang up."""
        self.close()


def _close_all(front: FrontEnd, queues: list[Queue], memory: GuestMemory) -> None:
    front.close()
    for queue in queues:
        queue.close()
    memory.close()
