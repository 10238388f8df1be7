"""A hundred thousand frames that are not what they should be, given to everything that reads frames."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onehop.errors import ProtocolError, WireError
from onehop.interfaces import Record
from onehop.protocol import wire
from onehop.protocol.calls import Call, CallTable
from onehop.protocol.inbox import ADDRESSES_KEPT, WINDOW_KEPT, Inbox, Request
from onehop.protocol.node import NodeProtocol

FRAMES = 25_000
SEEDS = (1, 2, 3, 4)
SERVER, CALLER = b"s" * 16, b"c" * 16
CONNECTIONS = (b"\0one", b"\0two", b"\0six")


def read(frame: bytes) -> None:
    """Everything in wire.py that reads what a peer sent."""
    with suppress(WireError):
        wire.parse_hello(frame)
    with suppress(WireError):
        wire.split_names(frame[wire.HEADER_SIZE :])
    wire.has_second_frame(frame)
    if not wire.kind_of(frame):
        assert len(frame) < wire.HEADER_SIZE or frame[0] == 0
    try:
        head = wire.header(frame)
    except WireError:
        return
    with suppress(WireError):
        _, section, start = wire.address(frame, head)
        assert start <= len(frame)
        wire.split_names(section)
    with suppress(WireError):
        assert len(wire.acked(frame)) == (len(frame) - 8) // 8
    reason, _ = wire.rejection(frame)
    assert reason in wire.REASONS


class Servant:
    """An inbox, and what it must have after each frame."""

    def __init__(self) -> None:
        self.inbox = Inbox(SERVER, messages=50, size=1 << 20, reach=64)
        self.inbox.offer("echo", "a", [])
        self.inbox.offer("clock", "a", [])
        self.nodes = count(1)
        self.taken = 0
        self.greet(0.0)

    def greet(self, now: float) -> None:
        """Two connections begin anew, as other nodes: fuzzed goodbyes and numbers have spoilt the old ones."""
        for identity in CONNECTIONS[:2]:
            self.inbox.gone(identity)
            hello = wire.hello(wire.Hello(next(self.nodes).to_bytes(16, "big"), bytes(16)))
            self.inbox.receive(identity, hello, None, now, [])
        self.inbox.handle_timer(now)
        self.inbox.outgoing.clear()

    def take(self, identity: bytes, frame: bytes, second: bytes | None, now: float) -> None:
        inbox = self.inbox
        before = (sum(inbox.counts.values()), sum(inbox.refused.values()))
        bad = inbox.counts["bad frames"]
        moved: list[Request] = []
        inbox.receive(identity, frame, second, now, moved)
        counted = (sum(inbox.counts.values()), sum(inbox.refused.values())) != before
        if not (counted or moved or inbox.outgoing or inbox.echoes):
            # Legal without a trace: what met its answer under way, and a farewell of one who asked nothing.
            assert wire.header(frame).kind in (wire.CREDIT, wire.CANCEL, wire.GOODBYE)
        try:
            head = wire.header(frame)
        except WireError:
            assert inbox.counts["bad frames"] == bad + 1
            assert not moved
            assert not inbox.outgoing
        else:
            if head.kind >= wire.FIRST_FOR_CALLS:
                assert inbox.counts["bad frames"] == bad + 1
        self.taken += any(not request.cancelled for request in moved)
        for request in inbox.echoes:
            request.sender.echo = False  # a worker answers it
        inbox.echoes.clear()
        for _, answer in inbox.outgoing:
            wire.header(answer if isinstance(answer, bytes) else answer[0])
        inbox.outgoing.clear()
        assert len(inbox.taken) <= inbox.messages
        assert inbox.taken_bytes <= inbox.size
        if len(inbox.taken) > 40:
            for request in list(inbox.taken)[:20]:
                assert inbox.finish(request)

    def sizes(self) -> dict[str, int]:
        inbox = self.inbox
        assert len(inbox._addresses) <= ADDRESSES_KEPT
        assert all(len(window._missing) <= 2 * inbox.reach for window in inbox._windows.values())
        assert all(len(window.connections) <= inbox.messages for window in inbox._windows.values())
        return {
            "taken": len(inbox.taken),
            "senders": len(inbox.senders),
            "windows": len(inbox._windows),
            "calls": sum(len(sender.calls) for sender in inbox.senders.values()),
            "beats": len(inbox._beats),
        }


class Asker:
    """A table of calls under way, renewed as they end."""

    def __init__(self) -> None:
        # Low numbers again and again: those that the frames name.
        self.table = CallTable(next(id for id in range(1, 13) if id not in self.table.pending) for _ in count())
        self.ended = 0
        self.refill()

    def refill(self) -> None:
        while len(self.table.pending) < 12:
            call = Call((wire.REQUEST, wire.CAST, wire.PING)[len(self.table.pending) % 3])
            if call.kind == wire.REQUEST:
                call.items, call.granted = deque(), 3
            self.table.begin(call)

    def take(self, frame: bytes, second: bytes | None) -> None:
        moved: list[Call] = []
        pending = len(self.table.pending)
        with suppress(WireError):
            assert self.table.receive(frame, second, moved) == (wire.kind_of(frame) >= wire.FIRST_FOR_CALLS)
        ended = {call.id for call in moved if call.outcome is not None}
        assert pending - len(self.table.pending) == len(ended), "a call leaves the table only with an outcome"
        self.ended += len(ended)
        self.refill()


class Controlled:
    """A node's peer in every state, told what is for no call."""

    def __init__(self) -> None:
        self.fresh()

    def fresh(self) -> None:
        self.node = NodeProtocol(CALLER, random=lambda: 0.5)
        self.node.learn([Record(node=SERVER.hex(), host="h", endpoints=("ipc:///s",), services={"echo": ("a",)})])
        [self.peer] = self.node.peers.peers.values()
        self.node.connect(self.peer, 0.0)

    def take(self, frame: bytes) -> None:
        before = self.peer.state
        try:
            self.node.control(self.peer, frame, 0.0, [])
        except ProtocolError:
            assert self.peer.state == before
        if self.peer.state != "connecting":
            self.fresh()


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_comes_is_read_or_refused_and_counted_and_leaves_nothing_behind(
    seed: int, make_fuzz: Callable[..., Any], memory: Callable[[], int]
) -> None:
    fuzz = make_fuzz(seed, CALLER)
    servant, asker, controlled = Servant(), Asker(), Controlled()
    held = 0
    for number in range(FRAMES):
        frame = fuzz.frame()
        second = fuzz.second(frame)
        read(frame)
        servant.take(fuzz.random.choice(CONNECTIONS), frame, second, number / 10)
        if number % 50 == 49:
            servant.greet(number / 10)
        asker.take(frame, second)
        controlled.take(frame)
        if number == FRAMES // 5:
            gc.collect()
            held = memory()
    gc.collect()
    assert memory() - held < 8 << 20
    inbox = servant.inbox
    sizes = servant.sizes()
    assert sizes["senders"] <= len(CONNECTIONS)
    assert sizes["windows"] <= 2 + 2 * WINDOW_KEPT * 10 / 50 + 100, "old ones go"
    assert servant.taken > FRAMES // 50, "some were requests after all"
    assert inbox.counts["bad frames"] > FRAMES // 10
    assert asker.ended > 100, "some were answers after all"
    # Everything that was let in can be let go again.
    for request in list(inbox.taken):
        assert inbox.finish(request)
    for identity in CONNECTIONS:
        inbox.gone(identity)
    inbox.handle_timer(FRAMES / 10 + WINDOW_KEPT + 1)
    assert servant.sizes() == {"taken": 0, "senders": 0, "windows": 0, "calls": 0, "beats": 0}
    assert inbox.taken_bytes == 0


U64 = st.integers(0, 2**64 - 1)
HEADERS = st.builds(
    wire.HEADER.pack,
    st.sampled_from(sorted(wire.KINDS)) | st.integers(0, 255),
    st.sampled_from([0, 1, 2, 4, 8, 16, 32, 64, 128]) | st.integers(0, 255),
    st.integers(0, 64) | st.integers(0, 2**16 - 1),
    st.integers(0, 12) | st.integers(0, 2**32 - 1),
    st.integers(0, 20) | U64,
)
ANY_FRAME = st.binary(max_size=40) | st.builds(bytes.__add__, HEADERS, st.binary(max_size=120))


@settings(max_examples=400)
@given(st.lists(st.tuples(st.sampled_from(CONNECTIONS), ANY_FRAME, st.none() | st.binary(max_size=3)), max_size=40))
def test_any_sequence_of_frames_is_read_or_refused_and_counted(
    messages: list[tuple[bytes, bytes, bytes | None]],
) -> None:
    servant, asker, controlled = Servant(), Asker(), Controlled()
    clock = count()
    for identity, frame, second in messages:
        read(frame)
        servant.take(identity, frame, second, float(next(clock)))
        asker.take(frame, second)
        controlled.take(frame)
        servant.sizes()
