"""Peers: what is known of other nodes, and one small state machine for each.

The table is the law: an event that a state does not list changes nothing. What does not fit a table stands below it
in this file. Called under the engine's node lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from typing import Any, Protocol

from onehop.protocol.calls import CallTable

# States.
KNOWN = "known"  # its record is known; there is no connection
CONNECTING = "connecting"  # hello sent, not answered
READY = "ready"  # hello answered: it is the node the record names
STALLED = "stalled"  # ready, and does not answer: asked only where nobody else can be
DRAINING = "draining"  # it said goodbye: finishes what it took, takes nothing new
RESTING = "resting"  # the last connection failed, or it came back and it is others' turn; tried after a pause
GONE = "gone"  # no record and no connection. A peer that returns is a new peer, with a new id

# Events.
CONNECT = "connect"
HELLO = "hello"
GOODBYE = "goodbye"
LOST = "lost"
IDLE = "idle"
REPLACED = "replaced"
SILENT = "silent"
ANSWERED = "answered"
HELD_BACK = "held back"
RESTED = "rested"
FORGOTTEN = "forgotten"

TRANSITIONS: dict[str, dict[str, str]] = {
    KNOWN: {CONNECT: CONNECTING, HELD_BACK: RESTING, FORGOTTEN: GONE},
    CONNECTING: {HELLO: READY, LOST: RESTING, REPLACED: RESTING, GOODBYE: DRAINING},
    READY: {GOODBYE: DRAINING, LOST: RESTING, REPLACED: RESTING, IDLE: KNOWN, SILENT: STALLED},
    STALLED: {GOODBYE: DRAINING, LOST: RESTING, REPLACED: RESTING, IDLE: KNOWN, ANSWERED: READY},
    DRAINING: {LOST: GONE, REPLACED: GONE, IDLE: GONE},
    RESTING: {CONNECT: CONNECTING, RESTED: KNOWN, FORGOTTEN: GONE},
    GONE: {},
}
USABLE = frozenset((KNOWN, CONNECTING, READY, STALLED))
"""The states in which a peer is a route; after a failure it is none again before a hello was answered."""

NEVER = float("-inf")
FIRST_PAUSE = 0.2
LONGEST_PAUSE = 10.0
"""Seconds; the bound of the pause after a failure doubles from the first to the longest."""
RETURNS_A_SECOND = 200
"""How many callers of one server connect again in a second after all of them lost it, or it started anew."""
SHORTEST_TURN = 0.25
"""Seconds; who need not wait longer for his turn does not wait: so few are no crowd."""
LONGEST_TURN = 60.0
"""Seconds that the last of a crowd waits for his turn, at most."""
HEIRS_AFTER = 60.0
"""Seconds after a loss in which a new peer under the name of the lost server is the same server, started anew."""
REPLACED_PAUSE = 60.0
"""Seconds until a record is tried again at whose address another node has answered."""


class RecordLike(Protocol):
    """What this module reads of :class:`onehop.interfaces.Record`."""

    @property
    def node(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def endpoints(self) -> tuple[str, ...]: ...
    @property
    def services(self) -> dict[str, tuple[str, ...]]: ...
    @property
    def idempotent(self) -> dict[str, tuple[str, ...]]: ...
    @property
    def relay(self) -> bool: ...


class Peer:
    """One other node.

    Attributes:
        record: the latest said of it; None once the registry has none.
        idempotent: of the latest record there was: by service, the methods that may run again.
        calls: calls under way to it; a new table for each connection, the numbers going on.
        distance: from this node, where a subset has to be chosen: each node has its own order of all peers.
        link: the engine's connection object, or None.
        features: that it has, as it said (wire 3.1).
        place: how many connections the peer had with our last one, as it said; 0 where it has not.
        offered: its routes in the present picture.
    """

    __slots__ = (
        "calls",
        "distance",
        "failures",
        "features",
        "id",
        "idempotent",
        "link",
        "offered",
        "place",
        "record",
        "rested_at",
        "state",
    )

    def __init__(self, id: bytes, record: RecordLike | None, first: int = 1) -> None:
        self.id = id
        self.distance = b""
        self.record = record
        self.idempotent: dict[str, tuple[str, ...]] = {}
        self.state = KNOWN
        self.calls = CallTable(count(first))
        self.calls.last = first - 1
        self.link: Any = None
        self.offered: tuple[Any, ...] = ()
        self.failures = 0
        self.features = 0
        self.place = 0
        self.rested_at = 0.0

    @property
    def usable(self) -> bool:
        """Whether requests that may go elsewhere may go here."""
        return self.state in (READY, STALLED) or (self.state in USABLE and not self.failures)

    @property
    def turn(self) -> float:
        """Seconds after which it is this node's turn, where all who were connected to the peer return at once."""
        return min(self.place / RETURNS_A_SECOND, LONGEST_TURN)


