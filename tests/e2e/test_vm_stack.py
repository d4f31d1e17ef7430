"""The VM stack's own proof: every kernel boots, obeys and shows its memory.

The balloon in here is QEMU's own: what fails in this file is the stack's fault, not the daemon's.
"""

import os
from pathlib import Path

import pytest
import trio
from vhostd.qmp import QmpError, open_qmp

from tests.sampling import sampled
from tests.vm.guest import (
    GuestBootError,
    GuestCommandError,
    QemuDied,
    boot,
    window_device,
)
from tests.vm.pattern import find_page, page_pattern
from tests.vm.stack import Stack

pytestmark = pytest.mark.guest

KERNELS = ("6.1", "6.12", "7")
BUILT_IN_BALLOON = ("-device", "virtio-balloon-pci,id=balloon0")
MIB = 1024 * 1024


@sampled("kernel", KERNELS, every_day=["6.12"])
async def test_every_kernel_inflates_qemus_own_balloon(stack: Stack, kernel: str) -> None:
    async with boot(stack, kernel, memory="512M", devices=BUILT_IN_BALLOON) as guest:
        assert (await guest.run("uname -r")).strip() == stack.kernel(kernel).release
        assert (await guest.vmstat())["balloon_inflate"] == 0
        with guest.qmp.events("BALLOON_CHANGE") as changes:
            await guest.qmp.execute("balloon", value=384 * MIB)
            with trio.fail_after(30):
                async for change in changes:
                    if change.data["actual"] == 384 * MIB:
                        break
        assert (await guest.vmstat())["balloon_inflate"] == 128 * MIB // 4096


async def test_a_guest_remembers_what_was_written_and_the_host_sees_it_grow(stack: Stack) -> None:
    async with boot(stack, memory="512M") as guest:
        before = guest.host_memory()
        filler = await guest.start("guesttool fill 128 7")
        assert await filler.read_line() == "filled 32768 pages"
        assert guest.host_memory() - before > 100 * MIB
        assert await filler.ask("verify") == "ok 32768 pages"
        await filler.close_input()
        await filler.wait()
        cycler = await guest.start("guesttool cycle 32 9")
        assert await cycler.read_line() == "filled 8192 pages"
        assert (await cycler.ask("stop")).startswith("ok ")
        await cycler.wait()


async def test_a_pattern_overwritten_behind_the_guests_back_is_found(stack: Stack) -> None:
    async with boot(stack, memory="256M") as guest:
        filler = await guest.start("guesttool fill 64 7")
        await filler.read_line()
        memory = guest.memory_fd_path()
        place = find_page(memory, page_pattern(7, 1000))
        assert place is not None
        with memory.open("r+b") as file:
            os.pwrite(file.fileno(), b"\xff", place + 24)
        assert (await filler.ask("verify")).startswith("BAD page 1000 offset 24:")
        with pytest.raises(GuestCommandError) as caught:
            await filler.wait()
        assert caught.value.status == 1


async def test_commands_say_what_they_printed_and_how_they_failed(stack: Stack) -> None:
    async with boot(stack, memory="256M") as guest:
        assert await guest.run("printf 'a\\nb\\001'; echo c >&2") == "a\nb\x01c\n"
        assert len(await guest.run("head -c 300000 /dev/zero | tr '\\0' x")) == 300000
        with pytest.raises(GuestCommandError, match="exited 3: echo why") as failed:
            await guest.run("echo why; exit 3")
        assert (failed.value.status, failed.value.output) == (3, "why\n")
        with pytest.raises(GuestCommandError, match="within 1 s: echo slow"):
            await guest.run("echo slow; sleep 100", timeout_s=1)
        assert "sleep 100" not in await guest.run("ps")
        data = os.urandom(50_000)
        await guest.write_file("/tmp/data", data)
        assert len(data) == int(await guest.run("stat -c %s /tmp/data"))


async def test_a_guest_answers_again_after_reset_and_reboot(stack: Stack) -> None:
    async with boot(stack, memory="256M") as guest:
        await guest.run("touch /tmp/before")
        sleeper = await guest.start("sleep 1000")
        await guest.system_reset()
        with pytest.raises(GuestCommandError, match="the guest was reset: sleep 1000"):
            await sleeper.wait()
        assert await guest.run("ls /tmp") == ""
        await guest.reboot()
        assert "virtio_balloon" in await guest.run("lsmod")
        async with open_qmp(guest.qmp_path) as second:
            assert second.version == stack.qemu.version
            assert (await second.execute("query-status"))["status"] == "running"
            with pytest.raises(QmpError) as refused:
                await second.execute("device_del", id="nothing")
            assert refused.value.error_class == "DeviceNotFound"


async def test_a_hidden_window_is_a_memfd_of_its_own(stack: Stack) -> None:
    window = window_device(256 * MIB, 0x240000000)
    async with boot(stack, memory="256M", max_memory="16G", devices=window) as guest:
        assert guest.memory_fd_path("w0").stat().st_size == 256 * MIB
        assert guest.memory_fd_path("w0") != guest.memory_fd_path("ram0")
        assert "pmem" not in await guest.run(
            "cat /proc/iomem /sys/bus/pci/devices/*/class; ls /dev"
        )


async def test_a_qemu_that_does_not_start_says_why(stack: Stack) -> None:
    with pytest.raises(GuestBootError, match="no-such-device"):
        async with boot(stack, memory="256M", devices=["-device", "no-such-device"]):
            pytest.fail("it started")


async def test_a_guest_that_panics_while_booting_shows_its_console(stack: Stack) -> None:
    with pytest.raises(GuestBootError, match="Kernel panic"):
        async with boot(
            stack, memory="256M", append="rdinit=/bin/false panic=-1", devices=["-no-reboot"]
        ):
            pytest.fail("it came up")


async def test_a_qemu_that_dies_unasked_is_an_error_and_leaves_nothing(stack: Stack) -> None:
    folders: list[Path] = []
    with pytest.raises(QemuDied, match="status -11"):
        async with boot(stack, memory="256M") as guest:
            folders.append(guest.folder)
            os.kill(guest.pid, 11)
            await guest.qmp.wait_closed()
    assert not folders[0].exists()
    async with boot(stack, memory="256M") as guest:
        guest.kill()
        assert await guest.wait_exit() == -9
    with pytest.raises(ProcessLookupError):
        os.kill(guest.pid, 0)
