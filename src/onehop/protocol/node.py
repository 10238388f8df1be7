"""One node's decisions together: peers, routes and the inbox, and what a link says that is not for a call.

The blocking and asyncio engines, the conformance suite and the simulation all drive this one object. The two halves
have a lock each in the engine: ``inbox`` that of the inbound socket, everything else the node's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from onehop.errors import ProtocolError, VersionMismatch, WireError
from onehop.protocol import peers as states
from onehop.protocol import wire
from onehop.protocol.budget import Budget
from onehop.protocol.calls import Call, room_for
from onehop.protocol.inbox import Inbox
from onehop.protocol.peers import Peer, PeerTable, RecordLike
from onehop.protocol.routes import Route, Routes, in_order, offered_by


class NodeProtocol:
    """The sans-IO whole of a node.

    Args:
        node: the node id, 16 bytes, never used before.
        random: a number in [0, 1) at each call.
        messages, size: room of the inbox.
        window_messages, window_bytes: room of each link.
        reach: of the duplicate windows.
        subset: of a service's peers, how many a request may go to that names no server.
    """

    def __init__(
        self,
        node: bytes,
        *,
        random: Callable[[], float],
        host: str = "",
        realm: str = "",
        release: str = "",
        messages: int = 10_000,
        size: int = 1 << 28,
        window_messages: int = 4096,
        window_bytes: int = 1 << 23,
        reach: int = 4096,
        subset: int = 12,
    ) -> None:
        self.id = node
        self.host = host
        self.realm = realm
        self.release = release
        self.peers = PeerTable(node, random)
        self.routes = Routes(node, subset)
        self.inbox = Inbox(node, realm=realm, host=host, messages=messages, size=size, reach=reach, release=release)
        self.budget = Budget()
        self._room = room_for(window_messages, window_bytes)

    def learn(self, records: Iterable[RecordLike], now: float = 0.0) -> None:
        """Take in a registry's whole view."""
        self._update(self.peers.learn(records, now))

    def _update(self, peers: list[Peer]) -> None:
        if peers:
            self.routes = self.routes.changed(peers)

    def connect(self, peer: Peer, now: float) -> wire.Frame | None:
        """A connection to ``peer`` is being opened: returns the hello to send first; None if it is not to be."""
        if not self.peers.event(peer, states.CONNECT, now):
            return None
        if not peer.offered:
            self._update([peer])
        peer.calls.room = self._room
        return wire.hello(wire.Hello(
            self.id, peer.id, features=wire.FEATURES, first=peer.calls.last + 1,
            host=self.host, realm=self.realm, release=self.release,
        ))  # fmt: skip

    def control(self, peer: Peer, frame: bytes, now: float, ended: list[Call]) -> bool:
        """Take in a frame from ``peer`` that is for no call; True when it makes the peer ready.

        Appends to ``ended`` the calls that it ends: those under way at a final goodbye did not run.

        Raises:
            WireError: the frame breaks the wire format.
            VersionMismatch, ProtocolError: this peer cannot be talked to; its connection must be given up.
        """
        head = wire.header(frame)
        if head.kind == wire.HELLO:
            hello = wire.parse_hello(frame)
            if hello.oldest > wire.VERSION or hello.version < wire.OLDEST:
                raise VersionMismatch(
                    f"node {peer.id.hex()} on {hello.host!r} speaks wire versions {hello.oldest} to {hello.version}, "
                    f"this node {wire.OLDEST} to {wire.VERSION}; upgrade the older of the two"
                )
            if hello.node != peer.id or hello.realm != self.realm:
                raise ProtocolError(
                    f"the address of node {peer.id.hex()} answers as node {hello.node.hex()} of realm {hello.realm!r}"
                )
            peer.place, peer.features = head.number, hello.features
            is_ready = self.peers.event(peer, states.HELLO, now)
            if not peer.offered:
                self._update([peer])
            return is_ready
        if head.kind == wire.GOODBYE:
            if self.peers.event(peer, states.GOODBYE, now):
                self._update([peer])
            if head.flags & wire.FINAL:
                ended.extend(peer.calls.refuse("draining"))
        elif head.kind != wire.PING:  # a probe asks nothing of us (wire 3.12)
            raise WireError(f"kind {head.kind} does not go from a server to a caller")
        return False

    def lost(self, peer: Peer, why: str, now: float, event: str = states.LOST) -> list[Call]:
        """The connection to ``peer`` ended: its calls end as LOST; returns them.

        Args:
            event: REPLACED where another node answered at its address, IDLE where it was not used.
        """
        calls = peer.calls.lose(why)
        self.peers.event(peer, event, now)
        self._update([peer])
        return calls

    def judged(self, peer: Peer, answers: bool, now: float) -> bool:
        """``peer`` answers again, or does not; whether that is news."""
        is_news = self.peers.event(peer, states.ANSWERED if answers else states.SILENT, now)
        if is_news:
            self._update([peer])
        return is_news

    def may_retry(self, now: float) -> bool:
        """Whether one more request may be sent again, by the budget."""
        return self.budget.spend(self.peers.peers.values(), now)

    def receivers(self, service: str, server: str = "") -> tuple[Route, ...]:
        """Whom a fan-out addresses: all who are known, also those who cannot be reached at this moment."""
        routes = self.routes.distinct(service, server)
        away = [
            route for peer in self.peers.away.values() for route in offered_by(peer)
            if route.service == service and server in ("", route.server)
        ]  # fmt: skip
        return tuple(sorted(dict.fromkeys((*routes, *away)), key=in_order)) if away else routes

    def handle_timer(self, now: float) -> list[Peer]:
        """Let peers be routes again whose turn has come; returns those to connect to now.

        These were lost, and have rested; or came in the place of such a one. Who left the latter to the next request
        would come together with those whose turn is then: twice as many in a second, where all ask now and then.
        """
        due = self.peers.due(now)
        fresh = [peer for peer in due if not peer.failures]
        for peer in fresh:
            self.peers.event(peer, states.RESTED, now)
        self._update(fresh)
        return [peer for peer in due if peer.failures or self._is_near(peer)]

    def _is_near(self, peer: Peer) -> bool:
        """Whether a request that names no server may go to ``peer``; one outside the subset is seldom called."""
        return any(route in self.routes.candidates(route.service) for route in peer.offered)
