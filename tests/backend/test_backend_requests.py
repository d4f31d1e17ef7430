"""What the VMM reads on the back-end channel, and when: never a byte while the device is stopped.

QEMU 11.1 crashes on a request that comes too early or too late, so the bytes are what counts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from tests.backend.asked import CONFIG_CHANGE, LARGER, MAP, MAPPING, QUIET_S, Asked
from tests.fakes.messages import BackendRequest
from tests.transport.sockets import link


@pytest.fixture
async def asked() -> AsyncIterator[Asked]:
    asked = Asked()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(asked.requests.run)
        yield asked
        nursery.cancel_scope.cancel()
    asked.close()


# -- the gate --------------------------------------------------------------------------------------


async def test_nothing_is_sent_before_the_device_is_started(asked: Asked) -> None:
    vmm = asked.connect()
    asked.requests.want_config_change()
    asked.want_mapping()
    assert await vmm.is_silent()

    asked.requests.open()

    assert await vmm.take(52) == MAP + MAPPING


async def test_the_order_of_channel_start_and_wish_does_not_matter(asked: Asked) -> None:
    asked.requests.open()
    asked.want_mapping()
    assert not asked.requests.possible
    await trio.testing.wait_all_tasks_blocked(QUIET_S)

    vmm = asked.connect()

    assert asked.requests.possible
    assert await vmm.take(52) == MAP + MAPPING


async def test_nothing_is_sent_between_a_stop_and_the_next_start(asked: Asked) -> None:
    vmm = asked.connect()
    asked.requests.open()
    asked.requests.close()
    asked.requests.want_config_change()
    asked.want_mapping()
    assert await vmm.is_silent()


async def test_a_stop_in_the_same_moment_as_the_wish_sends_nothing(asked: Asked) -> None:
    """No task runs between them: the wish must not be on its way already."""
    vmm = asked.connect()
    asked.requests.open()
    await trio.testing.wait_all_tasks_blocked(QUIET_S)
    asked.want_mapping()
    asked.requests.close()
    assert await vmm.is_silent()
    assert asked.verdicts == []


@pytest.mark.parametrize("stopped", [True, False])
async def test_what_waits_for_room_at_a_stop_is_not_sent_when_there_is_some(
    asked: Asked, stopped: bool
) -> None:
    vmm = asked.connect(full=True)
    asked.requests.open()
    asked.requests.want_config_change()
    await trio.testing.wait_all_tasks_blocked(QUIET_S)
    if stopped:
        asked.requests.close()
    assert not any(vmm.drain())
    await trio.testing.wait_all_tasks_blocked(QUIET_S)
    sent = vmm.drain()
    assert sent == (b"" if stopped else CONFIG_CHANGE[:1])
    asked.requests.open()
    if stopped:
        assert await vmm.take(12) == CONFIG_CHANGE


# -- the mapping -----------------------------------------------------------------------------------


async def test_a_mapping_goes_before_a_config_change_that_was_wanted_sooner(asked: Asked) -> None:
    vmm = asked.connect()
    asked.requests.want_config_change()
    asked.want_mapping()
    asked.requests.open()
    assert await vmm.take(52) == MAP + MAPPING
    assert await vmm.is_silent(), "one request at a time"
    await vmm.answer(BackendRequest.SHMEM_MAP)
    assert asked.verdicts == [0]
    assert await vmm.take(12) == CONFIG_CHANGE
    await vmm.answer(BackendRequest.CONFIG_CHANGE_MSG)
    assert asked.requests.config_changes == 1


async def test_a_mapping_brings_the_image_itself_and_keeps_ours_open(asked: Asked) -> None:
    vmm = asked.connect()
    asked.requests.open()
    asked.want_mapping()
    await vmm.take(52)
    (fd,) = vmm.fds
    assert link(fd.fileno()) == link(asked.image.fileno())
    await vmm.answer(BackendRequest.SHMEM_MAP)
    fd.close()
    assert not asked.image.closed


@pytest.mark.parametrize("verdict", [0, 1, (1 << 64) - 22])
async def test_the_verdict_is_passed_on_once(asked: Asked, verdict: int) -> None:
    vmm = asked.connect()
    asked.requests.open()
    asked.want_mapping()
    await vmm.take(52)
    assert asked.verdicts == []
    await vmm.answer(BackendRequest.SHMEM_MAP, verdict)
    assert asked.verdicts == [verdict]
    assert await vmm.is_silent(), "a refused mapping is not tried again"


async def test_a_mapping_not_sent_yet_is_forgotten_at_a_stop_and_a_config_change_is_not(
    asked: Asked,
) -> None:
    vmm = asked.connect()
    asked.want_mapping()
    asked.requests.want_config_change()
    asked.requests.close()
    asked.requests.open()
    assert await vmm.take(12) == CONFIG_CHANGE
    await vmm.answer(BackendRequest.CONFIG_CHANGE_MSG)
    assert await vmm.is_silent()
    assert asked.verdicts == []


async def test_of_two_mappings_not_sent_yet_the_later_one_goes(asked: Asked) -> None:
    vmm = asked.connect()
    asked.want_mapping()
    asked.want_mapping(LARGER)
    asked.requests.open()
    assert await vmm.take(52) == MAP + LARGER
    await vmm.answer(BackendRequest.SHMEM_MAP)
    assert await vmm.is_silent()


@pytest.mark.parametrize("stopped", [True, False])
async def test_a_mapping_that_another_has_replaced_while_it_waited_for_room_is_not_sent(
    asked: Asked, stopped: bool
) -> None:
    vmm = asked.connect(full=True)
    asked.requests.open()
    asked.want_mapping()
    await trio.testing.wait_all_tasks_blocked(QUIET_S)
    if stopped:
        asked.requests.close()
        asked.requests.open()
    asked.want_mapping(LARGER)
    assert not any(vmm.drain())
    assert await vmm.take(52) == MAP + LARGER
    await vmm.answer(BackendRequest.SHMEM_MAP)
    assert asked.verdicts == [0]
    assert await vmm.is_silent()


async def test_a_mapping_that_waits_for_room_is_sent_when_there_is_some(asked: Asked) -> None:
    vmm = asked.connect(full=True)
    asked.requests.open()
    asked.want_mapping()
    await trio.testing.wait_all_tasks_blocked(QUIET_S)
    assert not any(vmm.drain())
    assert await vmm.take(52) == MAP + MAPPING
    await vmm.answer(BackendRequest.SHMEM_MAP)
    assert asked.verdicts == [0]
    assert await vmm.is_silent()


async def test_a_verdict_that_comes_after_the_stop_is_still_one(asked: Asked) -> None:
    """QEMU answers from its handler, which a stop message of before does not interrupt."""
    vmm = asked.connect()
    asked.requests.open()
    asked.want_mapping()
    await vmm.take(52)
    await trio.testing.wait_all_tasks_blocked(QUIET_S)
    asked.requests.close()
    asked.requests.want_config_change()
    await vmm.answer(BackendRequest.SHMEM_MAP)
    assert asked.verdicts == [0]
    assert await vmm.is_silent()


# -- config changes --------------------------------------------------------------------------------


async def test_many_config_changes_are_one_and_one_wanted_meanwhile_is_another(
    asked: Asked,
) -> None:
    vmm = asked.connect()
    for _ in range(1000):
        asked.requests.want_config_change()
    asked.requests.open()
    assert await vmm.take(12) == CONFIG_CHANGE
    for _ in range(1000):
        asked.requests.want_config_change()
    await vmm.answer(BackendRequest.CONFIG_CHANGE_MSG, 1)  # there is nothing to do about a refusal
    assert await vmm.take(12) == CONFIG_CHANGE
    await vmm.answer(BackendRequest.CONFIG_CHANGE_MSG)
    assert await vmm.is_silent()
    assert asked.requests.config_changes == 2
