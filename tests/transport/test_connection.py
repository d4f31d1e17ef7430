"""Whole messages over a real socket: cuts, floods, lost descriptors, ends."""

from __future__ import annotations

import os
import resource
import socket

import pytest
import trio
import trio.testing
from vhostd.errors import FrontendError
from vhostd.protocol.framing import Message
from vhostd.protocol.requests import Request
from vhostd.transport.connection import Connection
from vhostd.transport.stream import Disconnected

from tests.fakes import messages
from tests.fakes.messages import u64
from tests.protocol.streams import encoded
from tests.transport.sockets import connected, link, no_leak, send_fds

REGION = messages.WireRegion(0, 4096, 0, 0)
ADD_MEM_REG = encoded(Request.ADD_MEM_REG, messages.memory_slot(REGION))
GET_FEATURES = encoded(Request.GET_FEATURES)


def answered(connection: Connection) -> None:
    """As when the message received last was answered: the native worker takes it then."""
    if connection.unread_size:
        with socket.socket(fileno=os.dup(connection.fileno())) as again:
            assert len(again.recv(connection.unread_size)) == connection.unread_size


async def one(connection: Connection) -> Message:
    message = await connection.receive()
    assert message is not None
    answered(connection)
    return message


async def test_a_message_stays_until_it_is_answered() -> None:
    """A successor finds it, with its descriptors."""
    with no_leak(), connected() as (connection, vmm):
        send_fds(vmm, ADD_MEM_REG, [os.memfd_create("ram")])
        for _ in range(3):
            message = await connection.receive()
            assert message is not None
            assert message.payload == ADD_MEM_REG[12:]
            assert link(message.fds[0].fileno()).startswith("/memfd:ram")
            message.close_fds()
        answered(connection)
        assert await connection.receive() is None


async def test_nothing_there_is_no_wait() -> None:
    """The native worker waits for the socket, not this task."""
    with connected() as (connection, _vmm):
        assert await connection.receive() is None


async def test_a_message_arrives_with_its_descriptor() -> None:
    with no_leak(), connected() as (connection, vmm):
        send_fds(vmm, ADD_MEM_REG, [os.memfd_create("ram")])
        message = await one(connection)
        assert message.payload == ADD_MEM_REG[12:]
        assert link(message.fds[0].fileno()).startswith("/memfd:ram")
        assert not os.get_inheritable(message.fds[0].fileno())
        message.close_fds()


async def test_descriptors_go_to_the_message_they_came_with() -> None:
    """The kernel hands out a message without descriptors and the next one's in one read."""
    with no_leak(), connected() as (connection, vmm):
        vmm.send(GET_FEATURES)
        send_fds(vmm, ADD_MEM_REG, [os.memfd_create("ram")])
        vmm.send(GET_FEATURES)

        found = [await one(connection) for _ in range(3)]

        assert [len(message.fds) for message in found] == [0, 1, 0]
        assert await connection.receive() is None
        found[1].close_fds()


async def test_descriptors_behind_a_message_that_may_have_one_are_not_its_own() -> None:
    """QEMU sends such pairs in one go: a queue without interrupt, and the kick of the next."""
    silent = encoded(Request.SET_VRING_CALL, u64(messages.VRING_NO_FD))
    kick = encoded(Request.SET_VRING_KICK, u64(0))
    with no_leak(), connected() as (connection, vmm):
        for _ in range(2):
            vmm.send(silent)
            send_fds(vmm, kick, [os.memfd_create("kick")])
            vmm.send(silent)
            found = [await one(connection) for _ in range(3)]
            assert [len(message.fds) for message in found] == [0, 1, 0]
            assert link(found[1].fds[0].fileno()).startswith("/memfd:kick")
            found[1].close_fds()


async def test_a_message_that_lacks_its_descriptor_does_not_take_the_next_ones() -> None:
    with no_leak(), connected() as (connection, vmm):
        vmm.send(ADD_MEM_REG)
        send_fds(vmm, ADD_MEM_REG, [os.memfd_create("ram")])
        lacking, whole = [await one(connection) for _ in range(2)]
        assert lacking.fault is not None and not lacking.fds
        assert whole.fault is None
        whole.close_fds()


async def test_descriptors_of_several_messages_sent_at_once_are_the_firsts() -> None:
    with no_leak(), connected() as (connection, vmm):
        send_fds(vmm, ADD_MEM_REG + ADD_MEM_REG, [os.memfd_create("ram")])
        whole, lacking = [await one(connection) for _ in range(2)]
        assert whole.fault is None
        assert lacking.fault is not None
        whole.close_fds()