class PeerTable:
    """All peers of one node, by node id.

    Args:
        node: this node's own id. It is a peer like any other: a service may call itself.
        random: a number in [0, 1) at each call; spreads the pauses after a failure.
    """

    def __init__(self, node: bytes, random: Callable[[], float]) -> None:
        self.node = node
        self.peers: dict[bytes, Peer] = {}
        self.away: dict[bytes, Peer] = {}  # known, and no routes: they rest, or are tried again
        self.random = random
        self._highest = 0
        # Service and server that were lost: until when that counts, our turn, and the peer.
        self._lost: dict[tuple[str, str], tuple[float, float, Peer]] = {}
        self._view: dict[str, RecordLike] = {}

    def learn(self, records: Iterable[RecordLike], now: float = 0.0) -> list[Peer]:
        """Take in the whole view of a registry; returns the peers of which something changed.

        A peer without a record is no route any more, but keeps its connection: what it took it may still answer.
        One that comes in the place of a lost one is held back until it is our turn.
        """
        self._lost = {name: entry for name, entry in self._lost.items() if entry[0] > now}
        before, self._view = self._view, {record.node: record for record in records if record.endpoints}
        changed = []
        for node in [node for node in before if node not in self._view]:
            gone = self.peers.get(_node_id(node) or b"")
            if gone is not None:
                self._await_heir(gone, now)
                gone.record = None
                self.event(gone, FORGOTTEN)
                changed.append(gone)
        for node, record in self._view.items():
            if before.get(node) is record:
                continue  # most records of a view are those of the last one: nothing to look at
            id = _node_id(node)
            if id is not None:
                peer = self._meet(id)
                is_new, peer.record, peer.idempotent = peer.record is None, record, record.idempotent
                if is_new:
                    self._hold_back(peer, record, now)
                changed.append(peer)
        return changed

    def introduce(self, record: RecordLike) -> Peer:
        """The peer of ``record``, of which another node tells, and which names no service.

        Where the registry does not tell of it too, it is forgotten when its connection ends.
        """
        peer = self._meet(bytes.fromhex(record.node))
        if peer.state == KNOWN and peer.record is None:
            peer.record = record
        return peer

    def _meet(self, id: bytes) -> Peer:
        peer = self.peers.get(id)
        if peer is None:
            peer = self.peers[id] = Peer(id, None, self._highest + 1)
        return peer

    def _hold_back(self, peer: Peer, record: RecordLike, now: float) -> None:
        """If ``peer`` is a lost server started anew: those who lost it come back one after the other."""
        if not self._lost:
            return
        names = [(service, server) for service, servers in record.services.items() for server in servers]
        lost = [self._lost[name] for name in names if name in self._lost]
        turn = max((turn for until, turn, _ in lost if until > now), default=0.0)
        if turn >= SHORTEST_TURN:
            for _, _, old in lost:  # a crowd at the old address too, which is listed still, would double the attempts
                if old.state == RESTING:
                    old.rested_at = max(old.rested_at, now + REPLACED_PAUSE)
            peer.rested_at = now + turn
            self.event(peer, HELD_BACK, now)

    def expected(self, service: str, server: str) -> float:
        """When a peer that is held back, or was lost for the first time, and offers this, may be tried; else NEVER."""
        return min(
            (
                peer.rested_at
                for peer in self.away.values()
                if peer.state == RESTING
                and (not peer.failures or (peer.failures == 1 and peer.place))
                and peer.record is not None
                and (server in peer.record.services.get(service, ()) if server else service in peer.record.services)
            ),
            default=NEVER,
        )

    def event(self, peer: Peer, event: str, now: float = 0.0) -> bool:
        """Apply ``event``; False when the peer's state does not know it, and nothing changed."""
        state = TRANSITIONS[peer.state].get(event)
        if state is None:
            return False
        was_ready = peer.state in (READY, STALLED)
        if event == LOST:
            self._await_heir(peer, now)
        peer.state = state
        if state == READY:
            peer.failures = 0
        elif state == RESTING:
            if event == LOST:
                self._lose(peer, was_ready, now)
            elif event == REPLACED:
                peer.failures += 1
                peer.rested_at = now + REPLACED_PAUSE
        if event in (LOST, REPLACED, IDLE) and (peer.record is None or not peer.record.services):
            peer.state = GONE
        if peer.state == RESTING or (peer.state == CONNECTING and peer.failures):
            self.away[peer.id] = peer
        else:
            self.away.pop(peer.id, None)
        if event in (LOST, REPLACED, FORGOTTEN, IDLE):
            old = peer.calls
            peer.calls = CallTable(old.numbers, old.room)
            peer.calls.last, peer.calls.late = old.last, old.late
        if peer.state == GONE:
            # Its window knows our numbers for a while: should it return under this id, they must go on above them,
            # and above those that threads are drawing from the old table at this moment.
            self._highest = max(self._highest, peer.calls.last + peer.calls.room.messages)
            self.peers.pop(peer.id, None)
        return True

    def _await_heir(self, peer: Peer, now: float) -> None:
        """If we are connected to ``peer``: who comes under its names soon is the same server, started anew."""
        if peer.state in (READY, STALLED, DRAINING) and peer.turn and peer.record is not None:
            for service, servers in peer.record.services.items():
                self._lost |= {(service, server): (now + HEIRS_AFTER, peer.turn, peer) for server in servers}

    def _lose(self, peer: Peer, was_ready: bool, now: float) -> None:
        """Say when ``peer`` may be tried again: those who lost it together must not return together.

        First in the order in which they came, so that they are back soon and never a crowd; and with full jitter, more
        and more of it, as long as that fails. Two turns are waited for: where the server was started anew, the registry
        has told of it in one, even if it had to be found again itself, and nobody goes to the old address.
        """
        peer.failures += 1
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(peer.failures, 10))
        if was_ready:
            peer.rested_at = now + 2 * peer.turn + self.random() * pause
        else:
            peer.rested_at = now + self.random() * max(pause, 2 * peer.turn)

    def due(self, now: float) -> list[Peer]:
        """Those whose pause, or wait for their turn, is over."""
        return [peer for peer in self.away.values() if peer.state == RESTING and peer.rested_at <= now]


def _node_id(name: str) -> bytes | None:
    """The id that a record names; None where it is none."""
    try:
        id = bytes.fromhex(name)
    except ValueError:
        return None
    return id if len(id) == 16 and id.hex() == name else None
