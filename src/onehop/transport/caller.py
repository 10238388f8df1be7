"""The asking half of an engine: the story of a request.

What is decided here is asked of ``protocol/``. So that the story is told once, whatever waits is a coroutine. In
threads its waits wait in place and it never suspends: it is through after one step
(:func:`onehop.transport.blocking.run`). The ordinary request needs none of that; see :meth:`Caller.begin`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from time import monotonic
from typing import Any, NoReturn

from onehop import errors
from onehop.interfaces import Registry
from onehop.protocol import wire
from onehop.protocol.calls import FAILED, LOST, REJECTED, REPLIED, TAKEN, Call
from onehop.protocol.peers import SHORTEST_TURN
from onehop.protocol.routes import Route, Routes, choose
from onehop.protocol.wire import Body
from onehop.settings import Settings
from onehop.transport.carrier import Carrier
from onehop.transport.connector import HANDSHAKE, Connector
from onehop.transport.link import Link
from onehop.transport.requests import Attempt, Parcel, Terms, name_of, serving
from onehop.transport.tree import Tree

CASTS_UNDER_WAY = 64
"""Of one stream of casts, sent and not acknowledged."""
HURRY = 1.0
"""Seconds a peer has to answer a hello before another is asked, where there is another."""
RESUME = 1.0
"""Seconds that a peer has to answer a hello where requests were sent over a connection that ended."""
AGAIN_AFTER = 5.0
"""Seconds that a connection must have lasted for what was sent again over it to be sent once more."""
OVERDUE = 0.05
"""Seconds after its deadline until a call that somebody else was to end is ended by its caller."""
BRIEF, LONGEST_ROUND = 0.02, 1.0
"""Seconds that a fan-out gives one silent peer before it looks after the next: each round twice as long, up to this."""
WELL = (REPLIED, FAILED, TAKEN)
"""Outcomes that are no error of the call's own."""


