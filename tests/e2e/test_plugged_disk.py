"""A disk that is plugged while the guest runs: where it can go, and what is said where it can't."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vhostd.control.diagnosis import daemon_checks
from vhostd.images.image_file import create_image
from vhostd.units import MiB

from tests.daemon import VhostdProcess
from tests.e2e.conftest import DISK_MODULES, VM, disk_device
from tests.e2e.test_topologies import Options
from tests.e2e.waiting import until
from tests.vm.bare import chardev, device
from tests.vm.guest import boot
from tests.vm.stack import Stack

pytestmark = pytest.mark.guest

SIZE = 64 * MiB
RESERVES = ("0", "64M", "128M")  # nothing, its size, twice its size
WORD = "content that only this disk has"


async def test_a_port_needs_room_of_twice_the_size(stack: Stack, tmp_path: Path) -> None:
    """The BAR is aligned to its size, and the device has another one beside it."""
    configuration = ports = ""
    for number, reserve in enumerate(RESERVES):
        create_image(tmp_path / f"disk{number}.img", SIZE)
        configuration += disk_device(tmp_path / f"disk{number}.img", "shmem", number, SIZE)
        ports += f"pcie-root-port,id=port{number},chassis={number + 1},slot={number + 1}"
        ports += f",pref64-reserve={reserve} " if reserve != "0" else " "
    async with VhostdProcess.start(tmp_path, configuration) as daemon:

        async def pmem(number: int) -> dict[str, object]:
            found: dict[str, object] = (await daemon.status(VM))["pmem"][number]
            return found

        options = await Options.of(daemon)
        async with boot(
            stack,
            memory="512M",
            devices=[word for port in ports.split() for word in ("-device", port)],
            modprobe=DISK_MODULES,
        ) as guest:
            for number, (id, value) in enumerate(options.devices.items()):
                socket = options.sockets[id]
                await guest.qmp.execute("chardev-add", **chardev(id, socket))
                await guest.qmp.execute("device_add", **device(value, f"port{number}"))
                await until(
                    lambda number=number: pmem(number),  # type: ignore[misc]
                    lambda disk: disk["state"] == "running",
                    30,
                    f"the driver of disk{number}",
                )
            await until(lambda: pmem(2), lambda disk: bool(disk["mapped"]), 30, "mapped")
            for number in (0, 1):
                standing = str((await pmem(number))["standing"])
                assert "older than Linux 6.9" in standing
                assert "no room for a BAR" in standing
            checks = daemon_checks("", [await daemon.status(VM)])
            failed = {check.name: check.remedy for check in checks if check.verdict == "failed"}
            assert set(failed) == {f"{VM} disk0", f"{VM} disk1"}
            assert "pref64-reserve=128M" in json.dumps(failed)
            (name,) = (await guest.run("ls /dev | grep pmem")).split()
            await guest.run(f"echo '{WORD}' | dd of=/dev/{name} conv=fsync")
    assert (tmp_path / "disk2.img").read_bytes().startswith(WORD.encode())
    assert not (tmp_path / "disk0.img").read_bytes().startswith(WORD.encode())
