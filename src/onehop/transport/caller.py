"""The asking half of an engine: the peers that the registry tells of, the links to them, and the story of a request.

What is decided here is asked of ``protocol/``; what is not decided here is how to wait: ``blocking.py`` waits in the
caller's thread, ``loop.py`` in an asyncio loop. So that the story of a request is told once, whatever waits is a
coroutine. In threads its waits wait in place and it never suspends: it is through after one step
(:func:`onehop.transport.blocking.run`). The ordinary request needs none of that; see :meth:`Caller.begin`.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from time import monotonic
from typing import Any, NoReturn

from onehop import errors
from onehop.interfaces import Record, Registry
from onehop.protocol import wire
from onehop.protocol.calls import FAILED, LOST, REJECTED, REPLIED, TAKEN, Call, CallTable
from onehop.protocol.node import NodeProtocol
from onehop.protocol.peers import LOST as LOST_PEER
from onehop.protocol.peers import REPLACED, Peer
from onehop.protocol.routes import Route, Routes, choose
from onehop.protocol.wire import Body
from onehop.settings import Settings
from onehop.transport.carrier import Carrier, LinkSocket
from onehop.transport.link import Link
from onehop.transport.requests import Attempt, Parcel, Terms, name_of, serving
from onehop.transport.tree import Tree
from onehop.transport.waiting import Wake

HANDSHAKE = 5.0
"""Seconds a peer has to answer a hello."""
CASTS_UNDER_WAY = 64
"""Of one stream of casts, sent and not acknowledged."""
HURRY = 1.0
"""Seconds a peer has to answer a hello before another is asked, where there is another."""
BRIEF = 0.02
"""Seconds that a fan-out gives one silent peer before it looks after the next."""
PATIENCE = 1.0
"""Seconds that a registry may take to say who offers a service, at the first request for it."""
WELL = (REPLIED, FAILED, TAKEN)
"""Outcomes that are no error of the call's own."""


