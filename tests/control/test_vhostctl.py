"""vhostctl as a program: what it prints, and the exit code each outcome has."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from vhostd.units import GiB, MiB

from tests.control.daemon import RunningDaemon
from tests.control.program import PROGRAM, Finished, Vhostctl, failed_with, run


@pytest.fixture
def vhostctl(served: RunningDaemon) -> Vhostctl:
    return lambda *arguments: run("--socket", str(served.addresses.control), *arguments)


def test_json_status_of_one_vm_is_one_object_and_of_all_an_array(vhostctl: Vhostctl) -> None:
    one = vhostctl("--json", "status", "web")
    assert (one.returncode, one.stderr) == (0, "")
    status = json.loads(one.stdout)
    assert (status["vm"], status["state"]) == ("web", "running")
    assert status["balloon"]["inflated"] == 8192
    everything = json.loads(vhostctl("--json", "status").stdout)
    assert [vm["vm"] for vm in everything] == ["web", "idle"]


def test_the_socket_may_come_from_the_environment(served: RunningDaemon) -> None:
    assert run("status", VHOSTD_SOCKET=str(served.addresses.control)).returncode == 0


def test_people_get_sizes_with_units_and_no_colour_codes_in_a_pipe(vhostctl: Vhostctl) -> None:
    vhostctl("balloon", "set", "web", "512M")
    table = vhostctl("status").stdout
    assert table.splitlines()[0].split()[:4] == ["VM", "STATE", "PLUGGED", "TARGET"]
    assert table.splitlines()[1].split()[:6] == ["web", "running", "0", "B", "512", "MiB"]
    detail = vhostctl("status", "web").stdout
    assert "512 MiB" in detail
    assert "page_reporting" in detail
    assert "\x1b" not in table + detail


def test_a_quarantined_queue_is_named_with_what_is_wrong(
    vhostctl: Vhostctl, served: RunningDaemon
) -> None:
    served.daemon.web.state = "quarantined"
    lines = vhostctl("status", "web").stdout.splitlines()
    assert ["queue", "3", "quarantined:", "loop"] in [line.split() for line in lines]
    assert lines == [line.rstrip() for line in lines]
    assert json.loads(vhostctl("--json", "status", "web").stdout)["faults"] == {"3": "loop"}


@pytest.mark.parametrize(("size", "target"), [("512M", 512 * MiB), ("0.5GiB", 512 * MiB), ("0", 0)])
def test_setting_the_balloon_is_silent_and_done(
    vhostctl: Vhostctl, served: RunningDaemon, size: str, target: int
) -> None:
    finished = vhostctl("balloon", "set", "web", size)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
    assert served.daemon.web.balloon.target == target


def test_a_size_of_no_whole_pages_is_set_to_what_is_said(
    vhostctl: Vhostctl, served: RunningDaemon
) -> None:
    for size, rounded in ((4095, 0), (8193, 8192)):
        finished = vhostctl("balloon", "set", "web", str(size))
        assert (finished.returncode, finished.stdout) == (0, "")
        assert f"{size} bytes are no whole pages of 4 KiB: set to {rounded} bytes" in (
            finished.stderr
        )
        assert served.daemon.web.balloon.target == rounded
        told = vhostctl("--json", "balloon", "set", "web", str(size))
        assert json.loads(told.stdout)["target"] == rounded


# Root may write everywhere; without this it may only where the mode lets the owner.
POWERLESS = ("setpriv", "--inh-caps=-dac_override", "--bounding-set=-dac_override")


def test_who_may_not_use_the_control_socket_reads_on_the_other(served: RunningDaemon) -> None:
    served.addresses.control.chmod(0)
    powerless = POWERLESS if os.getuid() == 0 else ()

    def vhostctl(*arguments: str) -> Finished:
        return subprocess.run(
            [*powerless, *PROGRAM, "--socket", str(served.addresses.control), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    for reads in (("status",), ("status", "web"), ("balloon", "stats", "web"), ("events",)):
        finished = vhostctl(*reads)
        assert (finished.returncode, finished.stderr) == (0, "")
        assert "web" in finished.stdout or "1 GiB" in finished.stdout
    for changes in (
        ("balloon", "set", "web", "1M"),
        ("mem", "resize", "web", "64M", "--wait"),
        ("balloon", "stats", "web", "--fresh"),
    ):
        assert failed_with(vhostctl(*changes), 3, "permission denied")
    assert served.daemon.web.balloon.target == 0


def test_statistics_are_the_object_the_guest_sent(vhostctl: Vhostctl) -> None:
    sent = json.loads(vhostctl("--json", "balloon", "stats", "web").stdout)
    assert sent.pop("age_s") >= 0
    assert sent == {"free_memory": 1, "total_memory": GiB}
    fresh = vhostctl("--json", "balloon", "stats", "web", "--fresh")
    assert json.loads(fresh.stdout)["free_memory"] == 2
    assert "1 GiB" in vhostctl("balloon", "stats", "web").stdout
    assert "no statistics yet" in vhostctl("balloon", "stats", "idle").stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("balloon", "set", "web", "2G"), "1 GiB of RAM"),
        (("balloon", "set", "absent", "1M"), "no VM is called 'absent'"),
        (("status", "../web"), "/v1/vms/../web: there is nothing"),
        (("status", ".."), "no VM is called '..'"),
        (("balloon", "hint", "idle"), "running guest driver"),
        (("balloon", "hint", "web", "--stop"), "no free page hinting round"),
    ],
)
def test_what_the_daemon_refuses_is_exit_1_with_its_reason(
    vhostctl: Vhostctl, arguments: tuple[str, ...], reason: str
) -> None:
    assert failed_with(vhostctl(*arguments), 1, reason)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("balloon", "set", "web"),
        ("balloon", "set", "web", "lots"),
        ("balloon", "set", "web", "--wait", "--timeout", "-1", "1M"),
        ("qemu-args", "web", "--memory", "1.5K"),
        ("qemu-args", "web", "--format", "xen"),
        ("--nonsense", "status"),
    ],
)
def test_a_wrong_command_line_is_exit_2(vhostctl: Vhostctl, arguments: tuple[str, ...]) -> None:
    finished = vhostctl(*arguments)
    assert finished.returncode == 2
    assert "Usage" in finished.stderr


def test_no_daemon_is_exit_3(tmp_path: Path) -> None:
    absent = tmp_path / "absent.sock"
    finished = run("--socket", str(absent), "status")
    assert failed_with(finished, 3, f"{absent}: the daemon can't be reached: No such file")
    dead = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(dead))
    assert failed_with(run("--socket", str(dead), "status"), 3, "Connection refused")
    assert failed_with(run("--socket", str(dead), "events"), 3, "Connection refused")


def test_something_else_on_the_socket_is_exit_3(tmp_path: Path) -> None:
    path = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        asking = subprocess.Popen(
            [*PROGRAM, "--socket", str(path), "status"], stderr=subprocess.PIPE, text=True
        )
        connection, _ = other.accept()
        connection.sendall(b"SSH-2.0-surprise\r\n\r\n")
        connection.close()
        _, stderr = asking.communicate(timeout=60)
    assert (asking.returncode, stderr.count("\n")) == (3, 1)


def test_waiting_in_vain_is_exit_4(vhostctl: Vhostctl, served: RunningDaemon) -> None:
    waiting = vhostctl("balloon", "set", "web", "1M", "--wait", "--timeout", "0.1")
    assert failed_with(waiting, 4, "the guest is at 0 bytes of 1048576")
    served.daemon.web.answers_statistics = False
    asking = vhostctl("balloon", "stats", "web", "--fresh", "--timeout", "0.1")
    assert failed_with(asking, 4, "no statistics")


def test_the_options_for_qemu_are_exactly_these(vhostctl: Vhostctl) -> None:
    text = vhostctl("qemu-args", "web", "--memory", "1536M").stdout
    assert shlex.split(text) == [
        *("-machine", "q35,memory-backend=ram0", "-m", "1536M,maxmem=10752M,slots=1"),
        *("-object", "memory-backend-memfd,id=ram0,size=1536M,share=on"),
        *("-object", "memory-backend-memfd,id=mem0-window,size=4294967296,share=on"),
        "-device",
        "virtio-pmem-pci,id=mem0-window-device,memdev=mem0-window,memaddr=0x240000000,addr=1e.1",
        *("-chardev", "socket,id=web-balloon,path=/run/vhostd/web-balloon.sock"),
        "-device",
        "vhost-user-test-device-pci,chardev=web-balloon,virtio-id=5,num_vqs=5,config_size=16"
        ",vq_size=128",
        *("-chardev", "socket,id=mem0,path=/run/vhostd/web-mem0.sock"),
        "-device",
        "vhost-user-test-device-pci,chardev=mem0,virtio-id=24,num_vqs=1,config_size=56,vq_size=128",
        *("-chardev", "socket,id=disk0,path=/run/vhostd/web-disk0.sock"),
        "-device",
        "vhost-user-test-device-pci,chardev=disk0,virtio-id=27,num_vqs=1,config_size=16,vq_size=64",
    ]
    assert json.loads(vhostctl("--json", "qemu-args", "web").stdout)[3].startswith("1G,")


def test_a_window_below_qemu_s_range_is_told_before_qemu_is_started(vhostctl: Vhostctl) -> None:
    refused = vhostctl("qemu-args", "web", "--memory", "12G")
    assert failed_with(refused, 1, "window_address 0x240000000 is below 0x380000000")


def test_a_memory_device_is_resized_and_says_where_the_guest_is(
    vhostctl: Vhostctl, served: RunningDaemon
) -> None:
    assert vhostctl("mem", "resize", "web", "64M").stdout == ""
    waiting = vhostctl("mem", "resize", "web", "64M", "--wait", "--timeout", "0.1")
    assert (waiting.returncode, waiting.stdout) == (4, "mem0: 0 B of 64 MiB\n")
    assert "mem0 is at 0 bytes of 67108864: the guest " in waiting.stderr
    served.do(lambda: served.daemon.web.plug(0, 32))
    done = vhostctl("mem", "resize", "web", "64M", "--wait")
    assert (done.returncode, done.stdout) == (0, "mem0: 64 MiB of 64 MiB\n")
    assert "64 MiB plugged of 64 MiB requested: reached" in vhostctl("status", "web").stdout


def test_the_memory_of_a_guest_is_set_as_a_whole(vhostctl: Vhostctl) -> None:
    said = vhostctl("memory", "set", "web", "1537M").stdout
    assert [line.split() for line in said.splitlines()] == [
        ["usable", "1.5", "GiB"],
        ["mem0", "514", "MiB", "requested"],
        ["balloon", "1", "MiB", "to", "be", "given", "up"],
    ]
    assert failed_with(vhostctl("memory", "set", "web", "6G"), 1, "the guest can have 5 GiB")


def test_the_xml_for_libvirt_shares_memory_and_passes_the_same_options(
    vhostctl: Vhostctl,
) -> None:
    xml = vhostctl("qemu-args", "web", "--format", "libvirt").stdout
    domain = ElementTree.fromstring(f"<domain>{xml}</domain>")
    backing = domain.find("memoryBacking")
    assert backing is not None
    assert [child.attrib for child in backing] == [{"type": "memfd"}, {"mode": "shared"}]
    most = domain.find("maxMemory")
    assert most is not None
    assert (most.attrib["slots"], most.text) == ("1", str((1 + 9) * 1024 * 1024))
    name = "{http://libvirt.org/schemas/domain/qemu/1.0}arg"
    values = [element.attrib["value"] for element in domain.iter(name)]
    assert values == shlex.split(vhostctl("qemu-args", "web").stdout)[-16:]


def test_events_are_lines_and_with_json_objects(vhostctl: Vhostctl) -> None:
    vhostctl("balloon", "set", "web", "1M")
    line = vhostctl("events").stdout.splitlines()[-1]
    assert line.startswith("1970-01-01T00:16:40.000000Z web balloon_target target=1048576")
    objects = [json.loads(line) for line in vhostctl("--json", "events").stdout.splitlines()]
    assert objects[-1]["event"] == "balloon_target"


def test_following_events_prints_each_as_it_happens_until_interrupted(
    served: RunningDaemon,
) -> None:
    following = subprocess.Popen(
        [*PROGRAM, "--socket", str(served.addresses.control), "--json", "events", "--follow"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert following.stdout is not None
    with following:
        assert json.loads(following.stdout.readline())["event"] == "balloon_statistics"
        served.do(lambda: served.daemon.web.reach(MiB))
        assert json.loads(following.stdout.readline())["actual"] == MiB
        following.send_signal(signal.SIGINT)
        assert following.wait(20) == 0


def test_a_start_imports_neither_rich_nor_the_server() -> None:
    code = (
        "import sys, vhostd.control.cli, vhostd.control.client\n"
        "heavy = {'rich', 'starlette', 'hypercorn', 'trio', 'structlog', 'prometheus_client'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert finished.stdout == "[]\n"
