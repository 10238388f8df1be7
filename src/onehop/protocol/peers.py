"""Peers: what is known of other nodes, and one small state machine for each.

The table is the law: an event that a state does not list changes nothing. What does not fit a table stands below it
in this file. Called under the engine's node lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import blake2b
from itertools import count
from typing import Any, Protocol

from onehop.protocol.calls import CallTable

# States.
KNOWN = "known"  # its record is known; there is no connection
CONNECTING = "connecting"  # hello sent, not answered
READY = "ready"  # hello answered: it is the node the record names
DRAINING = "draining"  # it said goodbye: finishes what it took, takes nothing new
RESTING = "resting"  # the last connection failed; tried again after a pause
GONE = "gone"  # no record and no connection. A peer that returns is a new peer, with a new id

# Events.
CONNECT = "connect"
HELLO = "hello"
GOODBYE = "goodbye"
LOST = "lost"
RESTED = "rested"
FORGOTTEN = "forgotten"

TRANSITIONS: dict[str, dict[str, str]] = {
    KNOWN: {CONNECT: CONNECTING, FORGOTTEN: GONE},
    CONNECTING: {HELLO: READY, LOST: RESTING, GOODBYE: DRAINING},
    READY: {GOODBYE: DRAINING, LOST: RESTING},
    DRAINING: {LOST: GONE},
    RESTING: {RESTED: KNOWN, FORGOTTEN: GONE},
    GONE: {},
}
USABLE = frozenset((KNOWN, CONNECTING, READY))
"""The states in which a peer is a route."""

FIRST_PAUSE = 0.2
LONGEST_PAUSE = 10.0


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
        calls: calls under way to it; a new table for each connection, the numbers going on.
        distance: from this node, for choosing a subset: each node has its own order of all peers.
        link: the engine's connection object, or None.
        offered: its routes in the present picture.
    """

    __slots__ = ("calls", "distance", "failures", "id", "link", "numbers", "offered", "record", "rested_at", "state")

    def __init__(self, id: bytes, record: RecordLike | None, first: int = 1, *, distance: bytes = b"") -> None:
        self.id = id
        self.distance = distance
        self.record = record
        self.state = KNOWN
        self.numbers = count(first)
        self.calls = CallTable(self.numbers)
        self.calls.last = first - 1
        self.link: Any = None
        self.offered: tuple[Any, ...] = ()
        self.failures = 0
        self.rested_at = 0.0


class PeerTable:
    """All peers of one node, by node id.

    Args:
        node: this node's own id. It is a peer like any other: a service may call itself.
        random: a number in [0, 1) at each call; spreads the pauses after a failure.
    """

    def __init__(self, node: bytes, random: Callable[[], float]) -> None:
        self.node = node
        self.peers: dict[bytes, Peer] = {}
        self.resting: dict[bytes, Peer] = {}
        self._random = random
        self._highest = 0
        self._view: dict[str, RecordLike] = {}

    def learn(self, records: Iterable[RecordLike]) -> list[Peer]:
        """Take in the whole view of a registry; returns the peers of which something changed.

        A peer without a record is no route any more, but keeps its connection: what it took it may still answer.
        """
        before, self._view = self._view, {record.node: record for record in records if record.endpoints}
        changed = []
        for node, record in self._view.items():
            if before.get(node) is record:
                continue  # most records of a view are those of the last one: nothing to look at
            id = _node_id(node)
            if id is not None:
                peer = self._meet(id)
                peer.record = record
                changed.append(peer)
        for node in [node for node in before if node not in self._view]:
            gone = self.peers.get(_node_id(node) or b"")
            if gone is not None:
                gone.record = None
                self.event(gone, FORGOTTEN)
                changed.append(gone)
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
            distance = blake2b(self.node + id, digest_size=8).digest()
            peer = self.peers[id] = Peer(id, None, self._highest + 1, distance=distance)
        return peer

    def event(self, peer: Peer, event: str, now: float = 0.0) -> bool:
        """Apply ``event``; False when the peer's state does not know it, and nothing changed."""
        state = TRANSITIONS[peer.state].get(event)
        if state is None:
            return False
        peer.state = state
        if state == READY:
            peer.failures = 0
        elif state == RESTING:
            # Full jitter, so that those who lost one peer together do not return together.
            peer.failures += 1
            peer.rested_at = now + self._random() * min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(peer.failures, 10))
            if peer.record is None or not peer.record.services:
                peer.state = GONE
        if peer.state == RESTING:
            self.resting[peer.id] = peer
        else:
            self.resting.pop(peer.id, None)
        if event in (LOST, FORGOTTEN):
            old = peer.calls
            peer.calls = CallTable(peer.numbers, messages=old.messages, large_bytes=old.large_bytes)
            peer.calls.last, peer.calls.late = old.last, old.late
        if peer.state == GONE:
            # Its window knows our numbers for a while: should it return under this id, they must go on above them,
            # and above those that threads are drawing from the old table at this moment.
            self._highest = max(self._highest, peer.calls.last + peer.calls.messages)
            self.peers.pop(peer.id, None)
        return True

    def handle_timer(self, now: float) -> list[Peer]:
        """Let peers that have rested be tried again; returns them."""
        rested = [peer for peer in self.resting.values() if peer.rested_at <= now]
        for peer in rested:
            self.event(peer, RESTED, now)
        return rested


def _node_id(name: str) -> bytes | None:
    """The id that a record names; None where it is none."""
    try:
        id = bytes.fromhex(name)
    except ValueError:
        return None
    return id if len(id) == 16 and id.hex() == name else None
