"""Disks as operators and guests meet them: opened, mapped, failed, mended, kept an eye on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from struct import unpack
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs
from vhostd.backend.configured import pmem_of
from vhostd.backend.image_opening import open_for
from vhostd.backend.left import Left
from vhostd.devices.base import DeviceEvent, Refused
from vhostd.fds import OwnedFd
from vhostd.handover.fd_store import DeviceKeeping, NoStore
from vhostd.handover.kept_fds import KeptFds
from vhostd.handover.vm_record import DeviceRecord
from vhostd.images.image_file import ImageUnusable, create_image, open_image
from vhostd.log import LogEvent
from vhostd.session.state import SessionState
from vhostd.units import MiB

from tests.backend.disks import (
    FAILED,
    FLUSHED,
    SIZE,
    WINDOW_ADDRESS,
    blocking,
    disk,
    guest_on,
    opened,
    serving,
    turned_away,
    until,
)
from tests.fakes.frontend import FrontEnd
from tests.fakes.messages import BackendRequest
from tests.transport.sockets import no_leak

KNOCKS = 200

Lines = Sequence[Any]


def lines(log: Lines, event: str) -> list[Any]:
    """The log's lines of one kind."""
    return [line for line in log if line["event"] == event]


# -- a VMM comes and goes --------------------------------------------------------------------------


async def test_the_vmm_gets_the_image_once_the_driver_runs_and_the_guest_flushes(
    tmp_path: Path,
) -> None:
    pmem = disk(tmp_path)
    async with serving(pmem) as disks, guest_on(pmem, mapped=False) as guest:
        request = await blocking(guest.map_request)
        assert request.request == BackendRequest.SHMEM_MAP
        assert unpack("=B7xQQQQ", request.payload) == (0, 0, 0, SIZE, 1)
        assert os.fstat(request.fds[0]).st_ino == pmem.file.stat().st_ino
        assert not disks.status()["mapped"]
        await blocking(lambda: guest.answer(request))
        await until(lambda: disks.status()["mapped"])
        assert disks.status()["standing"] == "the guest has it"
        assert disks.told(DeviceEvent.PMEM_MAPPED) == [{"device": "disk0", "size": SIZE}]
        assert await blocking(guest.flush) == FLUSHED
        status = disks.status()
        assert (status["state"], status["flushes"], status["syncs"]) == ("running", 1, 1)


async def test_a_vmm_that_refuses_the_image_is_served_and_the_status_says_so(
    tmp_path: Path,
) -> None:
    pmem = disk(tmp_path)
    with capture_logs() as log:
        async with serving(pmem) as disks, guest_on(pmem, mapped=False) as guest:
            request = await blocking(guest.map_request)
            await blocking(lambda: guest.answer(request, 1))
            await until(lambda: "refused" in disks.status()["standing"])
            assert await blocking(guest.flush) == FLUSHED
    (line,) = lines(log, LogEvent.IMAGE_NOT_MAPPED)
    assert (line["device"], line["error"]) == ("disk0", "the VMM refused it (1)")


async def test_a_missing_image_turns_the_vmm_away_and_one_made_later_does_not(
    tmp_path: Path,
) -> None:
    pmem = disk(tmp_path)
    pmem.file.unlink()
    with capture_logs() as log:
        async with serving(pmem) as disks:
            assert await turned_away(pmem)
            await until(lambda: disks.status()["standing"].startswith(f"{pmem.file}: is not there"))
            assert disks.status()["state"] == "waiting"
            (told,) = disks.told(LogEvent.IMAGE_UNUSABLE)
            assert told["error"] == disks.status()["standing"]
            create_image(pmem.file, SIZE)
            async with guest_on(pmem) as guest:
                await until(lambda: disks.status()["standing"] == "the guest has it")
                assert await blocking(guest.flush) == FLUSHED
    (line,) = lines(log, LogEvent.IMAGE_UNUSABLE)
    assert (line["error"], line["log_level"]) == (told["error"], "error")


async def test_a_size_qemu_can_not_have_turns_the_vmm_away_before_it_asks(tmp_path: Path) -> None:
    pmem = replace(disk(tmp_path), size=48 * MiB)
    with capture_logs() as log:
        async with serving(pmem) as disks:
            assert disks.status()["standing"].startswith("size: 50331648 is no power of two")
            assert await turned_away(pmem)
            await until(lambda: disks.told(LogEvent.IMAGE_UNUSABLE))
            assert disks.status()["standing"].startswith("disk0: size: 50331648 is no power")
            assert disks.status()["state"] == "waiting"
    (line,) = lines(log, LogEvent.IMAGE_UNUSABLE)
    assert 'or set mode = "window"' in line["error"]


