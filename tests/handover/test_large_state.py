"""Which blocks are plugged, kept in place: whole for a successor whenever its writer dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from vhostd.backend.keeping import VmKeeping
from vhostd.backend.left import read_left
from vhostd.devices.base import Chain, Role
from vhostd.devices.mem import Mem
from vhostd.devices.mem_window import MemOptions
from vhostd.devices.verdict import Finding, Verdict
from vhostd.fds import OwnedFd
from vhostd.handover.large_state import LargeMemfd
from vhostd.handover.manager_store import ManagerStore
from vhostd.handover.state_memfd import StateDamaged
from vhostd.units import GiB, MiB

from tests.fakes.mem import MemRequest, pack_request
from tests.handover.manager import Manager, opened

BLOCK_SIZE = 2 * MiB
ADDRESS = 4 * GiB


class Death(Exception):
    """We end here."""


@contextmanager
def dying(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[list[int]]:
    """Die in place of the write number `at`, counted from 0; the sizes of those before."""
    sizes: list[int] = []
    write = os.pwrite

    def counted(fd: int, data: bytes, offset: int) -> int:
        if len(sizes) == at:
            raise Death
        sizes.append(len(data))
        return write(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", counted)
        yield sizes


def device(size: int = GiB) -> Mem:
    mem = Mem(MemOptions("mem0", ADDRESS, size, requested_size=size))
    mem.on_verdict(Verdict(Finding.FREE, ""))
    return mem


def commit(keeping: VmKeeping, mem: Mem) -> None:
    keeping.commit("mem0", mem, None, None, 1)


def ask(mem: Mem, kind: MemRequest, block: int, count: int, position: int) -> None:
    data = pack_request(kind, ADDRESS + block * BLOCK_SIZE, count)
    mem.on_chain(Chain(0, Role.GUEST_REQUEST, position, data, len(data), 1, 10, 0, position), 0.0)


def inherited(manager: Manager) -> tuple[VmKeeping, Mem]:
    """What a successor makes of it."""
    kept = manager.kept()
    found = read_left("web", kept)
    assert found is not None
    left, memfd = found
    store = opened(manager)
    store.adopt(kept)
    keeping = VmKeeping(store, "web", memfd)
    heir = device()
    saved = left.device("mem0")
    assert saved is not None
    heir.load(saved)
    blocks = left.large_state("web", "mem0")
    assert blocks is not None
    heir.large_state.load_content(blocks.read())
    keeping.adopt_large("mem0", blocks)
    return keeping, heir


def kept(manager: Manager) -> tuple[ManagerStore, VmKeeping, Mem]:
    """A device with a window, of which something is plugged and recorded."""
    store = opened(manager)
    keeping = VmKeeping(store, "web")
    mem = device()
    mem.load(mem.save() | {"plugged": [[0, 2], [4, 1]]})
    mem._blocks.missing_window = None  # as if a VMM had brought it
    commit(keeping, mem)
    manager.take_all()
    return store, keeping, mem


CHANGES = {
    "plug": (MemRequest.PLUG, 8, 5),
    "unplug": (MemRequest.UNPLUG, 0, 2),
    "unplug all": (MemRequest.UNPLUG_ALL, 0, 0),
    "state": (MemRequest.STATE, 0, 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whenever_we_die_the_blocks_are_as_before_or_as_after(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    seen: list[bytes] = []
    for at in range(20):
        store, keeping, mem = kept(manager)
        before = mem.large_state.content()
        ask(mem, *CHANGES[change], 7)
        after = mem.large_state.content()
        try:
            with dying(monkeypatch, at):
                commit(keeping, mem)
            done = True
        except Death:
            done = False
        manager.take_all()
        store.leave()
        _, heir = inherited(manager)
        found = heir.large_state.content()
        assert found in (before, after)
        assert heir.large_state.save_rest()["plugged"] == []
        # The answer and the blocks belong together.
        assert (found == after) == (len(heir.save()["recent"]) == 1) or before == after
        seen.append(found)
        manager.lose()
        if done:
            break
    else:
        raise AssertionError("it never came to an end")
    assert seen[0] == before and seen[-1] == after


def test_changes_go_on_after_a_take_over(manager: Manager) -> None:
    store, keeping, mem = kept(manager)
    ask(mem, MemRequest.PLUG, 100, 3, 1)
    commit(keeping, mem)
    store.leave()
    manager.take_all()
    keeping, heir = inherited(manager)
    assert heir.large_state.content() == mem.large_state.content()
    heir._blocks.missing_window = None
    ask(heir, MemRequest.UNPLUG, 101, 1, 2)
    commit(keeping, heir)
    manager.take_all()
    _, second = inherited(manager)
    assert list(second._blocks.plugged.runs()) == [(0, 2), (4, 1), (100, 1), (102, 1)]


def test_what_a_commit_writes_does_not_grow_with_the_window(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest may plug every second block of 1 TiB."""

    def written(size: int) -> int:
        keeping = VmKeeping(opened(manager), "web")
        mem = device(size)
        mem.large_state.load_content(
            bytes([1, 0]) * (size // BLOCK_SIZE // 2) + bytes(size // BLOCK_SIZE)
        )
        commit(keeping, mem)
        manager.take_all()
        ask(mem, MemRequest.STATE, 0, 2, 1)
        with dying(monkeypatch, -1) as sizes:
            commit(keeping, mem)
        manager.lose()
        return sum(sizes)

    assert written(1024 * GiB) <= written(GiB) + 64


def test_a_large_state_that_is_none_is_refused() -> None:
    with pytest.raises(StateDamaged):
        LargeMemfd.adopt(OwnedFd(os.memfd_create("x")))  # its size is not fixed
    made = LargeMemfd.create("x", bytes(16))
    for change in ((-1, 1, 1), (0, 17, 1), (16, 1, 1)):
        with pytest.raises(StateDamaged):
            made.change([change])
    assert made.read() == bytes(16)
    made.close()
    with pytest.raises(ValueError, match="neither in nor out"):
        device().large_state.load_content(bytes([2]) * (2 * GiB // BLOCK_SIZE))
    with pytest.raises(ValueError, match="a set of 3 blocks"):
        device().large_state.load_content(bytes(3))
