"""Sockets that do as the test says, at the moment it says."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from onehop.protocol import wire
from onehop.protocol.calls import Call, CallTable
from onehop.protocol.inbox import Inbox
from onehop.protocol.wire import Frame, Hello
from onehop.transport.carrier import InboundSocket, LinkSocket, Unreachable
from onehop.transport.inbound import Inbound
from onehop.transport.link import Link

SERVER = b"server-node-0001"
CALLER = b"caller-node-0001"


def reply_to(call: Call, body: bytes = b"reply") -> bytes:
    frame = wire.answer(wire.REPLY, 0, call.id, body)
    assert isinstance(frame, bytes)
    return frame


class ScriptedLink(LinkSocket):
    """A link's carrier end.

    Attributes:
        arrived: what the next looks will find. Putting something there signals nothing; :meth:`signal` does.
        sent: what was handed over.
        room: how many more frames it takes.
        looks: called at each look for a message, inside the link's lock; taken off once called.
        looked: how many looks there were.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.monitor_fd = self.fd
        self.arrived: deque[bytes] = deque()
        self.sent: list[Frame] = []
        self.room = 1_000_000
        self.looks: deque[Callable[[], Any]] = deque()
        self.looked = 0
        self.closed = False

    def signal(self) -> None:
        os.eventfd_write(self.fd, 1)

    def send(self, frame: Frame) -> bool:
        assert not self.closed
        if self.room <= 0:
            return False
        self.room -= 1
        self.sent.append(frame)
        return True

    def readable(self) -> bool:
        assert not self.closed
        self.looked += 1
        if self.looks:
            self.looks.popleft()()
        if not self.arrived:
            try:
                os.eventfd_read(self.fd)
            except BlockingIOError:
                pass
        return bool(self.arrived)

    def receive(self) -> tuple[bytes, bytes | memoryview | None] | None:
        return (self.arrived.popleft(), None) if self.arrived else None

    def ended(self) -> str | None:
        return None

    def close(self, linger: float = 0.0) -> None:
        self.closed = True


class LinkBench:
    """A link that is ready, on a scripted socket."""

    def __init__(self) -> None:
        self.socket = ScriptedLink()
        self.calls = CallTable()
        self.cold: list[bytes] = []
        self.link = Link(self.socket, self.calls, lambda link, frame: self.cold.append(frame))
        self.link.answered()

    def begin(self) -> tuple[Call, bytes]:
        """A registered call and its frame."""
        call = Call(wire.REQUEST)
        return call, wire.pack(wire.REQUEST, id=self.calls.begin(call))


@pytest.fixture
def bench() -> Iterator[LinkBench]:
    bench = LinkBench()
    yield bench
    bench.link.end("the test is over")
    os.close(bench.socket.fd)


class ScriptedInbound(InboundSocket):
    """An inbound socket's carrier end; see :class:`ScriptedLink`. ``sends`` are called at each sending."""

    endpoints = ("scripted://",)

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.arrived: deque[tuple[bytes, bytes]] = deque()
        self.sent: list[tuple[bytes, Frame]] = []
        self.gone: set[bytes] = set()
        self.full: set[bytes] = set()
        self.looks: deque[Callable[[], Any]] = deque()
        self.sends: deque[Callable[[], Any]] = deque()
        self.looked = 0
        self.closed = False

    def signal(self) -> None:
        os.eventfd_write(self.fd, 1)

    def send(self, identity: bytes, frame: Frame) -> bool:
        assert not self.closed
        if self.sends:
            self.sends.popleft()()
        if identity in self.gone:
            raise Unreachable
        if identity in self.full:
            return False
        self.sent.append((identity, frame))
        return True

    def readable(self) -> bool:
        assert not self.closed
        self.looked += 1
        if self.looks:
            self.looks.popleft()()
        if not self.arrived:
            try:
                os.eventfd_read(self.fd)
            except BlockingIOError:
                pass
        return bool(self.arrived)

    def receive(self) -> tuple[bytes, bytes, bytes | memoryview | None] | None:
        return (*self.arrived.popleft(), None) if self.arrived else None

    def close(self, linger: float) -> None:
        self.closed = True


class InboundBench:
    """An inbound socket with one connection that has said hello, on a scripted socket."""

    def __init__(self) -> None:
        self.socket = ScriptedInbound()
        self.inbox = Inbox(SERVER)
        self.inbound = Inbound(self.socket, self.inbox, lambda: None)
        self._number = 0
        self.arrive(wire.hello(Hello(CALLER, SERVER)))
        self.inbound.look(0.0)
        self.socket.sent.clear()

    def arrive(self, frame: Frame, identity: bytes = b"\0conn") -> None:
        assert isinstance(frame, bytes)
        self.socket.arrived.append((identity, frame))

    def request(self, service: str, method: str = "read", kind: int = wire.REQUEST) -> bytes:
        self._number += 1
        frame = wire.request(kind, 0, self._number, 60.0, None, wire.names(service, "", method), b"")
        assert isinstance(frame, bytes)
        return frame

    def kinds_sent(self) -> list[int]:
        return [wire.kind_of(frame if isinstance(frame, bytes) else frame[0]) for _, frame in self.socket.sent]


@pytest.fixture
def inbound_bench() -> Iterator[InboundBench]:
    bench = InboundBench()
    yield bench
    os.close(bench.socket.fd)
