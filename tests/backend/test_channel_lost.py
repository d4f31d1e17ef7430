"""The back-end channel where a stop or a broken VMM comes between: what is kept, what is told."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
from vhostd.transport.backend_channel import WITHDRAWN

from tests.backend.asked import CONFIG_CHANGE, LARGER, MAP, MAPPING, QUIET_S, Asked
from tests.fakes import messages
from tests.fakes.messages import BackendRequest


@pytest.fixture
async def asked() -> AsyncIterator[Asked]:
    asked = Asked()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(asked.requests.run)
        yield asked
        nursery.cancel_scope.cancel()
    asked.close()


async def test_a_vmm_that_hangs_up_under_a_mapping_gave_no_verdict(asked: Asked) -> None:
    vmm = asked.connect()
    asked.requests.open()
    asked.want_mapping()
    await vmm.take(52)
    vmm.end.close()
    await trio.testing.wait_all_tasks_blocked(QUIET_S)
    assert asked.verdicts == [None]
    assert not asked.requests.possible
    ((event, fields),) = asked.events
    assert event == "config_change_channel_lost"
    assert isinstance(fields, dict)
    assert fields["device"] == "mem0"
    assert asked.requests.untold is not None
    assert "lost" in asked.requests.untold
    asked.connect()
    assert asked.requests.untold is None


async def test_who_can_not_be_told_is_known_where_there_is_somebody_to_tell(asked: Asked) -> None:
    assert asked.requests.untold is None, "the device is not started"
    asked.requests.open()
    assert asked.requests.untold is not None
    asked.connect()
    assert asked.requests.untold is None


async def test_a_vmm_that_answers_nonsense_loses_the_channel_alone(asked: Asked) -> None:
    vmm = asked.connect()
    asked.requests.open()
    asked.want_mapping()
    await vmm.take(52)
    await vmm.answer(BackendRequest.SHMEM_UNMAP)
    assert asked.verdicts == [None]
    assert await vmm.is_closed()

    heir = asked.connect()

    assert await heir.take(12) == CONFIG_CHANGE, "what may have been lost is told again"
    await heir.answer(BackendRequest.CONFIG_CHANGE_MSG)
    asked.want_mapping()
    assert await heir.take(52) == MAP + MAPPING


async def test_a_stop_before_the_vmm_reads_a_mapping_withdraws_it(asked: Asked) -> None:
    """Whole in its queue, QEMU would read it after the stop, and crash."""
    vmm = asked.connect()
    asked.requests.open()
    asked.want_mapping()
    await trio.testing.wait_all_tasks_blocked(QUIET_S)
    asked.requests.close()
    await trio.testing.wait_all_tasks_blocked(10 * QUIET_S)
    assert vmm.drain() == messages.header(BackendRequest.SHMEM_MAP | WITHDRAWN, 0x1, 0)
    assert asked.verdicts == []

    asked.requests.open()
    assert await vmm.is_silent()
    asked.want_mapping(LARGER)
    assert await vmm.take(52) == MAP + LARGER


async def test_a_config_change_that_a_stop_withdraws_is_asked_after_the_next_start(
    asked: Asked,
) -> None:
    vmm = asked.connect()
    for _ in range(20):
        asked.requests.open()
        asked.requests.want_config_change()
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(vmm.end)
        asked.requests.close()
        assert vmm.drain() == messages.header(BackendRequest.CONFIG_CHANGE_MSG | WITHDRAWN, 0x1, 0)
    asked.requests.open()
    assert await vmm.take(12) == CONFIG_CHANGE
    await vmm.answer(BackendRequest.CONFIG_CHANGE_MSG)
    assert asked.requests.config_changes == 1
    assert await vmm.is_silent()


async def test_a_new_channel_closes_the_old_one_and_takes_what_waits(asked: Asked) -> None:
    """H29."""
    vmm = asked.connect()
    asked.requests.open()
    asked.requests.want_config_change()
    await vmm.take(12)
    heir = asked.connect()
    assert await vmm.is_closed()
    assert await heir.take(12) == CONFIG_CHANGE
