"""A node of a simulated world: the real core, driven on virtual time as ``transport/engine.py`` drives it.

What the engine does with threads is done here with generators: a task yields the time until which it waits, and is
resumed when that has come or somebody has news for it. Each method stands for the one of its name in the real engine.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from itertools import count
from typing import NamedTuple

from onehop.errors import (
    CallError,
    CallTimeout,
    NodeClosed,
    NoRoute,
    OnehopError,
    PeerLost,
    ProtocolError,
    Rejected,
    RemoteError,
    WireError,
)
from onehop.interfaces import Record
from onehop.protocol import peers as states
from onehop.protocol import wire
from onehop.protocol.calls import FAILED, LOST, REJECTED, REPLIED, Call
from onehop.protocol.inbox import Request
from onehop.protocol.node import NodeProtocol
from onehop.protocol.peers import RESTING, SHORTEST_TURN, Peer
from onehop.protocol.routes import Route, choose
from onehop.protocol.tree import SERVICE
from onehop.testing.clock import LocalClock, Task, Waiting
from onehop.testing.invariants import (
    CRASHED,
    DRAINED,
    ENTRY_NUMBER,
    LOST_PEER,
    REPLY_BODY,
    STARTED,
    TOLD,
    Entry,
    Invariants,
    Trace,
)
from onehop.testing.link import SLOW_TICK, EngineLink
from onehop.testing.network import Network, VirtualRegistry
from onehop.testing.offer import Offer, Target, slowed
from onehop.testing.tree import VirtualTree

HANDSHAKE, HURRY, RESUME, AGAIN_AFTER, GRACE = 5.0, 1.0, 1.0, 5.0, 1.0
TICK, PROBES = 0.1, 20.0
"""Seconds, as in the real engine; PROBES is how often silent connections are looked for."""


class Surroundings(NamedTuple):
    """What the engines of one world share, and the clock of one of them."""

    clock: LocalClock
    network: Network
    registry: VirtualRegistry
    invariants: Invariants
    trace: Trace


class _Attempt:
    """See ``transport.requests.Attempt``."""

    __slots__ = ("entry", "error", "pause", "task", "tried")

    def __init__(self, entry: Entry, task: Task) -> None:
        self.entry = entry
        self.task = task
        self.tried: list[Route] = []
        self.error: CallError | None = None
        self.pause = 0.05


class VirtualEngine:
    """One process: the core of a node and what drives it, from its start to its end.

    Args:
        index: of the node, which is also its site in the network.
        offers: what it serves.
        room: requests its inbox takes.
        window: requests under way to one peer.
        fanout_direct, relay: see :class:`onehop.settings.Settings`.
        keeps_address: whether it listens where its predecessor did.

    Attributes:
        hung: its handlers do not come to an end, while its input and output live.
        slowness: how many times as long as they should its handlers take.
        lateness: seconds by which its housekeeping comes too late.
    """

    def __init__(
        self,
        surroundings: Surroundings,
        index: int,
        offers: tuple[Offer, ...],
        *,
        room: int = 10_000,
        window: int = 4096,
        fanout_direct: int = 2_000,
        relay: bool = True,
        keeps_address: bool = False,
    ) -> None:
        self.clock, self.network, self.registry, self.invariants, self.trace = surroundings
        self.index = index
        self.room = room
        self.window = window
        self.fanout_direct = fanout_direct
        self.relay = relay
        self.keeps_address = keeps_address
        self.hung = False
        self.slowness = 1.0
        self.lateness = 0.0
        self.stuck: list[tuple[Target, Request, Entry]] = []
        self.dead = False
        self.closed = False
        self.draining = False
        self.seen_version = -1
        self.ended_links = 0
        self.protocol = NodeProtocol(
            self.clock.random.randbytes(16),
            random=self.clock.random.random,
            host=f"host-{index}",
            messages=room,
            window_messages=window,
        )
        self.targets = [Target(offer, instance) for instance, offer in enumerate(offers)]
        self.links: dict[bytes, EngineLink] = {}
        self.under_way: dict[int, Entry] = {}
        self.retried = self.resumed = self.probes = 0
        self._turns: dict[tuple[str, str], count[int]] = {}
        self._changed: list[Task] = []
        self._tick_at: float | None = None
        endpoint = f"virtual://{index}" + ("" if keeps_address else f"/{self.protocol.id.hex()}")
        self.inbound = self.network.bind(index, endpoint)
        self.inbound.reader = self._take
        self.tree = VirtualTree(self)
        self.endpoint = endpoint

    @property
    def is_over(self) -> bool:
        """Whether the process has ended."""
        return self.dead or self.closed

    def start(self) -> None:
        """Announce what is served, and watch the registry."""
        self.trace.step(STARTED, self.index)
        for target in self.targets:
            self.protocol.inbox.offer(target.offer.service, target.offer.server, target)
        if self.targets and self.relay:
            self.protocol.inbox.offer(SERVICE, "", self.tree)
        self.announce()
        self.plan(self.clock.now + PROBES)

    def announce(self) -> None:
        """Tell the registry what is served, if anything."""
        services: dict[str, tuple[str, ...]] = {}
        for target in self.targets:
            services[target.offer.service] = (*services.get(target.offer.service, ()), target.offer.server)
        if services:
            id, host = self.protocol.id.hex(), self.protocol.host
            self.registry.announce(
                Record(node=id, host=host, endpoints=(self.endpoint,), services=services, relay=self.relay)
            )

    def learn(self, records: tuple[Record, ...]) -> None:
        """The registry has a new view."""
        self.trace.step(TOLD, self.index, 0, len(records))
        before = self.protocol.routes
        self.protocol.learn(records, self.clock.now)
        self.routes_may_have_changed(before)
        if self.links:
            self.plan(self.clock.now + SLOW_TICK)
        for peer in self.protocol.peers.away.values():
            if peer.state == RESTING:
                self.plan(peer.rested_at)

    def routes_may_have_changed(self, before: object) -> None:
        """Let those who wait for a change look, where ``before`` is not the picture any more."""
        if self._changed and self.protocol.routes is not before:
            waiters, self._changed = self._changed, []
            for task in waiters:
                task.resume()

    # Links ----------------------------------------------------------------------------------------

    def _begin_link(self, peer: Peer) -> EngineLink | OnehopError:
        if self.closed:
            return NodeClosed("this node is closed")
        link: EngineLink | None = peer.link
        if link is not None and link.ended is None:
            return link
        record = peer.record
        hello = self.protocol.connect(peer, self.clock.now) if record is not None else None
        if hello is None or record is None:
            return PeerLost(f"node {peer.id.hex()} is {peer.state}: not connected to", executed="no")
        socket = self.network.connect(self.index, record.endpoints[0])
        link = peer.link = self.links[peer.id] = EngineLink(self, peer, socket, self.clock.now)
        link.post(link.hello, hello)
        return link

    def connect(
        self, peer: Peer, until: float, task: Task, patience: float = HANDSHAKE
    ) -> Generator[float, None, EngineLink | OnehopError]:
        link = self._begin_link(peer)
        if not isinstance(link, EngineLink):
            return link
        limit = min(until, link.began + HANDSHAKE, self.clock.now + patience)
        while link.hello.outcome is None and self.clock.now < limit:
            link.waiters.append(task)
            yield limit
        if link.ready:
            return link
        if link.hello.outcome is None and self.clock.now >= until:
            return CallTimeout("the hello was not answered before the deadline", executed="no")
        if link.hello.outcome is None and self.clock.now < link.began + HANDSHAKE:
            return PeerLost(f"node {peer.id.hex()} has not answered the hello for {patience:g} s", executed="no")
        why, event = link.ended or "it did not answer the hello", states.LOST
        if link.hello.outcome == REJECTED:
            why = "{}: {}".format(*link.hello.body)
            if link.hello.body[0] == "wrong node":
                event = states.REPLACED
        self.lost(link, why, event=event)
        return PeerLost(f"no connection to node {peer.id.hex()}: {link.error or why}", executed="no")

    def control(self, link: EngineLink, frame: bytes) -> None:
        """A frame of a peer that is for no call."""
        before = self.protocol.routes
        ended: list[Call] = []
        try:
            ready = self.protocol.control(link.peer, frame, self.clock.now, ended)
        except WireError:
            raise
        except ProtocolError as error:
            link.error = error
            self.lost(link, str(error), event=states.REPLACED)
            return
        for call in ended:
            if call.waiter is not None:
                call.waiter.resume()
        if ready:
            link.answered()
        self.routes_may_have_changed(before)

    def lost(self, link: EngineLink, why: str, linger: float = 0.0, *, event: str = states.LOST) -> None:
        """The connection is over: its calls end."""
        if link.ended is not None:
            return
        link.ended = why
        link.socket.close(linger)
        peer = link.peer
        before = self.protocol.routes
        self.links.pop(peer.id, None)
        self.ended_links += 1
        peer.link = None
        calls = self.protocol.lost(peer, why, self.clock.now, event)
        self.trace.step(LOST_PEER, self.index, 0, len(calls))
        if peer.state == RESTING:
            self.plan(peer.rested_at)
        for call in calls:
            if call.waiter is not None:
                call.waiter.resume()
        link.wake()
        self.routes_may_have_changed(before)

    # Requests -------------------------------------------------------------------------------------

    def begin(self, entry: Entry) -> None:
        """Make the request of ``entry``; how it ends is written there."""
        self.under_way[entry.number] = entry
        self.invariants.began(entry)
        if entry.kind in ("fanout", "gather"):
            self._scatter(entry)
        else:
            task = Task(self.clock)
            task.start(self._request(entry, task))

    def finish(self, entry: Entry, outcome: str, error: OnehopError | None = None) -> None:
        if self.dead:
            return  # nobody is left to hear it
        self.under_way.pop(entry.number, None)
        entry.outcome = outcome if error is None else type(error).__name__
        if outcome == "failed":
            entry.outcome = outcome
        entry.error = error
        if entry.may_have_run and isinstance(error, CallError) and error.executed == "no":
            error.executed = "unknown"
        entry.finishes += 1
        entry.finished_at = self.clock.now
        self.invariants.ended(entry)
        if entry.parent is not None and all(part.outcome is not None for part in entry.parent.parts):
            self.finish(entry.parent, "done")

    def _request(self, entry: Entry, task: Task) -> Waiting:
        attempt = _Attempt(entry, task)
        turns = self._turns.get((entry.service, entry.server))
        if turns is None:
            turns = self._turns[entry.service, entry.server] = count(self.clock.random.randrange(1 << 16))
        while True:
            routes = self.protocol.routes.candidates(entry.service, entry.server)
            if routes and not attempt.tried:
                route = choose(routes, next(turns))
            else:
                found = yield from self._find(attempt, turns)
                if not isinstance(found, Route):
                    self.finish(entry, "error", found)
                    return
                route = found
            self.invariants.chose(self, route)
            entry.route = route
            link: EngineLink | None = route.peer.link
            if link is None or not link.ready:
                patience = HURRY if len(routes) > 1 else HANDSHAKE
                made = yield from self.connect(route.peer, entry.deadline, task, patience)
                if not isinstance(made, EngineLink):
                    if isinstance(made, CallError) and self._again(attempt, route, made):
                        continue
                    self.finish(entry, "error", made)
                    return
                link = made
            error = yield from self._exchange(entry, task, route, link)
            if error is None:
                return
            if isinstance(error, CallTimeout):
                link.note_timeout(entry)
            if isinstance(error, CallTimeout) or not self._again(attempt, route, error):
                self.finish(entry, "error", error)
                return

    def _exchange(
        self, entry: Entry, task: Task, route: Route, link: EngineLink
    ) -> Generator[float, None, CallError | None]:
        """Send the request over a ready link and wait for its outcome; None where ``entry`` has ended with it."""
        is_cast = entry.kind == "cast"
        is_part = is_cast and entry.parent is not None
        number = entry.parent.number if is_part and entry.parent is not None else entry.number  # one body for all
        body = ENTRY_NUMBER.pack(number) + bytes(max(0, entry.size - ENTRY_NUMBER.size))
        call = Call(wire.CAST if is_cast else wire.REQUEST, entry.deadline, len(body))
        call.route = route
        if link.calls.full(len(body)):
            self.finish(entry, "error", Rejected("the window is full", reason="full"))
            return None
        link.calls.begin(call)
        flags, monitor = wire.FANOUT if is_part else 0, None if is_cast else entry.monitor
        section = wire.names(entry.service, route.server, "work")
        while True:
            entry.asked.append((route.peer.id, self.clock.now))
            error = yield from self.ask(link, call, flags, monitor, section, body, task)
            if error is None:
                break
            again = (yield from self._resume(link, call, entry, task)) if entry.parent is None else None
            if again is None:
                return error
            link, call = again
        if call.outcome == FAILED:
            self.finish(entry, "failed", RemoteError(bytes(call.body).decode()))
        elif call.outcome == REPLIED:
            number, by = REPLY_BODY.unpack_from(call.body)
            self.invariants.replied(entry, number, by, route.peer.id)
            self.finish(entry, "replied")
        else:
            self.finish(entry, "taken")
        return None

    def ask(
        self, link: EngineLink, call: Call, flags: int, monitor: float | None, section: bytes, body: bytes, task: Task
    ) -> Generator[float, None, CallError | None]:
        """Send a registered request over a ready link and wait for its outcome; None where it has ended well."""
        clock, id = self.clock, call.id
        call.waiter = task
        self.plan(clock.now + SLOW_TICK)
        link.post(call, wire.request(call.kind, flags, id, call.deadline - clock.now, monitor, section, body))
        if monitor is None:
            while call.outcome is None and clock.now < call.deadline:
                yield call.deadline
        else:
            seen = -1
            while call.outcome is None and call.signs != seen:
                seen = call.signs
                limit = min(call.deadline, clock.now + monitor)
                while call.outcome is None and call.signs == seen and clock.now < limit:
                    yield limit
        if call.outcome is None:
            link.calls.give_up(call)
            if call.sent:
                link.post(None, wire.pack(wire.CANCEL, id=id))
            return CallTimeout("it did not answer in time", executed=call.executed)
        if call.outcome == REJECTED:
            reason, text = call.body
            if reason == "hello first":
                self.lost(link, "it does not know this connection any more")
            return Rejected(f"refused: {reason} ({text})", reason=reason, executed=call.executed)
        if call.outcome == LOST:
            return PeerLost(f"lost: {call.body}", executed=call.executed)
        return None

    def _resume(
        self, link: EngineLink, call: Call, entry: Entry, task: Task
    ) -> Generator[float, None, tuple[EngineLink, Call] | None]:
        """Register a call whose connection ended under its number on another; None where there is none."""
        peer = link.peer
        if (
            call.outcome != LOST or not call.sent or link.ended is None or self.closed
            or peer.record is None or peer.turn >= SHORTEST_TURN or (peer.failures > 1 and peer.link is None)
            or link.liveness.silent or (call.resumed and self.clock.now - link.began < AGAIN_AFTER)
        ):  # fmt: skip
            return None
        made = yield from self.connect(peer, entry.deadline, task, RESUME)
        if not isinstance(made, EngineLink) or made.calls.full(call.size):
            return None
        again = Call(call.kind, call.deadline, call.size)
        again.route = call.route
        made.calls.resume(again, call.id)
        self.resumed += 1
        return made, again

    def _find(self, attempt: _Attempt, turns: count[int]) -> Generator[float, None, Route | OnehopError]:
        entry, tried, clock = attempt.entry, attempt.tried, self.clock
        error = attempt.error
        full = isinstance(error, Rejected) and error.reason == "full"
        ready = min(entry.deadline, entry.started + entry.ready_timeout)
        while True:
            if self.closed:
                return NodeClosed("this node was closed while a request waited for a server")
            routes = self.protocol.routes.untried(entry.service, entry.server, tried, beyond=not full)
            if routes:
                return choose(routes, next(turns))
            if error is not None and (full or clock.now >= ready):
                return error
            if tried:
                seen = self.protocol.routes
                self.registry.refresh(self)
                limit = min(ready, clock.now + attempt.pause)
                while self.protocol.routes is seen and clock.now < limit and not self.closed:
                    self._changed.append(attempt.task)
                    yield limit
                attempt.pause *= 2
                tried.clear()
                continue
            self.registry.refresh(self)
            while not self.protocol.routes.of(entry.service, entry.server) and clock.now < ready and not self.closed:
                self._changed.append(attempt.task)
                yield ready
            if not self.protocol.routes.of(entry.service, entry.server) and not self.closed:
                later = min(self.protocol.peers.expected(entry.service, entry.server) + 1.0, entry.deadline)
                if later > clock.now:
                    ready = later
                    continue
                if entry.deadline <= ready:
                    return CallTimeout("nobody offered it before the deadline", executed="no")
                return NoRoute(f"nobody offers {entry.service!r} {entry.server!r}")

    def _again(self, attempt: _Attempt, route: Route, error: CallError) -> bool:
        attempt.tried.append(route)
        attempt.error = error
        attempt.entry.may_have_run |= error.executed == "unknown"
        safe = error.executed == "no" or (attempt.entry.idempotent and error.executed == "unknown")
        full = isinstance(error, Rejected) and error.reason == "full"
        target = attempt.entry.service, attempt.entry.server
        others = not full or self.protocol.routes.untried(*target, attempt.tried, beyond=False)
        if not safe or not others or self.clock.now >= attempt.entry.deadline:
            return False
        if (full or error.executed == "unknown") and not self.protocol.may_retry(self.clock.now):
            return False
        self.retried += 1
        return True

    def _scatter(self, entry: Entry) -> None:
        self.registry.refresh(self)
        receivers = self.protocol.receivers(entry.service, entry.server)
        if not receivers:
            self.finish(entry, "done")
        for route in receivers:
            self.invariants.chose(self, route, is_fan_out=True)
            kind = "cast" if entry.kind == "fanout" else "call"
            timeout = entry.deadline - self.clock.now
            part = self.invariants.enter(kind, self.index, entry.service, route.server, timeout, self.clock)
            part.parent, part.work, part.fails, part.size = entry, entry.work, entry.fails, entry.size
            entry.parts.append(part)
            entry.receivers[route.peer.id, route.server] = part
            self.under_way[part.number] = part
            self.invariants.began(part)
        if entry.kind == "fanout" and len(receivers) > self.fanout_direct:
            self.tree.fan_out(entry, receivers)
            return
        for route, part in zip(receivers, list(entry.parts), strict=True):
            self.post(part, route)

    def post(self, part: Entry, route: Route) -> None:
        """Send one receiver its copy."""
        task = Task(self.clock)
        task.start(self._post_to(part, route, task))

    def _post_to(self, part: Entry, route: Route, task: Task) -> Waiting:
        made = yield from self.connect(route.peer, part.deadline, task)
        error = made if not isinstance(made, EngineLink) else (yield from self._exchange(part, task, route, made))
        if error is not None:
            self.finish(part, "error", error)

    # Serving --------------------------------------------------------------------------------------

    def _take(self, identity: bytes, frame: bytes, body: bytes | None) -> None:
        if self.dead:
            return
        inbox = self.protocol.inbox
        self.trace.step(frame[0], self.index, int.from_bytes(identity, "big"), int.from_bytes(frame[8:16], "little"))
        moved: list[Request] = []
        inbox.receive(identity, frame, body, self.clock.now, moved)
        if inbox.outgoing:
            self._send_outgoing()
        echoes, inbox.echoes = inbox.echoes, []
        for echo in echoes:
            if echo.target is self.tree:
                self._answer_echo(echo)
            else:
                echo.target.tasks.appendleft(echo)
                self._work(echo.target)
        if moved:
            self.invariants.taken(self, [request for request in moved if request.target is not self.tree])
            for request in moved:
                if request.target is self.tree:
                    self.tree.serve(request)
                elif not request.queued:
                    request.queued = True
                    request.target.tasks.append(request)
                    if request.monitor is not None:
                        self.plan(self.clock.now + request.monitor / 2)
                    self._work(request.target)

    def _work(self, target: Target) -> None:
        while target.busy < target.offer.workers and target.tasks:
            request = target.tasks.popleft()
            if request.kind == wire.PING:
                self._answer_echo(request)
                continue
            if self.expired(request):
                self.invariants.dropped(self, request)
                self._answer(request, wire.reject(request.id, "expired"))
                continue
            self.invariants.ran(self, request)
            target.busy += 1
            entry = self.invariants.entry_of(self, request)
            seconds = self.clock.random.expovariate(1 / target.offer.work) if entry.work is None else entry.work
            self.clock.after(slowed(seconds, self.slowness), self._handled, (target, request, entry))

    def come_to(self, _: None = None) -> None:
        """The handlers that hung come to their end."""
        self.hung = False
        stuck, self.stuck = self.stuck, []
        for each in stuck:
            self._handled(each)

    def _answer_echo(self, request: Request) -> None:
        request.sender.echo = False
        self._send_one(request.identity, wire.pack(wire.PONG, id=request.id))

    def expired(self, request: Request) -> bool:
        """Whether ``request`` must not be run any more."""
        return self.protocol.inbox.expired(request, self.clock.now)

    def _handled(self, of: tuple[Target, Request, Entry]) -> None:
        target, request, entry = of
        if self.dead or self.closed:
            return
        if self.hung:
            self.stuck.append(of)
            return
        target.busy -= 1
        flags, body = 0, REPLY_BODY.pack(entry.number, self.protocol.id) + bytes(entry.size)
        if entry.fails:
            flags, body = wire.FAILED, b"the handler raised"
        self.reply(request, wire.answer(wire.REPLY, flags, request.id, body, len(target)))
        self._work(target)

    def reply(self, request: Request, frame: wire.Frame) -> None:
        """Answer a request that has run."""
        self._answer(request, frame)

    def _answer(self, request: Request, frame: wire.Frame) -> None:
        if self.protocol.inbox.finish(request) and request.kind == wire.REQUEST:
            self._send_one(request.identity, frame)

    def _send_one(self, identity: bytes, frame: wire.Frame) -> None:
        try:
            self.inbound.send(identity, frame)
        except ConnectionResetError:
            self.protocol.inbox.gone(identity)

    def _send_outgoing(self) -> None:
        inbox = self.protocol.inbox
        while inbox.outgoing:
            waiting, inbox.outgoing = inbox.outgoing, []
            for identity, frame in waiting:
                self._send_one(identity, frame)

    def drain(self, timeout: float) -> None:
        """Take nothing more, answer what was taken, then close; after ``timeout`` seconds in any case."""
        if not self.draining:
            self.trace.step(DRAINED, self.index)
            self.draining = True
            self.registry.withdraw(self.protocol.id.hex())
            self.protocol.inbox.drain("draining")
            self._send_outgoing()
            self._drained(self.clock.now + timeout)

    def _drained(self, until: float) -> None:
        if self.dead or self.closed:
            return
        if (self.protocol.inbox.taken or self.under_way) and self.clock.now < until:
            self.clock.after(TICK, self._drained, until)
            return
        if not self.protocol.inbox.taken:
            self.protocol.inbox.drain("drained", self.clock.now, final=True)
            self._send_outgoing()
        self.close()

    # Housekeeping ---------------------------------------------------------------------------------

    def plan(self, time: float) -> None:
        """See that the housekeeping comes at ``time``, if not earlier."""
        time = math.ceil(time / TICK) * TICK
        if self._tick_at is None or time < self._tick_at:
            self._tick_at = time
            self.clock.at(time + self.lateness, self._tick, time)

    def _tick(self, time: float) -> None:
        if self.dead or self.closed or self._tick_at != time:
            return
        self._tick_at = None
        now, inbox = self.clock.now, self.protocol.inbox
        before = self.protocol.routes
        for peer in self.protocol.handle_timer(now):
            self._begin_link(peer)
        inbox.handle_timer(now)
        self._send_outgoing()
        next_time = now + PROBES
        for link in list(self.links.values()):
            if not link.ready:
                if now - link.began > HANDSHAKE + GRACE:
                    self.lost(link, "it did not answer the hello")
                next_time = min(next_time, link.began + HANDSHAKE + GRACE + TICK)
                continue
            if link.calls.pending or link.liveness.stalled:
                link.see_whether_it_answers()
                next_time = min(next_time, now + SLOW_TICK)
            elif link.peer.record is None:
                self.lost(link, "its record was withdrawn")
        for peer in self.protocol.peers.away.values():
            if peer.state == RESTING and peer.rested_at < next_time:
                next_time = peer.rested_at
        beat = inbox.timer()
        self.plan(max(now + TICK / 2, next_time if beat is None else min(beat, next_time)))
        self.routes_may_have_changed(before)

    # The end --------------------------------------------------------------------------------------

    def close(self) -> None:
        """End everything now; calls under way end as lost."""
        if self.closed or self.dead:
            return
        self.closed = True
        self.registry.withdraw(self.protocol.id.hex())
        self.registry.leave(self)
        for link in list(self.links.values()):
            link.post(None, wire.goodbye())
            self.lost(link, "this node was closed", 0.1)
        waiters, self._changed = self._changed, []
        for task in waiters:
            task.resume()
        self.inbound.close(1.0)

    def crash(self) -> None:
        """The process dies: nothing of it happens any more, and the kernel closes its connections."""
        if self.dead:
            return
        self.trace.step(CRASHED, self.index)
        self.dead = True
        for entry in self.under_way.values():
            entry.outcome = "caller crashed"
        self.under_way.clear()
        self.registry.withdraw(self.protocol.id.hex())
        self.registry.leave(self)
        for link in list(self.links.values()):
            link.ended = "crashed"
            link.socket.close(0.0)
        self.inbound.close(0.0)

    def unfinished(self) -> list[str]:
        """What the engine still holds."""
        left = [f"{len(target.tasks)} requests queued" for target in self.targets if target.tasks]
        left += [f"{len(link.out)} frames to node {id.hex()}" for id, link in self.links.items() if link.out]
        if self.under_way:
            left.append(f"{len(self.under_way)} requests under way")
        return left
