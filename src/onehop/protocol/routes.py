"""Routes: an immutable picture of which usable peer offers what, and the choice among them.

The cold path makes a new picture at each change and puts it in the place of the old one as a whole; the hot path
reads it without a lock.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from heapq import nsmallest
from typing import NamedTuple

from onehop.protocol.peers import STALLED, Peer


class Route(NamedTuple):
    """One server of a service at one peer."""

    peer: Peer
    service: str
    server: str


def routes_to(peer: Peer) -> tuple[Route, ...]:
    """What ``peer`` offers, if it is usable."""
    return offered_by(peer) if peer.usable else ()


def offered_by(peer: Peer) -> tuple[Route, ...]:
    """What ``peer`` offers."""
    record = peer.record
    if record is None or record.state != "serving":
        return ()
    return tuple(Route(peer, service, server) for service, servers in record.services.items() for server in servers)


class Routes:
    """Service, or service and server, to routes, in a stable order: by node id, then as in the record.

    Args:
        node: whose picture it is.
        subset: of a service's peers, how many a request may go to that names no server.
        by_service: each in that order.
    """

    __slots__ = ("_by_server", "_near", "by_service", "node", "subset")

    def __init__(
        self, node: bytes = b"", subset: int = 12, by_service: dict[str, tuple[Route, ...]] | None = None
    ) -> None:
        self.node = node
        self.subset = subset
        self.by_service = by_service or {}
        self._by_server: dict[tuple[str, str], tuple[Route, ...]] = {}
        self._near: dict[str | tuple[str, str], tuple[Route, ...]] = {}

    def of(self, service: str, server: str = "") -> tuple[Route, ...]:
        """All routes to ``service``; only those to ``server`` where one is named, never another's."""
        routes = self.by_service.get(service, ())
        if not server or not routes:
            return routes
        named = self._by_server.get((service, server))
        if named is None:
            named = tuple(route for route in routes if route.server == server)
            if named:  # kept as it is asked for: most services are never addressed by server
                self._by_server[service, server] = named
        return named

    def candidates(self, service: str, server: str = "") -> tuple[Route, ...]:
        """Where a request may go: to the server it names; or to some of the service's peers, always the same.

        Each node has a subset of its own, so that N callers and M servers need N x ``subset`` connections and not
        N x M. By rendezvous hashing: a peer that comes or goes moves nothing but its own share.
        """
        key = (service, server) if server else service
        near = self._near.get(key)
        if near is None:
            near = answering(self.of(service, server))
            peers = {route.peer.id: route.peer for route in near}
            if len(peers) > self.subset and not server:
                chosen = {peer.id for peer in nsmallest(self.subset, peers.values(), key=self._distance)}
                near = tuple(route for route in near if route.peer.id in chosen)
            if near:
                self._near[key] = near
        return near

    def untried(self, service: str, server: str, tried: Sequence[Route], *, beyond: bool = True) -> tuple[Route, ...]:
        """Of the candidates those not ``tried``; where each was, the same of all that the service has.

        Args:
            beyond: whether those outside the subset may be asked: not by one who was refused since there is too much
                to do, or everybody would connect to everybody just then.
        """
        near = self.candidates(service, server)
        if not tried:
            return near
        left = tuple(each for each in near if each not in tried)
        return left or answering(tuple(each for each in self.of(service, server) if beyond and each not in tried))

    def distinct(self, service: str, server: str = "") -> tuple[Route, ...]:
        """As :meth:`of`, each (peer, server) once: whom a fan-out addresses."""
        return tuple(dict.fromkeys(self.of(service, server)))

    def changed(self, peers: Iterable[Peer]) -> Routes:
        """The picture after a change of ``peers``; everything else stays as it is."""
        table = dict(self.by_service)
        gone: dict[str, dict[bytes, None]] = {}
        come: dict[str, list[Route]] = {}
        for peer in peers:
            offered = routes_to(peer)
            for route in peer.offered:
                gone.setdefault(route.service, {})[peer.id] = None
            for route in offered:
                come.setdefault(route.service, []).append(route)
            peer.offered = offered
        for service in {**gone, **come}:
            routes = list(table.get(service, ()))
            for id in gone.get(service, ()):
                del routes[bisect_left(routes, id, key=in_order) : bisect_right(routes, id, key=in_order)]
            for route in come.get(service, ()):
                insort(routes, route, key=in_order)
            if routes:
                table[service] = tuple(routes)
            else:
                del table[service]
        return Routes(self.node, self.subset, table)

    def _distance(self, peer: Peer) -> bytes:
        peer.distance = peer.distance or blake2b(self.node + peer.id, digest_size=8).digest()
        return peer.distance


def answering(routes: tuple[Route, ...]) -> tuple[Route, ...]:
    """Those of ``routes`` whose peers answer; all, where none does: better asked in vain than not at all."""
    return tuple(route for route in routes if route.peer.state != STALLED) or routes


def in_order(route: Route) -> bytes:
    return route.peer.id


def choose(routes: tuple[Route, ...], turn: int) -> Route:
    """The less loaded of the two routes whose turn it is; at equal load strictly the next.

    Args:
        routes: at least one.
        turn: a number that the caller raises by one at each choice.
    """
    first = routes[turn % len(routes)]
    if len(routes) == 1:
        return first
    second = routes[(turn + 1) % len(routes)]
    mine, theirs = first.peer.calls, second.peer.calls
    if mine is not theirs and len(theirs.pending) + theirs.load < len(mine.pending) + mine.load:
        # What a server reported fades, or one that was busy once would never be asked again.
        mine.load >>= 1
        return second
    return first
