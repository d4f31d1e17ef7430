"""A VM without a VMM: what the machine's kind does to its devices, as an operator sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from vhostd.backend.journal import Journal
from vhostd.backend.vm import Vm
from vhostd.config import VmConfig
from vhostd.config_devices import BalloonConfig, MemConfig
from vhostd.devices.base import DiscardMemory, MemorySlot, Refused
from vhostd.log import RateLimiter
from vhostd.memory.registry import MemoryRegistry
from vhostd.transport.listener import Listener
from vhostd.units import GiB, MiB


@pytest.fixture
async def vm(tmp_path: Path) -> AsyncIterator[Vm]:
    mems = tuple(
        MemConfig(f"mem{n}", tmp_path / f"mem{n}", (8 + n) * GiB, GiB, requested_size=64 * MiB)
        for n in range(2)
    )
    balloon = BalloonConfig(tmp_path / "balloon")
    config = VmConfig("web", tmp_path / "qmp", balloon, mems)
    sources = [Listener.bind(path) for path in config.sockets]
    journal = Journal("web", RateLimiter(trio.current_time), lambda vm, event, fields: None)
    yield Vm(config, sources, MemoryRegistry(), journal)
    for source in sources:
        source.close()


def reasons(vm: Vm) -> set[str | None]:
    """Why nothing is given back, by each device."""
    status: dict[str, Any] = vm.status()
    return {device["inhibited"] for device in (status["balloon"], *status["mem"])}


async def test_pinned_memory_is_given_back_by_nobody_until_it_is_free(vm: Vm) -> None:
    vm.machine.on_machine(["gpu0 (vfio-pci)"], None)
    assert reasons(vm) == {"guest memory is pinned by gpu0 (vfio-pci)"}
    with pytest.raises(Refused, match="can't give memory back now"):
        vm.resize_mem("mem0", 0)
    assert vm.resize_mem("mem0", 128 * MiB) == "mem0"
    vm.machine.on_machine([], None)
    assert reasons(vm) == {None}
    vm.resize_mem("mem0", 0)


async def test_encrypted_memory_is_changed_by_nobody(vm: Vm) -> None:
    for _ in range(2):  # it is told again and again
        vm.machine.on_machine([], "/objects/sev0")
        assert reasons(vm) == {"guest memory is encrypted by /objects/sev0"}
        with pytest.raises(Refused, match="encrypted by /objects/sev0"):
            vm.set_balloon_target(MiB)
        with pytest.raises(Refused, match="encrypted by /objects/sev0"):
            vm.resize_mem("mem1", GiB)


async def test_a_device_must_be_named_where_there_are_several(vm: Vm) -> None:
    with pytest.raises(Refused, match="choose one of mem0, mem1"):
        vm.resize_mem(None, GiB)
    with pytest.raises(Refused, match="no memory device 'mem7'; it has mem0, mem1"):
        vm.resize_mem("mem7", GiB)


async def test_without_a_vmm_the_memory_as_a_whole_is_not_known(vm: Vm) -> None:
    with pytest.raises(Refused, match="no VMM is connected"):
        vm.set_memory(GiB)
    assert vm.status()["usable"] is None


async def test_every_vmm_s_window_waits_for_the_verdict_on_its_machine(vm: Vm) -> None:
    slots = [MemorySlot(8 * GiB, GiB)]
    mem = vm.mems["mem0"]
    for _ in range(2):
        vm.machine.on_connected(resumed=False)
        assert not any(isinstance(effect, DiscardMemory) for effect in mem.on_memory(slots))
        assert mem.look_begins() == []
        mem.on_looked({})
        vm.machine.on_machine([], None)
        assert mem.look_begins() == []  # all of it is being given back first
        mem.on_looked({})
        mem.on_disconnected()