async def test_a_vmm_that_has_such_a_size_from_a_predecessor_keeps_it(tmp_path: Path) -> None:
    pmem = disk(tmp_path)
    options = replace(pmem_of(pmem).options, size=48 * MiB)
    with pytest.raises(ImageUnusable, match="no power of two"):
        open_for(options, None)
    names = DeviceKeeping(NoStore(), "web", "disk0")
    kept = KeptFds({names.name("image"): [OwnedFd(os.open(pmem.file, os.O_RDWR))]})
    record = DeviceRecord({}, None, None)
    with closing(open_for(options, Left(record, SessionState.initial(1), kept, names))) as image:
        assert image.file_size == SIZE


async def test_an_image_in_use_turns_the_vmm_away_until_it_is_free(tmp_path: Path) -> None:
    pmem = disk(tmp_path)
    async with serving(pmem) as disks:
        with closing(open_image(pmem.file, SIZE, readonly=False)):
            assert await turned_away(pmem)
            await until(lambda: "another program" in disks.status()["standing"])
        async with guest_on(pmem):
            await until(lambda: disks.status()["mapped"])


async def test_two_disks_of_one_image_are_not_both_served(tmp_path: Path) -> None:
    first, second = disk(tmp_path), disk(tmp_path, "disk1")
    second.file.unlink()
    second.file.symlink_to(first.file)
    async with serving(first, second) as disks, guest_on(first):
        assert await turned_away(second)
        await until(lambda: "another program" in disks.status("disk1")["standing"])
        assert disks.status()["mapped"]


async def test_nothing_of_a_connection_is_left_and_its_flushes_are_still_counted(
    tmp_path: Path,
) -> None:
    pmem = disk(tmp_path)
    async with serving(pmem) as disks:
        for round_ in range(1, 4):
            async with guest_on(pmem) as guest:
                assert await blocking(guest.flush) == FLUSHED
                assert disks.status()["flushes"] == round_
            await until(lambda: disks.status()["state"] == "waiting")
            status = disks.status()
            assert (status["flushes"], status["syncs"]) == (round_, 0)
            assert (status["mapped"], status["cached"]) == (False, None)
            open_image(pmem.file, SIZE, readonly=False).close()
            if round_ == 1:
                leak = no_leak()
                leak.__enter__()
        leak.__exit__(None, None, None)
        with pytest.raises(Refused, match="disk0: no VMM is connected, so its image is not open"):
            disks.storage()


async def test_vmms_that_only_knock_harm_nobody_and_the_next_one_gets_the_image(
    tmp_path: Path,
) -> None:
    """Each leaves while its image is being looked at for the first time."""
    pmem = disk(tmp_path)
    async with serving(pmem) as disks:
        for _ in range(KNOCKS):
            await blocking(lambda: FrontEnd.connect(pmem.socket).close())
        async with guest_on(pmem) as guest:
            assert await blocking(guest.flush) == FLUSHED
        assert disks.told(LogEvent.IMAGE_UNUSABLE) == []


async def test_flushes_are_counted_once_at_every_moment_of_a_connection_s_end(
    tmp_path: Path,
) -> None:
    """A counter that goes up and down again is a rate of millions to who watches it."""
    pmem = disk(tmp_path)
    async with serving(pmem) as disks:
        async with guest_on(pmem) as guest:
            for _ in range(3):
                assert await blocking(guest.flush) == FLUSHED
            before = disks.status()["flushes"]
            guest.machine.front.close()
            counts = {before}
            while disks.status()["state"] != "waiting":
                counts.add(disks.status()["flushes"])
                await trio.lowlevel.checkpoint()
            counts.add(disks.status()["flushes"])
        assert counts == {3}


# -- what an operator wants ------------------------------------------------------------------------


async def test_an_operator_s_flush_is_a_sync_but_no_flush_of_the_guest(tmp_path: Path) -> None:
    pmem = disk(tmp_path)
    async with serving(pmem) as disks, guest_on(pmem):
        await disks.storage().flush()
        status = disks.status()
        assert (status["syncs"], status["flushes"]) == (1, 0)
        assert status["sync_total_s"] == status["sync_last_s"] == status["sync_max_s"] > 0


async def test_dropping_the_cache_is_told_with_what_it_came_to(tmp_path: Path) -> None:
    pmem = disk(tmp_path, writeback_limit=0)
    async with serving(pmem) as disks, guest_on(pmem):
        with opened(pmem.file) as fd:
            os.pwrite(fd, b"x" * 8 * MiB, 0)
        told = await disks.storage().drop_cache()
        assert told["device"] == "disk0"
        assert disks.told(LogEvent.CACHE_DROPPED) == [told]
        if told["cached_before"] is None:
            pytest.skip("this kernel can't tell the page cache of a file (Linux 6.5 can)")
        assert (told["cached_before"], told["cached_after"]) == (8 * MiB, 0)


# -- a disk that fails -----------------------------------------------------------------------------