class Caller(ABC):
    """The half of an engine that knows the peers, connects to them and asks them. See the module.

    Args:
        settings: of the node.
        carrier: makes the sockets.
        registry: says where other nodes are. The engine owns it.
        release: the version of onehop.
    """

    def __init__(self, settings: Settings, carrier: Carrier, registry: Registry, release: str) -> None:
        self.settings = settings
        self.carrier = carrier
        self.registry = registry
        self.closed = False
        self.lock = threading.RLock()
        self.protocol = NodeProtocol(
            os.urandom(16),
            random=lambda: int.from_bytes(os.urandom(4), "big") / 2**32,
            host=settings.host_name,
            realm=settings.realm,
            release=release,
            messages=settings.inbox_messages,
            size=settings.inbox_bytes,
            window_messages=settings.window_messages,
            window_bytes=settings.window_bytes,
            reach=settings.duplicate_window,
            subset=settings.subset,
        )
        self.records: tuple[Record, ...] = ()
        self.outcomes: Counter[str] = Counter()
        self._links: dict[bytes, Link] = {}
        self._ended_links: list[Link] = []
        self._listeners: list[Callable[[], None]] = []
        self._wake = Wake()
        self._keeping = False
        self.tree = Tree(self)
        self._wanted: set[str] = set()

    def start(self) -> None:
        """Watch the registry. Called once, before anything else.

        Raises:
            RegistryError: the registry cannot be used.
        """
        self.registry.watch(self._learn)

    # What the registry says -----------------------------------------------------------------------

    def _learn(self, records: Sequence[Record]) -> None:
        with self.lock:
            if self.closed:
                return
            self.records = tuple(records)
            self.protocol.learn(records, monotonic())
            self._tell_change()
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    async def want(self, service: str, until: float) -> None:
        """See that the view has all who offer ``service`` (``""``: any), as far as the registry knows them.

        Args:
            until: when not to wait any longer, which may be past already; a registry is given a moment all the same.
        """
        if service not in self._wanted:
            patience = min(max(until - monotonic(), BRIEF), PATIENCE)
            await self._cold(self.registry.want, service, patience)
            self._wanted.add(service)

    async def known(self, service: str) -> tuple[Record, ...]:
        """The records of those who offer ``service``, and perhaps of others; ``""``: of all."""
        await self.want(service, monotonic() + PATIENCE)
        await self._cold(self.registry.refresh)
        return self.records

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have ``listener`` called after each change of the view."""
        with self.lock:
            self._listeners.append(listener)

    # How to wait ----------------------------------------------------------------------------------

    @abstractmethod
    def _new_link(self, socket: LinkSocket, calls: CallTable, control: Callable[[Link, bytes], None]) -> Link:
        """A link whose calls are waited for in this engine's way."""

    @abstractmethod
    async def wait(self, link: Link, call: Call, seen: int, until: float) -> bool:
        """Wait until ``call`` has an outcome or a sign beyond ``seen``; False when ``until`` came first."""

    @abstractmethod
    async def wait_for(self, condition: Callable[[], bool], until: float) -> bool:
        """Wait until ``condition`` (asked after each change of the view) holds; False when ``until`` came first."""

    @abstractmethod
    async def _sleep(self, seconds: float) -> None:
        """Let a moment pass."""

    @abstractmethod
    def spawn(self, steps: Coroutine[Any, Any, None]) -> None:
        """Have ``steps`` done beside everything else.

        Raises:
            RuntimeError: the machine gives no more threads.
        """

    @abstractmethod
    async def _cold(self, action: Callable[..., object], *arguments: Any) -> None:
        """Do something that may take its time: with files, or with the registry."""

    @abstractmethod
    def _tell_change(self) -> None:
        """Have those who :meth:`wait_for` something ask again. Called by any thread, which holds ``lock``."""

    @abstractmethod
    def _keep(self) -> None:
        """See that somebody keeps house, and does it now."""

    async def _wait_for_change(self, routes: Routes, until: float) -> None:
        """Wait until ``routes`` is not the picture any more."""
        await self.wait_for(lambda: self.protocol.routes is not routes, until)

    # Links ----------------------------------------------------------------------------------------

    def _begin_link(self, peer: Peer) -> Link:
        """The link to ``peer``, begun if there is none; does not wait for it to be ready.

        Raises:
            PeerLost: it cannot be begun; nothing was sent.
            ResourceLimit: the machine has no room for it, or no thread for the housekeeping.
        """
        if not self._keeping:
            self._keep()
        with self.lock:
            if self.closed:
                raise errors.NodeClosed("this node is closed; make a new one")
            link: Link | None = peer.link
            if link is not None and link.ended is None:
                return link
            record = peer.record
            hello = self.protocol.connect(peer, monotonic()) if record is not None else None
            if hello is None or record is None:
                raise errors.PeerLost(f"node {peer.id.hex()} is {peer.state}: not connected to", executed="no")
            try:
                socket = self.carrier.connect(self.carrier.nearest(record.endpoints))
            except errors.OnehopError as error:
                self.protocol.lost(peer, "no connection could be begun", monotonic())
                if isinstance(error, errors.ResourceLimit):
                    raise
                raise errors.PeerLost(f"{name_of(peer)}: {error}", executed="no") from error
            except BaseException:  # an interrupt; or an endpoint that no system could have
                self.protocol.lost(peer, "no connection could be begun", monotonic())
                raise
            why = socket.ended()  # the monitor's descriptor tells nothing before a first look
            link = peer.link = self._new_link(socket, peer.calls, self._control)
            link.peer = peer
            self._links[peer.id] = link
        if why is not None:
            self._lost(peer, link, why)
        link.post(link.hello, hello)
        return link

    async def _connect(self, peer: Peer, until: float, patience: float) -> Link:
        """The ready link to ``peer``.

        Args:
            patience: seconds after which another is to be asked, while this one may still answer its hello.

        Raises:
            PeerLost, CallTimeout: it did not become ready; nothing was sent.
        """
        link = self._begin_link(peer)
        await self._await_hello(link, min(until, monotonic() + patience))
        if link.hello.outcome == REPLIED:
            return link
        if link.hello.outcome is None and monotonic() < min(until, link.began + HANDSHAKE):
            raise errors.PeerLost(f"{name_of(peer)} has not answered the hello for {patience:g} s", executed="no")
        if link.hello.outcome is None and monotonic() >= until:
            raise errors.CallTimeout(f"{name_of(peer)} did not answer the hello before the deadline", executed="no")
        why = self._not_ready(link)
        raise errors.PeerLost(f"no connection to {name_of(peer)}: {link.error or why}", executed="no") from link.error

    def _not_ready(self, link: Link) -> str:
        """The hello of ``link`` was refused, or not answered in time: it is over; returns why."""
        why, event = link.ended or "it did not answer the hello", LOST_PEER
        if link.hello.outcome == REJECTED:
            why = "{}: {}".format(*link.hello.body)
            if link.hello.body[0] == "wrong node":
                event = REPLACED
        self._lost(link.peer, link, why, event)
        return why

    async def _await_hello(self, link: Link, until: float) -> bool:
        """Wait until the hello has an outcome, for as long as a peer has to answer it; whether it has."""
        if link.hello.outcome is None:
            await self.wait(link, link.hello, 0, min(until, link.began + HANDSHAKE))
        return link.hello.outcome is not None

    def _control(self, link: Link, frame: bytes) -> None:
        """A frame that is for no call."""
        peer: Peer = link.peer
        ended: list[Call] = []
        try:
            with self.lock:
                ready = self.protocol.control(peer, frame, monotonic(), ended)
                self._tell_change()
        except errors.WireError:
            raise
        except errors.ProtocolError as error:
            link.error = error
            self._lost(peer, link, str(error), REPLACED)
            return
        link.tell(ended)
        if ready:
            link.answered()

    def _lost(self, peer: Peer, link: Link, why: str, event: str = LOST_PEER) -> None:
        """The connection is over. Its calls end; the socket is closed by the housekeeping."""
        if not link.end(why):
            return
        with self.lock:
            if peer.link is link:
                peer.link = None
                self.protocol.lost(peer, why, monotonic(), event)
            self._links.pop(peer.id, None)
            self._ended_links.append(link)
            self._tell_change()
        self._wake.set()

    # Requests -------------------------------------------------------------------------------------

    def begin(
        self, terms: Terms, kind: int, flags: int, method: str, body: Body
    ) -> tuple[Any, Call, wire.Frame] | Attempt:
        """Begin a request: the first step, which does not wait.

        Returns:
            Where nothing is out of the ordinary, a registered call and the frame to be sent over a ready link. Else
            an attempt, for :meth:`carry_through`.

        Raises:
            NodeClosed, TooLarge: it cannot be sent at all.
        """
        size = len(body)
        if size > self.settings.max_message or self.closed:
            self._refuse(terms, method, size)
        now = monotonic()
        until, remaining = now + terms.timeout, terms.milliseconds
        request = serving.get()
        if request is not None and request.deadline is not None and request.deadline < until:
            until = request.deadline  # a call made in a handler ends no later than what it serves
            remaining = wire.milliseconds(until - now)
        picture = self.protocol.routes
        route: Route | None
        link: Link | None
        seen, route, link, sections = terms.direct
        if seen is not picture:
            route, link, sections = self._look_up(terms, picture)
        if (
            link is not None and route is not None and link.ready and size < wire.SECOND_FRAME_FROM
            and len(link.calls.pending) < link.calls.messages and (terms.monitor is None or kind != wire.REQUEST)
        ):  # fmt: skip
            section = sections.get(method) or sections.setdefault(method, terms.section(route.server, method))
            call = Call(kind, until, size)
            call.route = route
            if flags & wire.STREAM:
                call.items = deque()
            id = link.calls.begin(call)
            if link.ended is None or not link.calls.give_up(call):
                return link, call, wire.plain_request(kind, flags, id, remaining, section, body)
        attempt = Attempt(terms, method, until, now)
        attempt.chosen = route
        return attempt

    def _look_up(self, terms: Terms, picture: Routes) -> tuple[Route | None, Link | None, dict[str, bytes]]:
        """Whose turn it is; where that is always the same until the picture changes, it is remembered."""
        routes = picture.candidates(terms.service, terms.server)
        if not routes:
            return None, None, {}
        route = routes[0] if len(routes) == 1 else choose(routes, next(terms.turns))
        link: Link | None = route.peer.link
        sections = terms.sections.setdefault(route.server, {})
        if len(routes) == 1 and link is not None and link.ready:
            terms.direct = picture, route, link, sections
        return route, link, sections

    def attempt(self, terms: Terms, method: str, link: Link, call: Call) -> Attempt:
        """What :meth:`begin` began, for a closer look."""
        attempt = Attempt(terms, method, call.deadline, call.deadline - terms.timeout)
        attempt.take(call.route, link, call)
        return attempt

    async def start_request(self, terms: Terms, kind: int, flags: int, method: str, body: Body) -> Attempt:
        """Send a request to one server, and leave its outcome to :meth:`outcome`; it is not tried at another.

        Raises:
            NoRoute, Rejected, CallTimeout, PeerLost, TooLarge: it could not be sent.
        """
        begun = self.begin(terms, kind, flags, method, body)
        if type(begun) is tuple:
            link, call, frame = begun
            link.post(call, frame)
            return self.attempt(terms, method, link, call)
        assert isinstance(begun, Attempt)
        await self._send(begun, kind, flags, body)
        return begun

    async def cast_all(self, terms: Terms, method: str, bodies: Iterable[bytes]) -> None:
        """Send one cast for each body, some of them under way at a time, and wait until all are taken in.

        A server that is full is waited for, each cast until its deadline.

        Raises:
            NoRoute, Rejected, CallTimeout, PeerLost: one was not taken in; of those behind it nothing is known.
        """
        under_way: deque[tuple[Attempt, bytes]] = deque()
        for body in bodies:
            under_way.append((await self.start_request(terms, wire.CAST, 0, method, body), body))
            if len(under_way) >= CASTS_UNDER_WAY:
                await self._settle(*under_way.popleft())
        while under_way:
            await self._settle(*under_way.popleft())

    async def _settle(self, attempt: Attempt, body: bytes) -> None:
        pause, until = 0.001, attempt.until
        while True:
            try:
                await self.carry_through(attempt, wire.CAST, 0, body, under_way=True)
                return
            except errors.Rejected as error:
                if error.reason != "full" or monotonic() + pause >= until:
                    raise
            await self._sleep(pause)
            pause = min(pause * 2, 0.1)
            attempt = await self.start_request(attempt.terms, wire.CAST, 0, attempt.method, body)
            attempt.until = until

    async def carry_through(
        self, attempt: Attempt, kind: int, flags: int, body: Body, *, under_way: bool = False
    ) -> Call:
        """See a request through to its outcome: REPLIED, FAILED or TAKEN.

        Tries another server where one certainly did not run it, and (for idempotent methods) where it is unknown,
        inside the deadline.

        Args:
            under_way: whether its call has been sent (and waited for) already.

        Raises:
            NoRoute, Rejected, CallTimeout, PeerLost, TooLarge: as their docstrings say.
        """
        while True:
            if not under_way:
                await self._send(attempt, kind, flags, body)
            under_way = False
            try:
                await self.outcome(attempt)
            except errors.CallTimeout:
                raise
            except errors.CallError as error:
                self._again(attempt, error)
                continue
            except BaseException:
                self.cancel(attempt.link, attempt.call)
                raise
            return attempt.call

    async def _send(self, attempt: Attempt, kind: int, flags: int, body: Body) -> None:
        """Send a request to the next server that can be reached; does not wait for its outcome."""
        while True:
            route, attempt.chosen = attempt.chosen or await self._find(attempt), None
            try:
                await self._send_to(route, attempt, kind, flags, body)
                return
            except (errors.PeerLost, errors.CallTimeout) as failure:
                self._again(attempt, failure)

    async def _send_to(self, route: Route, attempt: Attempt, kind: int, flags: int, body: Body) -> None:
        """Connect to one server, where that is needed, and send.

        Raises:
            PeerLost, CallTimeout, Rejected: it was not sent.
        """
        attempt.route, attempt.record = route, route.peer.record
        link: Link | None = route.peer.link
        if link is None or not link.ready:
            candidates = self.protocol.routes.candidates(attempt.terms.service, attempt.terms.server)
            alone = all(each.peer is route.peer for each in candidates)
            link = await self._connect(route.peer, attempt.until, HANDSHAKE if alone else HURRY)
        self._send_over(link, route, attempt, kind, flags, body)

    def _send_over(self, link: Link, route: Route, attempt: Attempt, kind: int, flags: int, body: Body) -> None:
        """Send over a ready link; does not wait.

        Raises:
            PeerLost, Rejected: it was not sent.
        """
        terms = attempt.terms
        call = Call(kind, attempt.until, len(body))
        attempt.take(route, link, call)
        if flags & wire.STREAM:
            call.items = deque()
        if link.calls.full(len(body)):
            self._fail(attempt, attempt.window_full())
        section = terms.section(route.server, attempt.method)
        monitor = terms.monitor if kind == wire.REQUEST else None
        id = link.calls.begin(call)
        if kind == wire.PING:
            frame: wire.Frame = wire.pack(wire.PING, id=id)
        else:
            frame = wire.request(kind, flags, id, attempt.until - monotonic(), monitor, section, body)
        if link.ended is not None and link.calls.give_up(call):
            raise attempt.not_sent()
        link.put(call, frame)

    def _refuse(self, terms: Terms, method: str, size: int) -> NoReturn:
        if self.closed:
            raise errors.NodeClosed("this node is closed; make a new one")
        raise errors.TooLarge(
            f"{method!r} of {terms} with {size} bytes; max_message allows {self.settings.max_message}. "
            "Send less at a time (stream), or raise the setting on both sides"
        )

    async def outcome(self, attempt: Attempt, seen: int = -1) -> None:
        """Wait until the call of ``attempt`` has ended well: REPLIED, FAILED or TAKEN.

        Args:
            seen: signs of life after which its monitor's patience has passed already.

        Raises:
            CallTimeout: its deadline came, or no sign of life for as long as its monitor allows.
            Rejected, PeerLost: it ended so.
        """
        link, call = attempt.link, attempt.call
        monitor = attempt.terms.monitor if call.kind == wire.REQUEST else None
        if call.outcome is None:
            while call.outcome is None and call.signs != seen:
                seen = call.signs
                until = attempt.until if monitor is None else min(attempt.until, monotonic() + monitor)
                await self.wait(link, call, seen, until)
            if call.outcome is None and self.cancel(link, call):
                self._fail(attempt, attempt.timed_out())
            while call.outcome is None:  # another thread took it out of the table and is writing the outcome
                await self.wait(link, call, call.signs, monotonic() + 0.001)
        if call.outcome == REJECTED or call.outcome == LOST:
            if call.given_up and call.deadline <= monotonic():
                self._fail(attempt, attempt.timed_out())  # the housekeeping came before us
            if call.outcome == REJECTED and call.body[0] == "hello first":
                self._lost(attempt.route.peer, link, "it does not know this connection any more")
            raise attempt.failure()

    async def _find(self, attempt: Attempt) -> Route:
        """A route to try (again), waiting for one if the terms allow.

        Raises:
            NoRoute: none came within ``ready_timeout``. Where there are some, and each refused or was lost, that error.
            CallTimeout: the deadline came first.
        """
        terms, tried = attempt.terms, attempt.tried
        error = attempt.error
        full = isinstance(error, errors.Rejected) and error.reason == "full"
        if terms.service not in self._wanted:
            await self.want(terms.service, attempt.until)
        # Who was not waited for, since others could be asked, may still answer.
        links = [route.peer.link for route in tried if not route.peer.failures]
        hope = max((link.began + HANDSHAKE for link in links if link and not (link.ready or link.ended)), default=0.0)
        ready = min(attempt.until, max(attempt.started + terms.ready_timeout, hope))
        while True:
            routes = self.protocol.routes.untried(terms.service, terms.server, tried, beyond=not full)
            if routes:
                return choose(routes, next(terms.turns))
            if error is not None and (full or monotonic() >= ready):
                self._fail(attempt, error)
            if tried:
                # Each has been tried once. Another round after a pause, or when the view changes.
                await self._wait_for_change(self.protocol.routes, min(ready, monotonic() + attempt.pause))
                attempt.pause *= 2
                tried = attempt.tried = ()
            elif not await self.wait_for(lambda: bool(self.protocol.routes.of(terms.service, terms.server)), ready):
                with self.lock:
                    later = min(self.protocol.peers.expected(terms.service, terms.server) + 1.0, attempt.until)
                if later > monotonic() and not self.closed:
                    ready = later  # it is there, and it is not our turn yet
                    continue
                if self.closed:
                    raise errors.NodeClosed("this node was closed while a request waited for a server")
                self._fail(attempt, attempt.no_route(self.protocol.routes, self.settings, ready))

    def _again(self, attempt: Attempt, error: errors.CallError) -> None:
        """Note that the route failed; returns if the request may go to another, raises ``error`` if not."""
        terms = attempt.terms
        attempt.tried += (attempt.route,)
        attempt.error = error
        attempt.may_have_run |= error.executed == "unknown"
        record, idempotent = attempt.record, terms.idempotent
        if idempotent is None:
            idempotent = record is not None and attempt.method in record.idempotent.get(terms.service, ())
        safe = error.executed == "no" or (idempotent and error.executed == "unknown")
        if not safe or monotonic() >= attempt.until:
            self._fail(attempt, error)
        with self.lock:
            self.outcomes["retried"] += 1

    def _fail(self, attempt: Attempt, error: errors.CallError) -> NoReturn:
        if attempt.may_have_run and error.executed == "no":
            error.executed = "unknown"  # this server certainly not; one that was tried before, perhaps
        with self.lock:
            self.outcomes[type(error).__name__] += 1
        raise error

    def cancel(self, link: Link, call: Call) -> bool:
        """Give ``call`` up and tell the server; False when it had ended."""
        if not link.calls.give_up(call):
            return False
        if call.sent:
            link.post(None, wire.pack(wire.CANCEL, id=call.id))
        self._give_up(link, call)
        return True

    def _give_up(self, link: Link, call: Call) -> None:
        """An outcome for a call that was taken out of its table: whoever else waits for it must not wait for ever."""
        call.body = "it was given up here"
        call.outcome = LOST
        link.tell([call])

    async def scatter(self, terms: Terms, kind: int, flags: int, method: str, body: Body) -> list[Attempt]:
        """Send a request to every server known now, and wait for each one's outcome.

        Never raises for one of them: an attempt that did not end well holds its ``error``.
        """
        if self.closed or len(body) > self.settings.max_message:
            self._refuse(terms, method, len(body))
        now = monotonic()
        if terms.service not in self._wanted:
            await self.want(terms.service, now + terms.timeout)
        if not self.registry.is_fresh():
            await self._cold(self.registry.refresh)
        everyone: list[Attempt] = []
        try:
            await self._scatter(everyone, terms, kind, flags, method, body, now)
        except BaseException:  # who asked was interrupted, or cancelled
            for attempt in everyone:
                if attempt.error is None and attempt.under_way:
                    self.cancel(attempt.link, attempt.call)
            raise
        return everyone

    async def _scatter(
        self, everyone: list[Attempt], terms: Terms, kind: int, flags: int, method: str, body: Body, now: float
    ) -> None:
        until = now + terms.timeout
        request = serving.get()
        if request is not None and request.deadline is not None:
            until = min(until, request.deadline)
        with self.lock:
            receivers = self.protocol.receivers(terms.service, terms.server)
        for route in receivers:
            attempt = Attempt(terms, method, until, now)
            attempt.route = route
            everyone.append(attempt)
        if flags & wire.FANOUT and len(everyone) > self.settings.fanout_direct:
            await self.tree.fan_out(everyone, body)
            return
        waiting = self.send_all((attempt, kind, flags, body) for attempt in everyone)
        while waiting:
            waiting = await self.send_ready(waiting)
        for attempt in everyone:
            await self.conclude(attempt)

    def send_all(self, parcels: Iterable[Parcel]) -> list[Parcel]:
        """Send each parcel, to the route of its attempt, whose link is ready; returns the others.

        All connections begin before any is waited for. An attempt that cannot be sent gets its ``error``.
        """
        waiting = []
        for parcel in parcels:
            attempt, kind, flags, body = parcel
            route = attempt.route
            link: Link | None = route.peer.link
            try:
                if link is not None and link.ready:
                    self._send_over(link, route, attempt, kind, flags, body)
                else:
                    attempt.link = self._begin_link(route.peer)
                    waiting.append(parcel)
            except (errors.CallError, errors.ResourceLimit) as error:
                attempt.error = error if isinstance(error, errors.CallError) else errors.NoRoute(str(error))
        return waiting

    async def send_ready(self, waiting: list[Parcel]) -> list[Parcel]:
        """Send what can be sent by now; returns the others. A silent peer holds up nobody for more than a moment."""
        silent = []
        for parcel in waiting:
            attempt, kind, flags, body = parcel
            now, begun = monotonic(), attempt.link
            heard = await self._await_hello(begun, min(now + BRIEF, attempt.until))
            if not heard and now < min(attempt.until, begun.began + HANDSHAKE):
                silent.append(parcel)
                continue
            if begun.ended is not None and not begun.ready:
                why = self._not_ready(begun)
                attempt.error = errors.PeerLost(f"no connection to {name_of(begun.peer)}: {why}", executed="no")
                continue
            try:
                await self._send_to(attempt.route, attempt, kind, flags, body)
            except errors.CallError as error:
                attempt.error = error
        return silent

    async def conclude(self, attempt: Attempt) -> None:
        """Wait for the outcome of an attempt that was sent, if it was; one that did not end well gets its ``error``."""
        if attempt.error is None and attempt.call.outcome is None:
            attempt.link.glance()
        if attempt.error is None and attempt.call.outcome not in WELL:
            try:
                await self.outcome(attempt)
            except errors.CallError as error:
                attempt.error = error
        attempt.seconds = monotonic() - attempt.started
