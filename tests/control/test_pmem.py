"""vhostctl's verbs about disks as a program, and what QEMU is told of one."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from vhostd.control.answers import CacheDropped, PmemStatus
from vhostd.control.interface import MemoryWindow
from vhostd.devices.pmem import ImageView
from vhostd.units import GiB, MiB

from tests.control.daemon import RunningDaemon
from tests.control.program import Vhostctl, failed_with, run
from tests.daemon import VhostdProcess

VERBS = ("flush", "drop-cache", "clear")
ODD_NAME = "it's a, b & <c>.img"
XML_ARGUMENT = "{http://libvirt.org/schemas/domain/qemu/1.0}arg"


@pytest.fixture
def vhostctl(served: RunningDaemon) -> Vhostctl:
    return lambda *arguments: run("--socket", str(served.addresses.control), *arguments)


def words(text: str) -> list[str]:
    """Lines without the blanks of their table."""
    return [" ".join(line.split()) for line in text.splitlines()]


# -- verbs of a daemon -----------------------------------------------------------------------------


def test_a_flush_is_silent_and_with_json_the_disk_s_status(vhostctl: Vhostctl) -> None:
    done = vhostctl("pmem", "flush", "web")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for device in ((), ("--device", "disk0")):
        told = json.loads(vhostctl("--json", "pmem", "flush", "web", *device).stdout)
        assert msgspec.convert(told, PmemStatus).id == "disk0"


def test_a_failed_disk_refuses_a_flush_until_it_is_cleared(
    vhostctl: Vhostctl, served: RunningDaemon
) -> None:
    served.do(served.daemon.web.disk.break_down)
    assert failed_with(vhostctl("pmem", "flush", "web"), 1, "disk0: Input/output error")
    assert failed_with(vhostctl("pmem", "drop-cache", "web"), 1, "disk0: Input/output error")
    status = json.loads(vhostctl("--json", "status", "web").stdout)["pmem"][0]
    assert (status["failed"], status["failed_s"]) == ("sync: Input/output error", 1000.0)
    text = " ".join(words(vhostctl("status", "web").stdout))
    assert "64 MiB, shmem: flushes fail: sync: Input/output error; see to it" in text
    done = vhostctl("pmem", "clear", "web")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert vhostctl("pmem", "flush", "web").returncode == 0
    told = json.loads(vhostctl("--json", "pmem", "clear", "web").stdout)
    assert msgspec.convert(told, PmemStatus).failed is None
    events = [json.loads(line) for line in vhostctl("--json", "events").stdout.splitlines()]
    assert [event["event"] for event in events][-2:] == ["pmem_failed", "pmem_cleared"]


def test_dropping_the_cache_says_how_far_it_got(vhostctl: Vhostctl, served: RunningDaemon) -> None:
    served.daemon.web.disk.write(3 * MiB)
    told = json.loads(vhostctl("--json", "pmem", "drop-cache", "web").stdout)
    dropped = msgspec.convert(told, CacheDropped)
    if dropped.cached_before is None:
        pytest.skip("this kernel can't tell the page cache of a file (Linux 6.5 can)")
    assert (dropped.device, dropped.cached_before) == ("disk0", 3 * MiB)
    assert words(vhostctl("pmem", "drop-cache", "web").stdout) == [
        "page cache 3 MiB before, 3 MiB now",  # of a file in memory, which has no other place
        "not all the VMM's process is not known",
    ]


def test_people_see_the_disk_its_image_and_its_page_cache(
    vhostctl: Vhostctl, served: RunningDaemon
) -> None:
    lines = words(vhostctl("status", "web").stdout)
    assert "disk0 64 MiB, shmem: the guest has it" in lines
    assert "disk0 image /images/disk0.img" in lines
    assert "disk0 flushes 5, 1 failed" in lines
    assert "disk0 page cache 8 MiB cached, 4 KiB dirty, 0 B writeback" in lines
    served.daemon.web.disk.pmem.image = ImageView()
    assert not any("page cache" in line for line in words(vhostctl("status", "web").stdout))
    assert "disk0 64 MiB, shmem: the guest does not have it: no driver has started yet" in words(
        vhostctl("status", "idle").stdout
    )


@pytest.mark.parametrize("verb", VERBS)
def test_what_can_t_be_done_is_exit_1_with_its_reason(vhostctl: Vhostctl, verb: str) -> None:
    other = vhostctl("pmem", verb, "web", "--device", "disk9")
    assert failed_with(other, 1, "VM 'web' has no disk 'disk9'; it has disk0")
    assert failed_with(vhostctl("pmem", verb, "absent"), 1, "no VM is called 'absent'")
    if verb != "clear":
        idle = vhostctl("pmem", verb, "idle")
        assert failed_with(idle, 1, "disk0: no VMM is connected, so its image is not open")


@pytest.mark.parametrize("verb", VERBS)
def test_a_wrong_command_line_is_exit_2_and_no_daemon_exit_3(tmp_path: Path, verb: str) -> None:
    for arguments in (("pmem", verb), ("pmem", verb, "web", "surplus")):
        wrong = run(*arguments)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert "Usage" in wrong.stderr
    absent = tmp_path / "absent.sock"
    assert failed_with(run("--socket", str(absent), "pmem", verb, "web"), 3, "can't be reached")


@pytest.mark.parametrize("verb", VERBS)
def test_the_read_only_socket_changes_no_disk(served: RunningDaemon, verb: str) -> None:
    served.daemon.web.disk.break_down()
    refused = run("--socket", str(served.addresses.read_only), "pmem", verb, "web")
    assert failed_with(refused, 1, "changes go to control.sock")
    assert served.daemon.web.disk.pmem.failure is not None


# -- create, which needs no daemon -----------------------------------------------------------------


def test_an_image_is_made_silently(tmp_path: Path) -> None:
    for path, options in ((tmp_path / "a.img", ()), (tmp_path / "b.img", ("--preallocate",))):
        done = run("pmem", "create", str(path), "8M", *options)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert path.stat().st_size == 8 * MiB
        assert (path.stat().st_blocks > 0) == bool(options)


def test_an_image_that_can_t_be_made_is_exit_1_and_a_size_that_is_none_exit_2(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.img"
    made = run("pmem", "create", str(path), "3M")
    assert failed_with(made, 1, f"{path}: {3 * MiB} bytes are no multiple of 2 MiB")
    huge = run("pmem", "create", str(path), str((1 << 64) - 2 * MiB))
    assert failed_with(huge, 1, "no file can be")
    assert not path.exists()
    path.write_bytes(b"precious")
    assert failed_with(run("pmem", "create", str(path), "8M"), 1, f"{path}: can't be made: File")
    assert path.read_bytes() == b"precious"
    for arguments in ((str(path),), (str(path), "lots"), ()):
        wrong = run("pmem", "create", *arguments)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert "Usage" in wrong.stderr


# -- what QEMU is told -----------------------------------------------------------------------------


def test_a_disk_in_shared_memory_needs_no_memory_of_its_own(vhostctl: Vhostctl) -> None:
    options = shlex.split(vhostctl("qemu-args", "web").stdout)
    assert not [option for option in options if "memory-backend-file" in option]
    assert not [option for option in options if "disk0-window" in option]


@pytest.mark.parametrize("readonly", [False, True])
def test_a_window_is_the_image_at_its_address_whatever_its_name(
    vhostctl: Vhostctl, served: RunningDaemon, readonly: bool
) -> None:
    image = Path("/images") / ODD_NAME
    served.daemon.web.window = MemoryWindow(16 * GiB, 64 * MiB, 0, image, readonly=readonly)
    expected = [
        "-object",
        f"memory-backend-file,id=disk0-window,size={64 * MiB},share=on"
        f",mem-path=/images/it's a,, b & <c>.img{',readonly=on' * readonly}",
        "-device",
        "virtio-pmem-pci,id=disk0-window-device,memdev=disk0-window,memaddr=0x400000000,addr=1e.2",
    ]
    options = shlex.split(vhostctl("qemu-args", "web").stdout)
    assert [option for option in options if option in expected[1::2]] == expected[1::2]
    at = options.index(expected[1])
    assert options[at - 1 : at + 3] == expected
    assert "1G,maxmem=14G,slots=1" in options
    xml = vhostctl("qemu-args", "web", "--format", "libvirt").stdout
    domain = ElementTree.fromstring(f"<domain>{xml}</domain>")
    values = [element.attrib["value"] for element in domain.iter(XML_ARGUMENT)]
    at = values.index(expected[1])
    assert values[at - 1 : at + 3] == expected


async def test_the_daemon_knows_the_window_of_its_configuration(tmp_path: Path) -> None:
    image = tmp_path / ODD_NAME
    image.touch()
    os.truncate(image, 64 * MiB)
    configuration = f"""
        [[vm.web.pmem]]
        id = "disk0"
        file = "{image}"
        size = "64MiB"
        mode = "window"
        window_address = 0x240000000
        readonly = true
    """
    async with VhostdProcess.start(tmp_path, configuration) as daemon:
        options = shlex.split(await daemon.ctl("qemu-args", "web"))
        status = await daemon.status("web")
    escaped = str(image).replace(",", ",,")
    assert options[options.index("-object", 6) + 1] == (
        f"memory-backend-file,id=disk0-window,size={64 * MiB},share=on,mem-path={escaped}"
        ",readonly=on"
    )
    assert f"socket,id=disk0,path={tmp_path}/web-disk0.sock" in options
    (pmem,) = status["pmem"]
    assert (pmem["mode"], pmem["readonly"], pmem["state"]) == ("window", True, "waiting")
