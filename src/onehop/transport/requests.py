"""A request on its way: the terms it was made under, the attempt under way, and the sentences for how it can end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from time import monotonic

from onehop.errors import CallError, CallTimeout, NoRoute, PeerLost, Rejected
from onehop.protocol import wire
from onehop.protocol.calls import REJECTED, Call
from onehop.protocol.inbox import Request
from onehop.protocol.peers import Peer
from onehop.protocol.routes import Route, Routes
from onehop.protocol.wire import Body
from onehop.settings import Settings
from onehop.transport.link import Link

serving: ContextVar[Request | None] = ContextVar("onehop_serving", default=None)
"""The request that the running handler serves; calls made in it end no later."""


def _somewhere() -> Iterator[int]:
    """Numbers that grow, from a start of one's own: not everybody begins at the same server."""
    return count(int.from_bytes(os.urandom(2), "big"))


@dataclass(slots=True, eq=False)
class Terms:
    """What a client asks for with each of its requests, and whose turn it is.

    Args:
        service, server: whom; any server of the service where ``server`` is empty.
        timeout: seconds for everything.
        ready_timeout: seconds of these that may pass while nobody offers the service.
        monitor: seconds without a sign of life after which a call is given up; None for no such limit.
        idempotent: whether a request may be sent again after an unknown outcome; None asks the server's record.

    Attributes:
        direct: where there is one server only: the picture of routes in which it was found, the route, its link, and
            the addresses of its methods.
        milliseconds: ``timeout`` as it travels.
    """

    service: str
    server: str
    timeout: float
    ready_timeout: float
    monitor: float | None = None
    idempotent: bool | None = None
    turns: Iterator[int] = field(default_factory=_somewhere)
    direct: tuple[Routes | None, Route | None, Link | None, dict[str, bytes]] = (None, None, None, {})
    milliseconds: int = field(init=False)
    sections: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.milliseconds = wire.milliseconds(self.timeout)

    def section(self, server: str, method: str) -> bytes:
        """The address of ``method`` at ``server``, made once."""
        sections = self.sections.get(server) or self.sections.setdefault(server, {})
        section = sections.get(method)
        if section is None:
            if len(sections) > 4096:
                sections.clear()
            section = sections[method] = wire.names(self.service, server, method)
        return section

    def __str__(self) -> str:
        return f"service {self.service!r}" + (f" at server {self.server!r}" if self.server else "")


@dataclass(slots=True, eq=False)
class Attempt:
    """One request on its way to an outcome, from one server to the next.

    Args:
        until: the deadline; ``started``: when it began; both on this process's monotonic clock.

    Attributes:
        under_way: whether it has a call.
        chosen: where to go next, where that has been decided.
        route, link, call: of the server being tried now.
        tried: routes that failed in this round; ``error``: the last failure; ``pause``: seconds before another round.
        may_have_run: at a server tried before, which was lost.
        seconds: how long it took, where that is asked for.
    """

    terms: Terms
    method: str
    until: float
    started: float
    under_way: bool = False
    chosen: Route | None = None
    tried: tuple[Route, ...] = ()
    error: CallError | None = None
    may_have_run: bool = False
    pause: float = 0.05
    seconds: float = 0.0
    route: Route = field(init=False)
    link: Link = field(init=False)
    call: Call = field(init=False)

    def take(self, route: Route, link: Link, call: Call) -> None:
        """It goes to ``route`` now."""
        self.route, self.link, self.call, self.under_way = route, link, call, True
        call.route = route

    def __str__(self) -> str:
        return describe(self.method, self.terms, self.route)

    def patience(self) -> float:
        """Until when to wait for a sign of life."""
        monitor = self.terms.monitor
        return self.until if monitor is None else min(self.until, monotonic() + monitor)

    def window_full(self) -> Rejected:
        """There is no room for one more request to this peer."""
        return Rejected(
            f"{self}: {len(self.link.calls.pending)} requests are under way to it, as many as the window allows; "
            "slow down, or raise window_messages and window_bytes",
            reason="full",
        )

    def not_sent(self) -> PeerLost:
        """The link ended before the request was handed to it."""
        return PeerLost(f"{self} was lost: {self.link.ended}; it was not sent", executed="no")

    def timed_out(self) -> CallTimeout:
        """The deadline came, or the monitor's patience ended."""
        now, monitor = monotonic(), self.terms.monitor
        if monitor is not None and now < self.until:
            what = f"gave no sign of life for {monitor:.3g} s"
        else:
            what = f"did not answer within {now - self.started:.3g} s"
        return CallTimeout(f"{self} {what}", executed=self.call.executed)

    def failure(self) -> CallError:
        """The error for a call that ended as REJECTED or LOST."""
        call = self.call
        if call.outcome == REJECTED:
            reason, text = call.body
            told = f"{reason} ({text})" if text else reason
            return Rejected(f"{self} refused it: {told}", reason=reason, executed=call.executed)
        if call.executed == "no":
            return PeerLost(f"{self} was lost: {call.body}; it was not sent", executed="no")
        return PeerLost(f"{self} was lost: {call.body}; it is unknown whether it ran")

    def no_route(self, routes: Routes, settings: Settings, ready: float) -> CallError:
        """Nobody offered the service until ``ready``, or the deadline came first."""
        terms = self.terms
        if self.until <= ready:
            waited = self.until - self.started
            return CallTimeout(f"nobody offered {terms} before the deadline ({waited:.3g} s)", executed="no")
        servers = sorted({route.server for route in routes.of(terms.service)})
        known = ", ".join(map(repr, (servers if terms.server and servers else sorted(routes.by_service))[:8]))
        there_is = f"known {'servers' if terms.server and servers else 'services'}: {known or 'none at all'}"
        return NoRoute(
            f"nobody offers {terms} (waited {terms.ready_timeout:.3g} s); {there_is}. Is it started, with the same "
            f"registry ({settings.shown_registry!r}) and realm ({settings.realm!r})?"
        )


Parcel = tuple[Attempt, int, int, Body]
"""An attempt, and what is sent for it: kind, flags and body."""


def describe(method: str, terms: Terms, route: Route) -> str:
    """A request, for people."""
    return f"{method!r} of {terms}: {name_of(route.peer)}"


def name_of(peer: Peer) -> str:
    """A peer, for people."""
    where = "" if peer.record is None else f" on host {peer.record.host!r}"
    return f"node {peer.id.hex()[:8]}{where}"
