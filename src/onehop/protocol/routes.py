"""Routes: an immutable picture of which usable peer offers what, and the choice among them.

The cold path builds a new picture at each change and puts it in the place of the old one as a whole; the hot path
reads it without a lock.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from onehop.protocol.peers import USABLE, Peer


class Route(NamedTuple):
    """One server of a service at one peer."""

    peer: Peer
    service: str
    server: str


class Routes:
    """Service, or service and server, to routes, in a stable order."""

    __slots__ = ("by_server", "by_service")

    def __init__(self, peers: Iterable[Peer] = ()) -> None:
        by_service: dict[str, list[Route]] = {}
        by_server: dict[tuple[str, str], list[Route]] = {}
        for peer in sorted(peers, key=lambda peer: peer.id):
            if peer.record is None or peer.state not in USABLE or peer.record.state != "serving":
                continue
            for service, servers in peer.record.services.items():
                for server in servers:
                    route = Route(peer, service, server)
                    by_service.setdefault(service, []).append(route)
                    by_server.setdefault((service, server), []).append(route)
        self.by_service = {service: tuple(routes) for service, routes in by_service.items()}
        self.by_server = {key: tuple(routes) for key, routes in by_server.items()}

    def of(self, service: str, server: str = "") -> tuple[Route, ...]:
        """All routes to ``service``; only those to ``server`` where one is named, never another's."""
        if server:
            return self.by_server.get((service, server), ())
        return self.by_service.get(service, ())

    def distinct(self, service: str, server: str = "") -> tuple[Route, ...]:
        """As :meth:`of`, each (peer, server) once: whom a fan-out addresses."""
        return tuple(dict.fromkeys(self.of(service, server)))


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
        return second
    return first
