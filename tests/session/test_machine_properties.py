"""Random front ends, truthful and lying, against a model of what the shell was told to do."""

from __future__ import annotations

import gc

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from vhostd.errors import FrontendError, HostError
from vhostd.protocol.features import BACKEND_PROTOCOL_FEATURES, ProtocolFeature
from vhostd.protocol.requests import RULES, Request
from vhostd.protocol.wire import PAYLOAD_SIZE_MAX
from vhostd.session import actions
from vhostd.session.actions import FileIdentity, RingPosition
from vhostd.session.memory_table import check_table
from vhostd.session.ring_layout import set_up
from vhostd.session.state import SessionState

from tests.fakes import messages
from tests.fakes.messages import VRING_NO_FD, VirtioFeature, WireRegion, u64, vring_state
from tests.session.conversation import (
    CONFIG_SIZE,
    HIGH,
    LOW,
    MIB,
    PACKED,
    QUEUES,
    SPLIT,
    WITHOUT_BIT_30,
    Conversation,
    eventfd,
    ring_addresses,
)
from tests.transport.sockets import open_fds

TOP = 1 << 64
INDEXES = st.integers(0, QUEUES)
REGIONS = st.sampled_from(
    [LOW, HIGH, WireRegion(1 << 40, MIB, 1 << 41, 0), WireRegion(0, MIB, 1 << 41, 0)]
)
TWISTS = st.sampled_from([{}, {}, {}, {"size": 4096}, {"size": 0}, {"guest_addr": 4096}])
NUMBERS = st.one_of(st.integers(0, 300), st.sampled_from([0x8000_8000, 65536, TOP - 1]))
FEATURES = st.sampled_from(
    [SPLIT, SPLIT, PACKED, WITHOUT_BIT_30, SPLIT | VirtioFeature.LOG_ALL, SPLIT | 1 << 60, 0]
)
ACKED = BACKEND_PROTOCOL_FEATURES & ~ProtocolFeature.GPA_ADDRESSES
PROTOCOL_FEATURES = st.sampled_from(
    [ACKED, ACKED, BACKEND_PROTOCOL_FEATURES, ACKED & ~ProtocolFeature.MQ, ACKED | 1 << 40]
)
POSITIONS = st.builds(
    RingPosition,
    st.integers(0, 127),
    st.integers(0, 127),
    st.integers(0, 1),
    st.integers(0, 1),
)


class Shell:
    """What a shell that believes every action would hold; contradictions fail at once."""

    def __init__(self) -> None:
        self.started: dict[int, actions.RingSetup] = {}
        self.enabled: set[int] = set()
        self.regions: tuple[messages.WireRegion, ...] = ()
        self.open = False

    def perform(self, action: actions.Action) -> None:
        match action:
            case actions.StartRing(setup):
                assert setup.index not in self.started
                self.started[setup.index] = setup
            case actions.RestartRing(setup):
                assert setup.index in self.started
                self.started[setup.index] = setup
                (self.enabled.add if setup.enabled else self.enabled.discard)(setup.index)
            case actions.StopRing(index):
                del self.started[index]
                self.enabled.discard(index)
            case actions.EnableRing(index, enabled):
                assert index in self.started
                (self.enabled.add if enabled else self.enabled.discard)(index)
            case actions.SetRegions(regions):
                self._replace_regions(regions)
            case actions.DeviceStarted():
                assert not self.open
                assert self.enabled, "no ring is live"
                self.open = True
            case actions.DeviceStopped():
                assert self.open
                self.open = False
            case actions.DriverReset():
                assert not self.enabled, "a ring is served"

    def _replace_regions(self, regions: tuple[actions.RegionSource, ...]) -> None:
        table = []
        for source in regions:
            told = source.region
            wire = WireRegion(told.guest_addr, told.size, told.frontend_addr, told.file_offset)
            assert (source.file is None) <= (wire in self.regions), "a file nobody has"
            table.append(wire)
        self.regions = tuple(table)