class Caller(Connector):
    """The half of an engine that asks. See the module; the arguments are those of :class:`Connector`."""

    def __init__(self, settings: Settings, carrier: Carrier, registry: Registry, release: str) -> None:
        super().__init__(settings, carrier, registry, release)
        self.tree = Tree(self)

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
        began: float | None = None
        if request is not None and request.deadline is not None and request.deadline < until:
            until, began = request.deadline, now  # a call made in a handler ends no later than what it serves
            remaining = wire.milliseconds(until - now)
        picture = self.protocol.routes
        route: Route | None
        link: Link | None
        seen, route, link, sections = terms.direct
        if seen is not picture:
            route, link, sections = self._look_up(terms, picture)
        if (
            link is not None and route is not None and link.ready and size < wire.SECOND_FRAME_FROM
            and ((under_way := len((calls := link.calls).pending)) < (room := calls.room).plenty
                 or (size <= room.small and under_way < room.messages))
            and (terms.monitor is None or kind != wire.REQUEST)
        ):  # fmt: skip
            section = sections.get(method) or sections.setdefault(method, terms.section(route.server, method))
            call = Call(kind, until, size)
            call.route = route
            if began is not None:
                call.began = began
            if flags & wire.STREAM:
                call.items = deque()
            id = calls.begin(call)
            if link.ended is None or not calls.give_up(call):
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
        began = call.deadline - terms.timeout if call.began is None else call.began
        attempt = Attempt(terms, method, call.deadline, began)
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
                under_way = await self._resume(attempt, kind, flags, body)
                if not under_way:
                    self._again(attempt, error)
                continue
            except BaseException:
                self.cancel(attempt.link, attempt.call)
                raise
            return attempt.call

    async def _resume(self, attempt: Attempt, kind: int, flags: int, body: Body) -> bool:
        """Where the connection ended, and not the peer: send the same request once more, over another connection.

        Under its old number, by which the peer knows whether it has come already: it does not run twice, and where it
        runs its answer comes here. A crowd that lost a peer does not do that: it would return all at once.

        Returns:
            Whether it was sent.
        """
        call, link, peer = attempt.call, attempt.link, attempt.route.peer
        if peer.link is link and link.over:  # whoever ended it told us first, and is about to note it
            await self.wait_for(lambda: peer.link is not link, monotonic() + RESUME)
        if (
            call.outcome != LOST or not call.sent or link.ended is None or self.closed or flags & wire.STREAM
            or peer.record is None or peer.turn >= SHORTEST_TURN
            or (peer.failures > 1 and peer.link is None)  # that was tried already
            or (call.resumed and monotonic() - link.began < AGAIN_AFTER)  # what it asks for may be what ends them
            or link.liveness.silent  # the network, or its host, is away
        ):  # fmt: skip
            return False
        try:
            link = await self._connect(peer, attempt.until, RESUME)
        except (errors.CallError, errors.ResourceLimit):
            return False
        if link.calls.full(call.size):  # of others' calls, which were begun meanwhile
            return False
        again = Call(kind, attempt.until, call.size)
        link.calls.resume(again, call.id)
        if link.ended is not None and link.calls.give_up(again):
            return False
        attempt.take(attempt.route, link, again)
        terms = attempt.terms
        section = terms.section(attempt.route.server, attempt.method)
        monitor = terms.monitor if kind == wire.REQUEST else None
        link.put(again, wire.request(kind, flags, again.id, attempt.until - monotonic(), monitor, section, body))
        with self.lock:
            self.outcomes["resumed"] += 1
        return True

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
        attempt.route = route
        link: Link | None = route.peer.link
        if link is None or not link.ready:
            candidates = self.protocol.routes.candidates(attempt.terms.service, attempt.terms.server)
            alone = all(each.peer is route.peer for each in candidates)
            link = await self._connect(route.peer, attempt.until, HANDSHAKE if alone else HURRY)
        if len(body) >= wire.SECOND_FRAME_FROM:
            await self._wait_for_room(link, len(body), attempt.until)
        self._send_over(link, route, attempt, kind, flags, body)

    async def _wait_for_room(self, link: Link, size: int, until: float) -> None:
        """Let a large body wait until it fits into the window: few of them fill it. Small ones are refused at once."""
        pause = 0.001
        while link.ended is None and link.calls.full(size) and monotonic() + pause < until:
            await self._sleep(pause)
            pause = min(2 * pause, 0.05)

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
                self._note_timeout(attempt)
                self._fail(attempt, attempt.timed_out())
            overdue = max(attempt.until, monotonic()) + OVERDUE
            while call.outcome is None:  # another thread took it out of the table and is writing the outcome
                if monotonic() >= overdue:  # or was interrupted between the two
                    self._fail(attempt, attempt.timed_out())
                await self.wait(link, call, call.signs, monotonic() + 0.001)
        if call.outcome == REJECTED or call.outcome == LOST:
            if call.given_up and call.deadline <= monotonic():
                self._note_timeout(attempt)
                self._fail(attempt, attempt.timed_out())  # the housekeeping came before us
            if call.outcome == REJECTED and call.body[0] == "hello first":
                self._lost(attempt.route.peer, link, "it does not know this connection any more")
            if call.items is not None:
                self.cancel(link, call)
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
                gone = isinstance(error, errors.PeerLost) and not self.protocol.receivers(terms.service, terms.server)
                if gone and error.executed == "no" and not attempt.may_have_run:  # it withdrew as we came
                    error = attempt.no_route(self.protocol.routes, self.settings, ready)
                try:
                    self._fail(attempt, error)
                finally:
                    del error  # as in _fail
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
        attempt.tried += (attempt.route,)
        attempt.error = error.with_traceback(None)  # whose frames hold the attempt, and what was sent
        attempt.may_have_run |= error.executed == "unknown"
        if not self._may_go_on(attempt, error):
            try:
                self._fail(attempt, error)
            finally:
                del error  # as in _fail

    def _may_go_on(self, attempt: Attempt, error: errors.CallError) -> bool:
        terms = attempt.terms
        idempotent = terms.idempotent
        if idempotent is None:
            # As its last record says: by now it may have none.
            idempotent = attempt.method in attempt.route.peer.idempotent.get(terms.service, ())
        safe = error.executed == "no" or (idempotent and error.executed == "unknown")
        now = monotonic()
        if not safe or now >= attempt.until:
            return False
        # What was not sent, or refused by who leaves, makes nobody busier when it is sent to another.
        full = isinstance(error, errors.Rejected) and error.reason == "full"
        costs = full or error.executed == "unknown"
        if full and not self.protocol.routes.untried(terms.service, terms.server, attempt.tried, beyond=False):
            return False
        with self.lock:
            if not costs or self.protocol.may_retry(now):
                self.outcomes["retried"] += 1
                return True
            self.outcomes["not retried, beyond the budget"] += 1
        return False

    def _fail(self, attempt: Attempt, error: errors.CallError) -> NoReturn:
        if attempt.may_have_run and error.executed == "no":
            error.executed = "unknown"  # this server certainly not; one that was tried before, perhaps
        with self.lock:
            self.outcomes[type(error).__name__] += 1
        attempt.error = None
        try:
            raise error
        finally:
            # This frame, which the error's traceback holds, must not hold the error: only the collector of garbage
            # would find them, and the body that was sent, some time.
            del error

    def cancel(self, link: Link, call: Call) -> bool:
        """Give ``call`` up and tell the server; False when it had ended."""
        if not link.calls.give_up(call):
            if call.items is not None and call.outcome == LOST:  # an item was missing: the server may go on
                link.post(None, wire.pack(wire.CANCEL, id=call.id))
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

    def _note_timeout(self, attempt: Attempt) -> None:
        """A call was not answered in time: who lets one after the other wait is not asked for a while."""
        link, now = attempt.link, monotonic()
        if attempt.call.sent and link.ready and not attempt.call.arrived:  # a stream may have no other end
            with self.lock:
                is_stalled = link.liveness.timed_out(link.calls, attempt.call, now - attempt.started, now)
            if is_stalled:
                self.judge(link, False, "one call after the other was not answered in time")

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
        await self.see_through(everyone, self.send_all((attempt, kind, flags, body) for attempt in everyone))

    async def see_through(self, attempts: list[Attempt], waiting: list[Parcel]) -> None:
        """Send those of ``attempts`` that are ``waiting``, and conclude each of them."""
        while waiting:
            waiting = await self.send_ready(waiting)
            self.look_at(attempts)
        await self.conclude_all(attempts)

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
                error.__traceback__ = None  # as in _again
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
                attempt.error = error.with_traceback(None)
        return silent

    def look_at(self, attempts: Iterable[Attempt]) -> None:
        """Note how long those took that have ended by now: while one waits for others, nobody else looks."""
        for attempt in attempts:
            if attempt.under_way:
                self._has_ended(attempt)

    def _has_ended(self, attempt: Attempt) -> bool:
        """Whether it has its outcome or ``error``; whoever is the first to see that notes how long it took."""
        if attempt.error is None and attempt.call.outcome is None:
            attempt.link.glance()
            if attempt.call.outcome is None:
                return False
        attempt.seconds = attempt.seconds or monotonic() - attempt.started
        return True

    async def conclude_all(self, attempts: list[Attempt]) -> None:
        """:meth:`conclude` each; what one that is silent adds to the times of others is no more than these are.

        So there are rounds, each twice as long as the one before, at whose end all are looked at that have not ended.
        """
        length = BRIEF
        while attempts:
            silent, until = [], monotonic() + length
            for attempt in attempts:
                # A monitor's patience begins with the wait for its call. At the deadline, the last round is over.
                if attempt.terms.monitor is None and until < attempt.until and not self._has_ended(attempt):
                    if monotonic() < until:
                        await self.wait(attempt.link, attempt.call, attempt.call.signs, until)
                    if not self._has_ended(attempt):
                        silent.append(attempt)
                        continue
                await self.conclude(attempt)
            attempts, length = silent, min(2 * length, LONGEST_ROUND)

    async def conclude(self, attempt: Attempt) -> None:
        """Wait for the outcome of an attempt that was sent, if it was; one that did not end well gets its ``error``."""
        if not self._has_ended(attempt) or (attempt.error is None and attempt.call.outcome not in WELL):
            try:
                await self.outcome(attempt)
            except errors.CallError as error:
                attempt.error = error.with_traceback(None)
            attempt.seconds = attempt.seconds or monotonic() - attempt.started
