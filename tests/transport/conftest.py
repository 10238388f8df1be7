"""Sockets that do as the test says, at the moment it says."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from onehop.protocol import wire
from onehop.protocol.calls import Call, CallTable
from onehop.protocol.inbox import Inbox, Message
from onehop.protocol.wire import Body, Frame, Hello
from onehop.transport.blocking import BlockingLink
from onehop.transport.carrier import InboundSocket, LinkSocket
from onehop.transport.inbound import Inbound
from onehop.transport.queue import Queue
from onehop.transport.waiting import Wake

SERVER = b"server-node-0001"
CALLER = b"caller-node-0001"


def reply_to(call: Call, body: bytes = b"reply") -> bytes:
    frame = wire.answer(wire.REPLY, 0, call.id, body)
    assert isinstance(frame, bytes)
    return frame


def look(socket: ScriptedLink | ScriptedInbound, limit: int, take: Callable[[Any], None]) -> bool:
    """What both ends do when they are drained."""
    socket.looked += 1
    if socket.looks:
        socket.looks.popleft()()
    taken = 0
    while True:
        while socket.arrived and taken < limit:
            take(socket.arrived.popleft())
            taken += 1
        if socket.arrived or (taken == limit and not socket.foresees):
            more = True
            break
        try:
            os.eventfd_read(socket.fd)
        except BlockingIOError:
            pass
        if not socket.arrived:  # looked at after the edge was eaten: something may have come in between
            more = False
            break
    if socket.found:
        socket.found.popleft()()
    return more


class ScriptedLink(LinkSocket):
    """A link's carrier end.

    Args:
        foresees: whether a look that takes the last message says that nothing is left, or leaves that to the next.

    Attributes:
        arrived: what the next looks will find. Putting something there signals nothing; :meth:`signal` does.
        sent: what was handed over.
        room: how many more frames it takes.
        looks: called at the beginning of each look, inside the link's lock; taken off once called.
        found: the same, at the end of each look, when what was there has been taken.
        looked: how many looks there were.
        limits: the limit of each of them.
        waits: the milliseconds of each exchange.
    """

    def __init__(self, foresees: bool = True) -> None:
        self.foresees = foresees
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.monitor_fd = self.fd
        self.arrived: deque[bytes] = deque()
        self.sent: list[Frame] = []
        self.room = 1_000_000
        self.looks: deque[Callable[[], Any]] = deque()
        self.found: deque[Callable[[], Any]] = deque()
        self.looked = 0
        self.limits: list[int] = []
        self.waits: list[int] = []
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

    def send_large(self, head: bytes, body: Body) -> bool:
        return self.send((head, body))

    def drain(self, limit: int, into: list[tuple[bytes, Body | None]]) -> bool:
        assert not self.closed
        self.limits.append(limit)
        return look(self, limit, lambda frame: into.append((frame, None)))

    def exchange(self, frame: bytes, wake: Wake, milliseconds: int, into: list[tuple[bytes, Body | None]]) -> bool:
        self.waits.append(milliseconds)
        return LinkSocket.exchange(self, frame, wake, milliseconds, into)

    def ended(self) -> str | None:
        return None

    def close(self, linger: float = 0.0) -> None:
        self.closed = True


class LinkBench:
    """A link that is ready, on a scripted socket."""

    def __init__(self, foresees: bool = True) -> None:
        self.socket = ScriptedLink(foresees)
        self.calls = CallTable()
        self.cold: list[bytes] = []
        self.link = BlockingLink(self.socket, self.calls, lambda link, frame: self.cold.append(frame))
        self.link.answered()

    def begin(self) -> tuple[Call, bytes]:
        """A registered call and its frame."""
        call = Call(wire.REQUEST)
        return call, wire.pack(wire.REQUEST, id=self.calls.begin(call))


@pytest.fixture(params=[True, False], ids=["at once", "at the next look"])
def bench(request: pytest.FixtureRequest) -> Iterator[LinkBench]:
    """A link, over either kind of carrier: one that says at once when nothing is left, and one that has to look."""
    bench = LinkBench(request.param)
    yield bench
    bench.link.end("the test is over")
    os.close(bench.socket.fd)


class ScriptedInbound(InboundSocket):
    """An inbound socket's carrier end; see :class:`ScriptedLink`. ``sends`` are called at each sending."""

    endpoints = ("scripted://",)

    def __init__(self, foresees: bool = True) -> None:
        self.foresees = foresees
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.arrived: deque[tuple[bytes, bytes]] = deque()
        self.sent: list[tuple[bytes, Frame]] = []
        self.gone: set[bytes] = set()
        self.full: set[bytes] = set()
        self.looks: deque[Callable[[], Any]] = deque()
        self.found: deque[Callable[[], Any]] = deque()
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
            raise ConnectionResetError
        if identity in self.full:
            return False
        self.sent.append((identity, frame))
        return True

    def send_large(self, identity: bytes, head: bytes, body: Body) -> bool:
        return self.send(identity, (head, body))

    def drain(self, limit: int, into: list[Message]) -> bool:
        assert not self.closed
        return look(self, limit, lambda message: into.append((*message, None)))

    def close(self, linger: float) -> None:
        self.closed = True


class InboundBench:
    """An inbound socket with one connection that has said hello, on a scripted socket."""

    def __init__(self, foresees: bool = True) -> None:
        self.socket = ScriptedInbound(foresees)
        self.inbox = Inbox(SERVER)
        self.inbound = Inbound(self.socket, self.inbox, lambda: None)
        self.queues: list[Queue] = []
        self._number = 0
        self.arrive(wire.hello(Hello(CALLER, SERVER)))
        self.inbound.look(0.0)
        self.socket.sent.clear()

    def offer(self, service: str, queue: Queue | None = None) -> Queue:
        """Take requests for ``service`` into ``queue``, as the engine does."""
        queue = Queue() if queue is None else queue
        queue.inbound = self.inbound
        self.queues.append(queue)
        self.inbound.change(Inbox.offer, service, "a", queue)
        return queue

    def arrive(self, frame: Frame, identity: bytes = b"\0conn") -> None:
        assert isinstance(frame, bytes)
        self.socket.arrived.append((identity, frame))

    def request(self, service: str, method: str = "read", kind: int = wire.REQUEST, flags: int = 0) -> bytes:
        self._number += 1
        frame = wire.request(kind, flags, self._number, 60.0, None, wire.names(service, "", method), b"")
        assert isinstance(frame, bytes)
        return frame

    def kinds_sent(self) -> list[int]:
        return [wire.kind_of(frame if isinstance(frame, bytes) else frame[0]) for _, frame in self.socket.sent]


@pytest.fixture(params=[True, False], ids=["at once", "at the next look"])
def inbound_bench(request: pytest.FixtureRequest) -> Iterator[InboundBench]:
    """An inbound socket, over either kind of carrier; see :func:`bench`."""
    bench = InboundBench(request.param)
    yield bench
    for queue in bench.queues:
        queue.stop()
    if not bench.socket.closed:
        bench.inbound.close(0.0)
    os.close(bench.socket.fd)
