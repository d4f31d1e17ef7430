"""Guest memory without share=on, on real guests: status and doctor say so, and where."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from vhostd.control.diagnosis import daemon_checks
from vhostd.units import GiB, MiB

from tests.daemon import VhostdProcess
from tests.e2e.conftest import BALLOON_SOCKET, VM
from tests.e2e.waiting import until
from tests.vm.guest import Guest, balloon_device, boot
from tests.vm.stack import Stack

pytestmark = pytest.mark.guest

FIRST_DIMM = 4 * GiB  # where q35 puts it


@asynccontextmanager
async def guest_with_balloon(
    stack: Stack, folder: Path, *, qmp: bool = False, shared: bool = True
) -> AsyncIterator[tuple[VhostdProcess, Guest]]:
    monitor = folder / "vmm.qmp"
    configuration = f'[vm.{VM}]\nqmp = "{monitor}"\n' if qmp else ""
    configuration += f'[vm.{VM}.balloon]\nsocket = "{BALLOON_SOCKET}"\n'
    async with (
        VhostdProcess.start(folder, configuration) as daemon,
        boot(
            stack,
            memory="512M",
            max_memory="8G",
            shared=shared,
            devices=[
                *balloon_device(folder / BALLOON_SOCKET),
                *("-qmp", f"unix:{monitor},server=on,wait=off"),
            ],
            append="memhp_default_state=online_kernel",
        ) as guest,
    ):
        yield daemon, guest


async def unshared(daemon: VhostdProcess) -> str:
    found: str | None = (await daemon.status(VM))["unshared"]
    return found or ""


async def check_doctor(daemon: VhostdProcess) -> None:
    """It has one finding, and that is the memory."""
    checks = daemon_checks("", [await daemon.status(VM)])
    (failed,) = [check for check in checks if check.verdict == "failed"]
    assert failed.name == f"{VM} memory"
    assert failed.remedy is not None
    assert "share=on" in failed.remedy


async def test_ram_that_is_not_shared_is_told_by_an_address_of_it(
    stack: Stack, tmp_path: Path
) -> None:
    async with guest_with_balloon(stack, tmp_path, shared=False) as (daemon, _):
        told = await until(lambda: unshared(daemon), bool, 20, "told")
        found = re.fullmatch(r"balloon: guest address (0x[0-9a-f]+) is in no memory .*", told)
        assert found is not None, told
        assert int(found[1], 16) < 512 * MiB
        await check_doctor(daemon)


@pytest.mark.parametrize("qmp", [True, False])
async def test_dimms_that_are_not_shared_are_told_when_they_are_plugged(
    stack: Stack, tmp_path: Path, qmp: bool
) -> None:
    """With QMP by QEMU itself; without by the first that the guest reports free of them."""
    async with guest_with_balloon(stack, tmp_path, qmp=qmp) as (daemon, guest):
        assert await unshared(daemon) == ""
        for name in ("m1", "m2"):
            await guest.qmp.execute(
                "object-add", **{"qom-type": "memory-backend-ram", "id": name, "size": GiB}
            )
            await guest.qmp.execute("device_add", driver="pc-dimm", memdev=name, id=f"d{name}")
        if qmp:
            named = "memory backends without share=on: m1, m2"
            await until(lambda: unshared(daemon), lambda told: named in told, 30, named)
        else:
            told = await until(lambda: unshared(daemon), bool, 30, "told")
            found = re.fullmatch(r"balloon: guest address (0x[0-9a-f]+) is in no memory .*", told)
            assert found is not None, told
            assert FIRST_DIMM <= int(found[1], 16) < FIRST_DIMM + 2 * GiB
        assert (await daemon.status(VM))["state"] == "running"
        await check_doctor(daemon)
