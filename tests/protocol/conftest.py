"""Two cores joined by function calls: what one side sends, the other is given. No socket, no thread, no clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from onehop.interfaces import Record
from onehop.protocol import wire
from onehop.protocol.calls import Call
from onehop.protocol.inbox import Request
from onehop.protocol.node import NodeProtocol
from onehop.protocol.peers import Peer

CALLER = b"caller-node-0001"
SERVER = b"server-node-0001"
IDENTITY = b"\0conn"


class Queue:
    """Where an inbox puts requests: all it asks is how many wait."""

    def __init__(self, waiting: int = 0) -> None:
        self.waiting = waiting

    def __len__(self) -> int:
        return self.waiting


class Conversation:
    """A caller and a server, and the connection between them.

    Attributes:
        queue: where the server's inbox puts requests for service "clock" at server "a".
        news: calls that the caller heard of, in order.
        moved: requests that the server heard of, in order.
    """

    def __init__(self, **settings: Any) -> None:
        self.caller = NodeProtocol(CALLER, random=lambda: 0.5, host="h1", **settings)
        self.server = NodeProtocol(SERVER, random=lambda: 0.5, host="h2", **settings)
        self.queue = Queue()
        self.server.inbox.offer("clock", "a", self.queue)
        self.news: list[Call] = []
        self.moved: list[Request] = []
        self.caller.learn([self.record()])

    def offer(self, service: str, server: str) -> Queue:
        """One more instance at the server."""
        queue = Queue()
        self.server.inbox.offer(service, server, queue)
        return queue

    def record(self, **changes: Any) -> Record:
        fields: dict[str, Any] = {
            "node": SERVER.hex(), "host": "h2", "endpoints": ("ipc:///s",), "services": {"clock": ("a",)}, **changes
        }  # fmt: skip
        return Record(**fields)

    @property
    def peer(self) -> Peer:
        return self.caller.peers.peers[SERVER]

    @property
    def inbox(self):  # type: ignore[no-untyped-def]
        return self.server.inbox

    def carry(self, frame: wire.Frame, now: float = 0.0, identity: bytes = IDENTITY) -> None:
        """Give the server one message of the caller's."""
        head, body = (frame, None) if isinstance(frame, bytes) else frame
        self.inbox.receive(identity, head, body, now, self.moved)

    def carry_back(self, now: float = 0.0) -> int:
        """Give the caller what the server wants sent; returns how many of these frames made the peer ready."""
        outgoing, self.inbox.outgoing = self.inbox.outgoing, []
        return sum(self.deliver(frame, now) for _, frame in outgoing)

    def deliver(self, frame: wire.Frame, now: float = 0.0) -> bool:
        """Give the caller one message of the server's, as a link does."""
        head, body = (frame, None) if isinstance(frame, bytes) else frame
        if self.peer.calls.receive(head, body, self.news):
            return False
        return self.caller.control(self.peer, head, now, self.news)

    def connect(self, now: float = 0.0) -> None:
        """Open the connection: hello and its answer."""
        hello = self.caller.connect(self.peer, now)
        assert hello is not None
        self.carry(hello, now)
        assert self.carry_back(now) == 1

    def lose(self, now: float = 0.0) -> list[Call]:
        """Both sides hear that the connection ended; returns the caller's lost calls."""
        self.moved += self.inbox.gone(IDENTITY)
        return self.caller.lost(self.peer, "the connection ended", now)

    def begin(self, kind: int = wire.REQUEST, flags: int = 0, **details: Any) -> tuple[Call, wire.Frame]:
        """Register a request and make its frame; nothing is sent."""
        call = Call(kind, deadline=details.get("remaining", 60.0), size=len(details.get("body", b"")))
        return call, self.frame(self.peer.calls.begin(call), kind, flags, **details)

    def frame(
        self,
        id: int,
        kind: int = wire.REQUEST,
        flags: int = 0,
        *,
        remaining: float | None = 60.0,
        monitor: float | None = None,
        service: str = "clock",
        server: str = "",
        body: bytes = b"body",
    ) -> wire.Frame:
        return wire.request(kind, flags, id, remaining, monitor, wire.names(service, server, "read"), body)

    def request(self, kind: int = wire.REQUEST, flags: int = 0, now: float = 0.0, **details: Any) -> Call:
        """Begin a request and carry it to the server."""
        call, frame = self.begin(kind, flags, **details)
        self.carry(frame, now)
        return call

    def answer(self, request: Request, body: bytes = b"result", flags: int = 0, load: int = 0) -> None:
        """Answer a request that was taken in, and carry the reply back."""
        assert self.inbox.finish(request)
        self.deliver(wire.answer(wire.REPLY, flags, request.id, body, load))


@pytest.fixture
def converse() -> Callable[..., Conversation]:
    """A caller and a server that have said hello; settings as for NodeProtocol."""

    def begin(**settings: Any) -> Conversation:
        conversation = Conversation(**settings)
        conversation.connect()
        return conversation

    return begin


@pytest.fixture
def talk(converse: Callable[..., Conversation]) -> Conversation:
    """A caller and a server that have said hello."""
    return converse()


@pytest.fixture
def strangers() -> Conversation:
    """A caller and a server that know of each other and are not connected."""
    return Conversation()
