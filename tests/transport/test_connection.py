"""Whole messages over a real socket: cuts, floods, lost descriptors, ends."""

from __future__ import annotations

import os
import resource
import socket

import pytest
import trio
import trio.testing
from vhostd.errors import FrontendError
from vhostd.fds import OwnedFd
from vhostd.protocol.framing import Message
from vhostd.protocol.replies import Reply
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


async def one(connection: Connection) -> Message:
    message = await connection.receive()
    assert message is not None
    return message


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
        await connection.send(Reply(b"never read"))
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


async def test_a_reply_carries_its_descriptor_and_closes_it() -> None:
    with no_leak(), connected() as (connection, vmm):
        file = OwnedFd(os.memfd_create("inflight"))
        await connection.send(Reply(b"reply", (file,)))
        data, fds, _flags, _address = socket.recv_fds(vmm, 100, 4)
        assert data == b"reply"
        assert link(fds[0]).startswith("/memfd:inflight")
        assert file.closed
        os.close(fds[0])


async def test_a_reply_larger_than_the_socket_buffer_arrives_whole() -> None:
    with connected() as (connection, vmm):
        reply = os.urandom(4 << 20)
        received = bytearray()

        def read() -> None:
            while len(received) < len(reply):
                received.extend(vmm.recv(1 << 16))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, read)
            await connection.send(Reply(reply))
        assert bytes(received) == reply


async def test_a_descriptor_rides_with_the_first_byte_only() -> None:
    with no_leak(), connected() as (connection, vmm):
        size = 4 << 20
        fds: list[int] = []

        def read() -> None:
            left = size
            while left:
                data, more, _flags, _address = socket.recv_fds(vmm, left, 16)
                left -= len(data)
                fds.extend(more)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, read)
            await connection.send(Reply(bytes(size), (OwnedFd(os.memfd_create("inflight")),)))
        assert len(fds) == 1
        os.close(fds[0])


async def test_a_reply_cut_short_spoils_the_connection() -> None:
    """The VMM would take the next reply for the rest of this one."""
    with connected() as (connection, _vmm):
        with trio.move_on_after(0.01) as scope:
            await connection.send(Reply(bytes(4 << 20)))
        assert scope.cancelled_caught
        with pytest.raises(Disconnected, match="cut short"):
            await connection.send(Reply(b"next"))


async def test_a_vmm_that_is_gone_is_no_crash() -> None:
    with connected() as (connection, vmm):
        vmm.close()
        with pytest.raises(Disconnected):
            await connection.send(Reply(b"reply"))


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