@pytest.mark.parametrize("cut", [1, 11, 12, 13, 40, 51])
async def test_descriptors_that_come_with_later_bytes_are_nobodys(cut: int) -> None:
    with no_leak(), connected() as (connection, vmm):
        for _ in range(2):
            vmm.send(ADD_MEM_REG[:cut])
            send_fds(vmm, ADD_MEM_REG[cut:], [os.memfd_create("ram")])
            vmm.send(GET_FEATURES)
            lacking, other = [await one(connection) for _ in range(2)]
            assert lacking.fault is not None and not lacking.fds
            assert other.fault is None


async def test_a_message_in_single_bytes_is_a_message() -> None:
    """H2. Once its first byte is there, the rest is waited for."""
    with connected() as (connection, vmm):
        found: list[Message] = []

        async def receive() -> None:
            found.append(await one(connection))

        vmm.send(ADD_MEM_REG[:1])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            for position in range(1, len(ADD_MEM_REG)):
                await trio.testing.wait_all_tasks_blocked()
                assert found == []
                vmm.send(ADD_MEM_REG[position : position + 1])
        assert found[0].payload == ADD_MEM_REG[12:]


async def test_receiving_can_be_cancelled_and_goes_on() -> None:
    with no_leak(), connected() as (connection, vmm):
        send_fds(vmm, ADD_MEM_REG[:20], [os.memfd_create("ram")])
        with trio.move_on_after(0.01) as scope:
            await connection.receive()
        assert scope.cancelled_caught

        vmm.send(ADD_MEM_REG[20:])
        message = await one(connection)

        assert message.payload == ADD_MEM_REG[12:]
        assert len(message.fds) == 1
        message.close_fds()


async def test_ten_thousand_messages_in_one_go() -> None:
    """H12."""
    with connected() as (connection, vmm):
        stream = b"".join(encoded(Request.SET_STATUS, u64(n)) for n in range(10_000))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, lambda: vmm.sendall(stream))
            for n in range(10_000):
                while (message := await connection.receive()) is None:
                    await connection.wait_readable()
                assert message.payload == u64(n)
                answered(connection)


async def test_hanging_up_between_messages_is_an_orderly_end() -> None:
    with connected() as (connection, vmm):
        vmm.send(GET_FEATURES)
        vmm.shutdown(socket.SHUT_WR)
        await one(connection)
        with pytest.raises(Disconnected):
            await connection.receive()


@pytest.mark.parametrize("cut", [1, 5, 11, 12, 30, 51])
async def test_hanging_up_inside_a_message_is_not(cut: int) -> None:
    """H1."""
    with no_leak(), connected() as (connection, vmm):
        send_fds(vmm, ADD_MEM_REG[:cut], [os.memfd_create("ram")])
        vmm.shutdown(socket.SHUT_WR)
        with pytest.raises(FrontendError) as caught:
            await connection.receive()
        assert caught.value.fatal


async def test_a_reset_connection_is_an_end_too() -> None:
    with connected() as (connection, vmm):
        os.write(connection.fileno(), b"never read")
        vmm.close()
        with pytest.raises(Disconnected):
            await connection.receive()


async def test_253_descriptors_are_refused_and_closed() -> None:
    """H15."""
    with no_leak(), connected() as (connection, vmm):
        send_fds(vmm, ADD_MEM_REG, [os.memfd_create("ram") for _ in range(253)])
        message = await one(connection)
        assert message.fault is not None
        assert message.fds == ()


async def test_running_out_of_descriptors_costs_one_message_only() -> None:
    """H20: the kernel says MSG_CTRUNC and hands over as many as fit."""
    with no_leak(), connected() as (connection, vmm):
        send_fds(vmm, ADD_MEM_REG, [os.memfd_create("ram") for _ in range(8)])
        vmm.send(GET_FEATURES)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        spare = os.dup(0)
        os.close(spare)
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 3, limits[1]))
        try:
            refused = await one(connection)
            served = await one(connection)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert refused.fault == "ADD_MEM_REG: descriptors were lost on the way"
        assert served.fault is None


async def test_closing_drops_a_half_received_message() -> None:
    with no_leak(), connected() as (connection, vmm):
        send_fds(vmm, ADD_MEM_REG[:20], [os.memfd_create("ram")])
        with trio.move_on_after(0.01):
            await connection.receive()
        connection.close()
        connection.close()
        assert connection.fileno() == -1
        with pytest.raises(Disconnected):
            await connection.receive()


async def test_a_hang_up_is_seen_behind_messages_that_wait() -> None:
    with connected() as (connection, vmm):
        assert not connection.hung_up
        vmm.send(GET_FEATURES)
        vmm.close()
        assert connection.hung_up
        await one(connection)
        connection.close()
        assert connection.hung_up


async def test_closing_wakes_who_waits() -> None:
    with connected() as (connection, _vmm):
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await connection.wait_readable()

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            connection.close()