async def test_a_shrunk_image_fails_the_flush_stops_the_vm_and_leaves_others_alone(
    tmp_path: Path,
) -> None:
    first, second = disk(tmp_path), disk(tmp_path, "disk1")
    with capture_logs() as log:
        async with (
            serving(first, second) as disks,
            guest_on(first) as guest,
            guest_on(second) as other,
        ):
            assert await blocking(guest.flush) == FLUSHED
            os.truncate(first.file, SIZE // 2)
            await until(lambda: disks.status()["failed"])
            why = f"the file has shrunk to {SIZE // 2} bytes, {SIZE} are in use"
            assert disks.status()["failed"] == why
            assert await blocking(guest.flush) == FAILED
            assert await blocking(other.flush) == FLUSHED
            await disks.looked_at("disk1")
            with pytest.raises(Refused, match="disk0: No data available"):
                await disks.storage().flush()
            with pytest.raises(Refused, match="disk0: No data available"):
                await disks.storage().drop_cache()
            assert disks.status("disk1")["failed"] is None
            status = disks.status()
            assert (status["flushes"], status["flush_errors"]) == (2, 1)
    (stop,) = lines(log, LogEvent.VM_NOT_STOPPED)
    assert stop["why"] == f"disk0: {why}"
    (failed,) = lines(log, LogEvent.IMAGE_FAILED)
    assert failed["file"] == str(first.file)
    assert disks.told(DeviceEvent.PMEM_FAILED) == [
        {"device": "disk0", "file": str(first.file), "why": why}
    ]


async def test_a_failure_outlives_the_vmm_and_ends_with_the_operator_s_word(tmp_path: Path) -> None:
    pmem = disk(tmp_path)
    async with serving(pmem) as disks:
        async with guest_on(pmem):
            os.truncate(pmem.file, SIZE // 2)
            await until(lambda: disks.status()["failed"])
            os.truncate(pmem.file, SIZE)
        async with guest_on(pmem) as guest:
            assert disks.status()["failed"]
            assert await blocking(guest.flush) == FAILED
            assert disks.status()["syncs"] == 0, "the disk is not even asked"
            assert await disks.vm.clear_pmem(None) == "disk0"
            assert await blocking(guest.flush) == FLUSHED
            assert disks.status()["failed"] is None
        assert disks.told(DeviceEvent.PMEM_CLEARED) == [{"device": "disk0"}]
        assert len(disks.told(DeviceEvent.PMEM_FAILED)) == 1


async def test_a_failure_can_be_cleared_while_no_vmm_is_there(tmp_path: Path) -> None:
    pmem = disk(tmp_path)
    async with serving(pmem) as disks:
        async with guest_on(pmem):
            os.truncate(pmem.file, SIZE // 2)
            await until(lambda: disks.status()["failed"])
        os.truncate(pmem.file, SIZE)
        await until(lambda: disks.status()["state"] == "waiting")
        await disks.vm.clear_pmem("disk0")
        async with guest_on(pmem) as guest:
            assert await blocking(guest.flush) == FLUSHED


async def test_clearing_what_is_still_wrong_lasts_until_the_next_look(tmp_path: Path) -> None:
    pmem = disk(tmp_path)
    with capture_logs() as log:
        async with serving(pmem) as disks, guest_on(pmem) as guest:
            os.truncate(pmem.file, SIZE // 2)
            await until(lambda: disks.status()["failed"])
            await disks.vm.clear_pmem(None)
            await until(lambda: len(disks.told(DeviceEvent.PMEM_FAILED)) == 2)
            assert await blocking(guest.flush) == FAILED
    assert len(lines(log, LogEvent.VM_NOT_STOPPED)) == 2


# -- the window ------------------------------------------------------------------------------------


async def test_a_window_is_there_when_the_vmm_has_the_image_at_its_address(tmp_path: Path) -> None:
    pmem = disk(tmp_path, mode="window", window_address=WINDOW_ADDRESS)
    async with serving(pmem) as disks, guest_on(pmem) as guest:
        await until(lambda: "the VMM has no memory at" in disks.status()["standing"])
        assert f"{WINDOW_ADDRESS:#x}; see vhostctl qemu-args" in disks.status()["standing"]
        with opened(pmem.file) as image, opened(disk(tmp_path, "other").file) as other:
            await blocking(lambda: guest.has_memory(image, WINDOW_ADDRESS + 2 * SIZE))
            assert "the VMM has no memory at" in disks.status()["standing"]
            await blocking(lambda: guest.has_memory(other))
            assert "the VMM has another file at" in disks.status()["standing"]
            await blocking(guest.loses_memory)
            await blocking(lambda: guest.has_memory(image, size=SIZE // 2))
            assert not disks.status()["mapped"]
            await blocking(lambda: guest.loses_memory(size=SIZE // 2))
            await blocking(lambda: guest.has_memory(image))
            assert disks.status()["standing"] == "the guest has it"
            await blocking(guest.loses_memory)
            assert "the VMM has no memory at" in disks.status()["standing"]
        assert guest.machine.front.backend_requests is not None
        assert guest.machine.front.backend_requests.silent(0.05), "a window is mapped by no request"
        assert await blocking(guest.flush) == FLUSHED