class FrontEnds(RuleBasedStateMachine):
    """Every rule sends one message; the invariants say what must hold after any of them."""

    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        self.fds = open_fds()
        self.talk = Conversation()
        self.shell = Shell()

    def say(self, request: int, payload: bytes = b"", fd_count: int = 0) -> None:
        before = self.talk.state
        asks = 0x9 if ProtocolFeature.REPLY_ACK in before.acked else 0x1
        answer = self.talk.send(request, payload, [eventfd() for _ in range(fd_count)], asks)
        performed = self.talk.take()
        if self.talk.refusal is not None:
            assert self.talk.state == before, "a refused message left a trace"
            assert performed == []
        for action in performed:
            self.shell.perform(action)
        replies = request in RULES and RULES[Request(request)].reply is not None
        assert (answer is not None) == (replies or asks == 0x9)

    @initialize(features=FEATURES, orderly=st.sampled_from([True, True, True, False]))
    def begin(self, features: int, orderly: bool) -> None:
        """Most front ends begin well; without memory and features no ring ever starts."""
        if orderly:
            self.say(Request.SET_PROTOCOL_FEATURES, u64(ACKED))
            self.say(Request.SET_FEATURES, u64(features))
            for region in (LOW, HIGH):
                self.say(Request.ADD_MEM_REG, messages.memory_slot(region), 1)

    @rule(index=st.integers(0, QUEUES - 1), enable=st.sampled_from([True, True, False]))
    def start(self, index: int, enable: bool) -> None:
        self.talk.refuse_next = None
        self.say(Request.SET_VRING_NUM, vring_state(index, 128))
        payload = messages.vring_addr(index, *ring_addresses(index))
        self.say(Request.SET_VRING_ADDR, payload)
        self.say(Request.SET_VRING_KICK, u64(index), 1)
        self.say(Request.SET_VRING_ENABLE, vring_state(index, int(enable)))

    @rule(position=POSITIONS)
    def rings_move(self, position: RingPosition) -> None:
        self.talk.position = position

    @rule(host=st.booleans())
    def shell_will_fail(self, host: bool) -> None:
        self.talk.refuse_next = HostError("no memory") if host else FrontendError("no eventfd")

    @rule(features=PROTOCOL_FEATURES)
    def set_protocol_features(self, features: int) -> None:
        self.talk.refuse_next = None
        self.say(Request.SET_PROTOCOL_FEATURES, u64(features))

    @rule(features=FEATURES)
    def set_features(self, features: int) -> None:
        self.talk.refuse_next = None
        self.say(Request.SET_FEATURES, u64(features))

    @rule(request=st.sampled_from([Request.ADD_MEM_REG, Request.REM_MEM_REG]), region=REGIONS)
    def change_memory(self, request: Request, region: WireRegion) -> None:
        self.say(request, messages.memory_slot(region), 1)

    @rule(region=REGIONS, twist=TWISTS)
    def lie_about_memory(self, region: WireRegion, twist: dict[str, int]) -> None:
        self.say(Request.ADD_MEM_REG, messages.memory_slot(region.but(**twist)), 1)

    @rule(regions=st.lists(REGIONS, min_size=1, max_size=4), fds=st.integers(1, 4))
    def set_mem_table(self, regions: list[WireRegion], fds: int) -> None:
        self.say(Request.SET_MEM_TABLE, messages.memory_table(regions), fds)

    @rule(index=INDEXES, size=st.sampled_from([128, 256, 3, 0]), base=NUMBERS)
    def set_up_somehow(self, index: int, size: int, base: int) -> None:
        self.say(Request.SET_VRING_NUM, vring_state(index, size))
        self.say(Request.SET_VRING_BASE, vring_state(index, base & 0xFFFF_FFFF))
        payload = messages.vring_addr(index, *ring_addresses(index))
        self.say(Request.SET_VRING_ADDR, payload)
        self.say(Request.SET_VRING_KICK, u64(index), 1)

    @rule(
        index=INDEXES,
        at=st.sampled_from([0, 16, 1, HIGH.size]),
        flags=st.integers(0, 2),
        log=NUMBERS,
    )
    def set_vring_addr(self, index: int, at: int, flags: int, log: int) -> None:
        payload = messages.vring_addr(index, *ring_addresses(index, at), flags, log)
        self.say(Request.SET_VRING_ADDR, payload)

    @rule(index=st.integers(0, QUEUES - 1), again=st.booleans())
    def stop(self, index: int, again: bool) -> None:
        self.say(Request.SET_VRING_ENABLE, vring_state(index, 0))
        self.say(Request.GET_VRING_BASE, vring_state(index, 0))
        if again:
            self.say(Request.SET_VRING_KICK, u64(index), 1)
            self.say(Request.SET_VRING_ENABLE, vring_state(index, 1))

    @rule(
        request=st.sampled_from(
            [
                Request.SET_VRING_NUM,
                Request.SET_VRING_BASE,
                Request.GET_VRING_BASE,
                Request.SET_VRING_ENABLE,
                Request.SET_VRING_ENABLE,
            ]
        ),
        index=INDEXES,
        number=st.one_of(st.integers(0, 2), NUMBERS),
    )
    def say_about_a_ring(self, request: Request, index: int, number: int) -> None:
        self.say(request, vring_state(index, number & 0xFFFF_FFFF))

    @rule(
        request=st.sampled_from(
            [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR]
        ),
        index=INDEXES,
        flag=st.sampled_from([0, 0, VRING_NO_FD]),
        fds=st.integers(0, 2),
    )
    def give_a_file(self, request: Request, index: int, flag: int, fds: int) -> None:
        self.say(request, u64(index | flag), fds)

    @rule(size=st.sampled_from([8, 1 << 20, 1 << 25]), offset=NUMBERS)
    def set_log(self, size: int, offset: int) -> None:
        self.say(Request.SET_LOG_BASE, messages.log(size, offset), 1)

    @rule(offset=st.integers(0, CONFIG_SIZE + 1), size=st.integers(0, CONFIG_SIZE + 1))
    def config(self, offset: int, size: int) -> None:
        self.say(Request.GET_CONFIG, messages.config(offset, bytes(size)))
        self.say(Request.SET_CONFIG, messages.config(offset, bytes(size)))

    @rule(request=st.sampled_from([Request.SET_OWNER, Request.RESET_OWNER, Request.RESET_DEVICE]))
    def say_a_word(self, request: Request) -> None:
        self.talk.refuse_next = None
        self.say(request)

    @rule(request=st.integers(0, 50), payload=st.binary(max_size=48), fds=st.integers(0, 3))
    def say_anything(self, request: int, payload: bytes, fds: int) -> None:
        self.talk.refuse_next = None
        try:
            self.say(request, payload, fds)
        except FrontendError as error:
            assert error.fatal
            self.talk.take()

    @invariant()
    def shell_and_state_agree(self) -> None:
        state = self.talk.state
        assert {i for i, ring in enumerate(state.rings) if ring.started} == set(self.shell.started)
        assert {i for i, ring in enumerate(state.rings) if ring.live} == self.shell.enabled
        assert state.device_started == self.shell.open
        assert tuple(
            WireRegion(r.guest_addr, r.size, r.frontend_addr, r.file_offset) for r in state.regions
        ) == tuple(self.shell.regions)

    @invariant()
    def started_rings_are_legal(self) -> None:
        state = self.talk.state
        guest_addresses = ProtocolFeature.GPA_ADDRESSES in state.acked
        check_table([region.announced for region in state.regions], guest_addresses=guest_addresses)
        for index, ring in enumerate(state.rings):
            if ring.started:
                assert ring.kick
                assert set_up(state, index, ring).addresses == ring.started_at

    @invariant()
    def the_gate_is_open_for_live_rings_only(self) -> None:
        state = self.talk.state
        assert not state.device_started or any(ring.live for ring in state.rings)

    @invariant()
    def state_survives_a_hand_over(self) -> None:
        state = self.talk.state
        for codec in (msgspec.msgpack, msgspec.json):
            assert codec.decode(codec.encode(state), type=SessionState) == state

    def teardown(self) -> None:
        """No descriptor outlives the shell that was given it."""
        del self.talk
        gc.collect()
        assert open_fds() == self.fds


TestFrontEnds = FrontEnds.TestCase
TestFrontEnds.settings = settings(
    max_examples=settings().max_examples * 2 // 5,
    stateful_step_count=40,
    suppress_health_check=list(HealthCheck),
)


def test_the_largest_values_survive_a_hand_over() -> None:
    """Addresses have 64 bits, and so do inode numbers."""
    talk = Conversation()
    talk.negotiate()
    talk.add_memory(WireRegion(TOP - 4096, 4096, TOP - 4096, TOP - 4096))
    assert talk.state.regions[0].guest_addr == TOP - 4096
    assert FileIdentity(TOP - 1, TOP - 1).inode == TOP - 1
    packed = msgspec.msgpack.encode(talk.state)

    assert msgspec.msgpack.decode(packed, type=SessionState) == talk.state
    assert len(packed) < PAYLOAD_SIZE_MAX
