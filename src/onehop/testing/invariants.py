"""What must hold in a simulated world, at every step and at rest; and the ledger and the trace that tell.

The checks look from outside: at the ledger, where each request is written down by whoever makes it and by every
handler that runs it, and at what the core's tables hold; never at what an engine says of itself.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from onehop.errors import CallError, Executed, NoRoute, OnehopError, PeerLost, Rejected
from onehop.protocol import wire
from onehop.protocol.inbox import Request
from onehop.protocol.node import NodeProtocol
from onehop.protocol.peers import Peer
from onehop.protocol.routes import Route
from onehop.testing.clock import Clock, LocalClock

GRACE = 0.1
"""Seconds after its deadline within which a call must have ended."""
KEPT_STEPS = 50
DRIFT = 1.01
"""How far the clocks of two nodes of a world may differ in rate, at most."""
WELL_AFTER = 15.0
"""Seconds after the last thing that befell a node until nothing of it excuses anything any more."""
REPLY_TAKES = 1.0
"""Seconds within which a reply is back, where nothing befell either side."""
HEARD_WITHIN = 7.0
"""Seconds in which the loss of a host's power is noticed."""
NEVER_WELL = float("inf")

# Steps of the trace; kinds of frames (wire 3) stand for themselves, for the message taken in.
BEGAN, ENDED, RAN, TOLD, LOST_PEER, CRASHED, STARTED, DRAINED, CUT, MENDED, HELD, RELEASED = range(32, 44)
STRUCK, PASSED = 44, 45
_KINDS = "HELLO REQUEST CAST CREDIT CANCEL GOODBYE PING ACK REPLY ITEM PROGRESS REJECT PONG"
_FRAMES = {getattr(wire, name): name for name in re.findall(r"\w+", _KINDS)}
_STEPS = {
    BEGAN: "node {a} begins request {n}",
    ENDED: "request {n} of node {a} ends: {b}",
    RAN: "node {a} runs request {n}",
    TOLD: "node {a} is told of {n} records",
    LOST_PEER: "node {a} loses a connection ({n} calls)",
    CRASHED: "node {a} crashes",
    STARTED: "node {a} starts",
    DRAINED: "node {a} drains",
    CUT: "a partition of {a} and {b} nodes begins",
    MENDED: "a partition of {a} and {b} nodes ends",
    HELD: "what goes between {a} and {b} nodes is held",
    RELEASED: "what goes between {a} and {b} nodes is released",
    STRUCK: "node {a} is {b}",
    PASSED: "node {a} is no longer {b}",
}
STRIKES = ("stopped", "hung", "slow", "late in its housekeeping", "told nothing by the registry")
"""What may befall a node alone, and pass."""
OUTCOMES = (
    "replied",
    "failed",
    "taken",
    "done",
    "NoRoute",
    "Rejected",
    "CallTimeout",
    "PeerLost",
    "NodeClosed",
    "other",
)


class InvariantBroken(AssertionError):
    """Something happened in a simulated world that never may. The message holds seed, time and the last steps."""


class Trace:
    """Every step of a run, folded into a digest; the last ones are kept for people.

    Two runs are the same when their digests are.

    Args:
        kept: how many of the last steps.
    """

    def __init__(self, clock: Clock, kept: int = KEPT_STEPS) -> None:
        self.steps = 0
        self._clock = clock
        self._last: deque[tuple[float, int, int, int, int]] = deque(maxlen=kept)
        self._hash = hashlib.sha256()
        self._buffer = bytearray()
        self._pack = struct.Struct("<dBiiQ").pack

    def step(self, code: int, a: int, b: int = 0, n: int = 0) -> None:
        """Note that something happened now."""
        now = self._clock.now
        self.steps += 1
        self._last.append((now, code, a, b, n))
        self._buffer += self._pack(now, code, a, b, n)
        if len(self._buffer) > 1 << 16:
            self._hash.update(self._buffer)
            self._buffer.clear()

    def digest(self) -> str:
        """SHA-256 of all steps so far, in hexadecimal."""
        self._hash.update(self._buffer)
        self._buffer.clear()
        return self._hash.hexdigest()

    def last(self) -> list[str]:
        """The last steps, oldest first, one line each."""
        return [f"{time:12.6f}  {_sentence(code, a, b, n)}" for time, code, a, b, n in self._last]


def _sentence(code: int, a: int, b: int, n: int) -> str:
    if code in _FRAMES:
        return f"node {a} takes in {_FRAMES[code]} {n} from " + (f"connection {b}" if b >= 0 else f"node {-b - 1}")
    named = OUTCOMES[b] if code == ENDED else STRIKES[b] if code in (STRUCK, PASSED) else b
    return _STEPS[code].format(a=a, b=named, n=n)


class Execution(NamedTuple):
    """One run of a handler, by an instance of a service."""

    time: float
    node: bytes
    server: str
    instance: int


class Entry:
    """One request in the ledger: a call, a cast, or one receiver's part of a fan-out.

    Attributes:
        kind: ``"call"``, ``"cast"``, ``"fanout"`` or ``"gather"``; the parts of the last two are casts and calls.
        caller: the index of the node that made it.
        started, deadline, finished_at: in seconds of its caller's clock, which is the world's where none other was set;
            the last is None while it is under way.
        clock: its caller's.
        outcome: None while it is under way; then ``"replied"``, ``"failed"``, ``"taken"``, ``"done"`` (a fan-out, whose
            ``parts`` tell) or the name of the error class. ``"caller crashed"`` where nobody was left to hear it.
        error: the error it ended with.
        finishes: how often it ended.
        executions: each run of its handler.
        asked: each attempt: (node id asked, when).
        work: seconds its handler takes; None for a time drawn by the server.
        fails: whether its handler raises.
        may_have_run: an attempt before the last ended as unknown.
        parts: of a fan-out or gathering, one entry for each receiver; ``receivers``: by node id and server.
        takes: how often a receiver took it in; ``taken_by``: which (engines).
        dropped: how often a receiver passed it over as expired.
        route: where it went last.
    """

    __slots__ = (
        "asked",
        "caller",
        "clock",
        "deadline",
        "dropped",
        "error",
        "executions",
        "fails",
        "finished_at",
        "finishes",
        "idempotent",
        "kind",
        "may_have_run",
        "monitor",
        "number",
        "outcome",
        "parent",
        "parts",
        "ready_timeout",
        "receivers",
        "route",
        "server",
        "service",
        "size",
        "started",
        "taken_by",
        "takes",
        "work",
    )

    def __init__(
        self, number: int, kind: str, caller: int, service: str, server: str, clock: LocalClock, timeout: float
    ) -> None:
        started = clock.now
        self.clock = clock
        self.number = number
        self.kind = kind
        self.caller = caller
        self.service = service
        self.server = server
        self.started = started
        self.deadline = started + timeout
        self.ready_timeout = 1.0
        self.monitor: float | None = None
        self.idempotent = False
        self.work: float | None = None
        self.fails = False
        self.may_have_run = False
        self.size = 0
        self.parent: Entry | None = None
        self.parts: list[Entry] = []
        self.receivers: dict[tuple[bytes, str], Entry] = {}
        self.takes = 0
        self.route: Route | None = None
        self.taken_by: list[EngineLike] = []
        self.dropped = 0
        self.asked: list[tuple[bytes, float]] = []
        self.executions: list[Execution] = []
        self.outcome: str | None = None
        self.error: OnehopError | None = None
        self.finished_at: float | None = None
        self.finishes = 0

    @property
    def finished_once(self) -> bool:
        """Whether it ended exactly once (or its caller did not live to hear of it)."""
        return self.finishes == (0 if self.outcome == "caller crashed" else 1)

    @property
    def times_run(self) -> int:
        """How often its handler ran."""
        return len(self.executions)

    @property
    def executed(self) -> Executed | None:
        """What the caller was told: ``"yes"``, ``"no"`` or ``"unknown"``; None while it is under way."""
        if self.outcome in ("replied", "failed"):
            return "yes"
        return self.error.executed if isinstance(self.error, CallError) else None

    def __repr__(self) -> str:
        return (
            f"<{self.kind} {self.number} of node {self.caller} to {self.service!r} {self.server!r}: {self.outcome}, "
            f"run {len(self.executions)} times, {len(self.asked)} attempts>"
        )


class EngineLike(Protocol):
    """What is read of a simulated engine."""

    @property
    def index(self) -> int: ...
    @property
    def clock(self) -> LocalClock: ...
    @property
    def is_over(self) -> bool: ...
    @property
    def targets(self) -> Sequence[Any]: ...
    @property
    def under_way(self) -> dict[int, Entry]: ...
    @property
    def protocol(self) -> NodeProtocol: ...
    @property
    def room(self) -> int: ...
    @property
    def probes(self) -> int: ...
    def unfinished(self) -> list[str]: ...


class Invariants:
    """The checks.

    Args:
        clock, trace: of the world.
        ledger: all requests, by number.
        is_strict: whether the first breach raises :class:`InvariantBroken`; otherwise breaches are collected.

    Attributes:
        broken: every breach so far (at most 20): what, when, seed, and the steps before it.
        engines: every process that ever ran here.
    """

    def __init__(self, clock: Clock, trace: Trace, ledger: list[Entry], *, is_strict: bool = True) -> None:
        self.broken: list[str] = []
        self.is_strict = is_strict
        self._clock = clock
        self._standard = LocalClock(clock, clock.random)
        self._trace = trace
        self._ledger = ledger
        self.engines: list[EngineLike] = []
        self._ran: dict[tuple[bytes, int, bytes, int], None] = {}
        self._trouble: dict[int, int] = {}
        self._was_well: dict[int, float] = {}

    def enter(
        self, kind: str, caller: int, service: str, server: str, timeout: float, clock: LocalClock | None = None
    ) -> Entry:
        """A new entry in the ledger, for a request made now, on the clock of its caller."""
        entry = Entry(len(self._ledger), kind, caller, service, server, clock or self._standard, timeout)
        self._ledger.append(entry)
        return entry

    def fail(self, what: str) -> None:
        """Note a breach.

        Raises:
            InvariantBroken: in a strict world.
        """
        text = "\n".join(
            (f"{what} (seed {self._clock.seed}, at {self._clock.now:.6f} s); the last steps:", *self._trace.last())
        )
        if len(self.broken) < 20:
            self.broken.append(text)
        if self.is_strict:
            raise InvariantBroken(text)

    # At every step --------------------------------------------------------------------------------

    def began(self, entry: Entry) -> None:
        """A request was made: it must end by its deadline plus 100 ms."""
        self._trace.step(BEGAN, entry.caller, 0, entry.number)
        entry.clock.at(entry.deadline + GRACE, self._overdue, entry)  # not while its process is stopped

    def _overdue(self, entry: Entry) -> None:
        if entry.outcome is None:
            self.fail(f"{entry!r} has not ended {GRACE:g} s after its deadline")

    def ended(self, entry: Entry) -> None:
        """A request ended: once, in time, and what is said of its execution is true."""
        outcome = entry.outcome or "other"
        self._trace.step(ENDED, entry.caller, OUTCOMES.index(outcome if outcome in OUTCOMES else "other"), entry.number)
        if entry.finishes != 1:
            self.fail(f"{entry!r} ended {entry.finishes} times")
        elif entry.clock.now > max(entry.deadline, entry.clock.resumed_at) + GRACE:
            self.fail(f"{entry!r} ended {entry.clock.now - entry.deadline:.3f} s after its deadline")
        elif entry.executed == "no" and entry.executions:
            self.fail(f"{entry!r} ended as not executed, and ran")
        elif entry.outcome == "taken" and not entry.takes:
            self.fail(f"{entry!r} ended as taken, and nobody took it in")
        elif entry.executed == "yes" and not entry.executions:
            self.fail(f"{entry!r} ended as executed, and did not run")
        elif entry.outcome in ("NoRoute", "PeerLost", "Rejected", "CallTimeout"):
            self._is_excused(entry)
        elif entry.outcome == "done" and entry.kind in ("fanout", "gather"):
            self._reached_all(entry)

    def replied(self, entry: Entry, number: int, by: bytes, asked: bytes) -> None:
        """A reply was accepted: it must be for this request and from the peer that was asked."""
        if number != entry.number:
            self.fail(f"{entry!r} accepted the reply to request {number}")
        elif by != asked:
            self.fail(f"{entry!r} asked node {asked.hex()} and accepted a reply of node {by.hex()}")

    def taken(self, engine: EngineLike, moved: list[Request]) -> None:
        """Requests were taken in: within the inbox's room, and without more time than their callers gave."""
        inbox = engine.protocol.inbox
        if inbox.taken_bytes > inbox.size:
            self.fail(
                f"node {engine.index} has taken in {inbox.taken_bytes} bytes; its inbox has room for {inbox.size}"
            )
        if len(inbox.taken) > engine.room:
            self.fail(
                f"node {engine.index} has taken in {len(inbox.taken)} requests; its inbox has room for {engine.room}"
            )
        for request in moved:
            entry = self.entry_of(engine, request)
            entry.takes += 1
            # What was asked of this node first may come late, when another has been asked meanwhile.
            sent = min((when for node, when in entry.asked if node == engine.protocol.id), default=entry.started)
            entry.taken_by.append(engine)
            left = (entry.deadline - sent) * DRIFT + 0.002
            if request.kind != wire.REQUEST:
                if request.deadline is not None:
                    self.fail(f"node {engine.index} has taken in {entry!r}, a cast, and may pass over it")
            elif not request.queued and (request.deadline is None or request.deadline > engine.clock.now + left):
                self.fail(f"node {engine.index} gives {entry!r} more time than its caller does")

    def ran(self, engine: EngineLike, request: Request) -> None:
        """A handler begins to run: for the first time for this request, and not too late."""
        entry = self.entry_of(engine, request)
        self._trace.step(RAN, engine.index, 0, entry.number)
        here = (engine.protocol.id, request.target.instance)
        places = [each[1:4:2] for each in entry.executions]
        again = bool(places) and not entry.idempotent and (not request.flags & wire.FANOUT or here in places)
        copy = (*here, request.node, request.id)
        again, self._ran[copy] = again or copy in self._ran, None
        entry.executions.append(Execution(self._clock.now, here[0], request.server, here[1]))
        if again:
            self.fail(f"a handler ran again for {entry!r}")
        elif request.deadline is not None and engine.clock.now >= request.deadline:
            self.fail(f"a handler ran for {entry!r} after its deadline")
        elif entry.executed == "no":
            self.fail(f"a handler ran for {entry!r}, whose caller was told that none did")
        elif (entry.service, entry.server or request.server) != (request.service, request.server):
            self.fail(f"{request.service!r} at {request.server!r} ran {entry!r}")
        elif (request.service, request.server or request.target.offer.server) != request.target.offer[:2]:
            self.fail(f"the handlers of {request.target.offer.server!r} ran {entry!r}")

    def dropped(self, engine: EngineLike, request: Request) -> None:
        """A receiver passes over a request that it took in: not before its deadline, and never over a cast."""
        entry = self.entry_of(engine, request)
        entry.dropped += 1
        if request.kind != wire.REQUEST:
            self.fail(f"node {engine.index} passed over {entry!r}, a cast")
        if not request.cancelled and (request.deadline is None or engine.clock.now < request.deadline):
            self.fail(f"node {engine.index} passed over {entry!r} before its deadline")

    def entry_of(self, engine: EngineLike, request: Request) -> Entry:
        """The ledger's entry for a request that ``engine`` took in; of a fan-out, its part."""
        number: int = ENTRY_NUMBER.unpack_from(request.body)[0]
        entry = self._ledger[number]
        if entry.kind != "fanout":
            return entry
        part = entry.receivers.get((engine.protocol.id, request.server))
        if part is None:
            self.fail(f"node {engine.index} got a copy of {entry!r} for {request.server!r}, which was not meant for it")
        return part or entry

    def passed_on(self, body: bytes | memoryview, node: bytes, server: str) -> None:
        """A relay sends one receiver of a fan-out its copy: with the time that was left when the relay was asked."""
        part = self._ledger[ENTRY_NUMBER.unpack_from(body)[0]].receivers[node, server]
        part.asked.append((node, part.started))

    def chose(self, engine: EngineLike, route: Route, *, is_fan_out: bool = False) -> None:
        """A route was chosen: a peer whose record offers this, and a usable one unless everybody is addressed."""
        wrong = _against_route(route.peer, route.service, route.server, is_fan_out=is_fan_out)
        if wrong:
            self.fail(f"node {engine.index} chose a route to a peer {wrong}")

    # What befalls nodes, and what that excuses ----------------------------------------------------

    def befell(self, index: int) -> None:
        """Something has begun to go wrong at a node, or with its connections."""
        self._trouble[index] = self._trouble.get(index, 0) + 1
        self._was_well[index] = NEVER_WELL

    def passed(self, index: int) -> None:
        """It is over, and forgotten after :data:`WELL_AFTER`."""
        self._trouble[index] -= 1
        if not self._trouble[index]:
            self._was_well[index] = self._clock.now + WELL_AFTER

    def is_well(self, index: int, since: float) -> bool:
        """Whether nothing befell a node from ``since`` on, and long enough before."""
        return self._was_well.get(index, 0.0) <= since

    def _began_at(self, entry: Entry) -> float:
        """When ``entry`` was made, on the world's clock."""
        return max(0.0, self._clock.now - (entry.clock.now - entry.started) * DRIFT)

    def _is_excused(self, entry: Entry) -> None:
        """A request that failed between nodes that nothing befell: there must be another reason."""
        since = self._began_at(entry)
        if not self.is_well(entry.caller, since) or _is_relayed(entry):
            return
        last = entry.asked[-1][0] if entry.asked else b""
        node = entry.route.peer.id if entry.route is not None else last  # it may have failed before it could be asked
        asked = next((engine for engine in self.engines if engine.protocol.id == node), None)
        error = entry.error
        if asked is not None and not asked.is_over and self.is_well(asked.index, since):
            if entry.outcome == "PeerLost":
                self.fail(f"{entry!r} lost node {asked.index}, which nothing befell")
            elif isinstance(error, Rejected) and error.reason not in ("full", "expired", "duplicate"):
                self.fail(f"{entry!r} was refused by node {asked.index}, which nothing befell: {error.reason}")
            elif entry.outcome == "CallTimeout" and self._was_answered(entry, asked):
                self.fail(f"{entry!r} was answered by node {asked.index}, which nothing befell, and timed out")
        if isinstance(error, NoRoute | PeerLost) and error.executed == "no" and entry.parent is None:
            well = self._offering(entry, since)
            if well is not None:
                self.fail(f"{entry!r} ended while node {well.index} offered it, which nothing befell")

    def _was_answered(self, entry: Entry, asked: EngineLike) -> bool:
        if entry.kind == "cast":
            return asked in entry.taken_by and entry.clock.now > entry.asked[-1][1] + REPLY_TAKES
        last = entry.executions[-1] if entry.executions else None
        if last is None or entry.work is None or last.node != asked.protocol.id or entry.monitor is not None:
            return False
        return last.time + entry.work + REPLY_TAKES < self._clock.now

    def _offering(self, entry: Entry, since: float) -> EngineLike | None:
        """Somebody whom nothing befell, whom the caller knew and did not ask, and who offers what is asked for."""
        asked = {node for node, _ in entry.asked}  # who was asked had a reason, which is judged where it is told
        caller = next(each for each in reversed(self.engines) if each.index == entry.caller)
        for engine in self.engines:
            peer = caller.protocol.peers.peers.get(engine.protocol.id)
            if peer is None or peer.record is None or engine.is_over or not self.is_well(engine.index, since):
                continue
            if engine.protocol.id in asked:
                continue
            servers = peer.record.services.get(entry.service, ())
            if entry.server in servers if entry.server else servers:
                return engine
        return None

    def _reached_all(self, entry: Entry) -> None:
        """A fan-out addresses everybody who is known."""
        if not self.is_well(entry.caller, self._began_at(entry)):
            return
        addressed = {node for node, _ in entry.receivers}
        for engine in self.engines:
            offered = any(target.offer.service == entry.service for target in engine.targets)
            if entry.server or not offered or engine.is_over:
                continue
            if engine.protocol.id not in addressed and self.is_well(engine.index, self._began_at(entry)):
                self.fail(f"{entry!r} did not address node {engine.index}, which nothing befell")

    def expect_news(self, of: EngineLike, within: float) -> None:
        """A process has died: whoever waits for it must hear of that ``within`` seconds, whatever the deadline."""
        now = self._clock.now
        waiting = [
            (entry, len(entry.asked))
            for engine in self.engines
            if not engine.is_over and self.is_well(engine.index, now)
            for entry in engine.under_way.values()
            if entry.asked and entry.asked[-1][0] == of.protocol.id and not (entry.idempotent or _is_relayed(entry))
        ]
        if waiting:
            self._clock.after(within + GRACE, self._heard, (of, waiting, now))

    def _heard(self, of: tuple[EngineLike, list[tuple[Entry, int]], float]) -> None:
        engine, waiting, since = of
        for entry, attempts in waiting:
            if entry.outcome is None and len(entry.asked) == attempts and self.is_well(entry.caller, since):
                self.fail(
                    f"{entry!r} still waits for node {engine.index}, which died {self._clock.now - since:.1f} s ago"
                )

    def bounds(self, engine: EngineLike) -> None:
        """The tables of a node hold no more than they may: checked now and then."""
        for peer in engine.protocol.peers.peers.values():
            if len(peer.calls.pending) > peer.calls.room.messages + 3:  # the hello, and what asks whether it answers
                self.fail(
                    f"node {engine.index} has {len(peer.calls.pending)} requests under way to node {peer.id.hex()}; "
                    f"the window is {peer.calls.room.messages}"
                )
            if peer.record is None and peer.link is None:
                self.fail(f"node {engine.index} keeps node {peer.id.hex()}, which has neither record nor connection")
        inbox = engine.protocol.inbox
        if inbox.taken_bytes != sum(request.size for request in inbox.taken):
            self.fail(f"node {engine.index} counts {inbox.taken_bytes} bytes taken in, and holds others")
        self.routes(engine)

    # At rest --------------------------------------------------------------------------------------

    def at_rest(self, engines: Iterable[EngineLike]) -> None:
        """Nothing is under way any more: no table holds anything, and the routes are those of the peers."""
        for entry in self._ledger:
            if entry.outcome is None:
                self.fail(f"{entry!r} has not ended")
            was_taken = entry.outcome == "taken" and not any(engine.is_over for engine in entry.taken_by)
            if was_taken and not entry.executions:
                self.fail(f"{entry!r} was taken in by a node that lives, and did not run")
        for engine in engines:
            inbox = engine.protocol.inbox
            left = engine.unfinished()
            if inbox.taken or inbox.taken_bytes or inbox.outgoing or inbox.timer() is not None:
                left.append(f"{len(inbox.taken)} requests ({inbox.taken_bytes} bytes) taken in and not finished")
            for peer in engine.protocol.peers.peers.values():
                calls = [call for call in peer.calls.pending.values() if call.kind in (wire.REQUEST, wire.CAST)]
                if calls:
                    left.append(f"{len(calls)} calls to node {peer.id.hex()}")
            if left:
                self.fail(f"node {engine.index} at rest holds " + ", ".join(left))
            self.routes(engine)

    def routes(self, engine: EngineLike) -> None:
        """Routes list every usable peer with a record, and nothing else."""
        listed: set[tuple[bytes, str, str]] = set()
        for service, routes in engine.protocol.routes.by_service.items():
            for route in routes:
                wrong = _against_route(route.peer, service, route.server)
                if wrong or engine.protocol.peers.peers.get(route.peer.id) is not route.peer:
                    self.fail(f"node {engine.index} lists a route to a peer {wrong or 'it does not know'}")
                listed.add((route.peer.id, service, route.server))
        for peer in engine.protocol.peers.peers.values():
            if peer.record is None or not peer.usable or peer.record.state != "serving":
                continue
            for service, servers in peer.record.services.items():
                if not all((peer.id, service, server) in listed for server in servers):
                    self.fail(f"node {engine.index} lists no route to node {peer.id.hex()}, which is {peer.state}")

    def messages(self, sent: int, links: int, beats: int, probes: int = 0) -> None:
        """All messages are explained by what was asked for and by connections opened; none by how many nodes there are.

        Args:
            sent: messages in the whole run; ``links``: connections opened; ``beats``: signs of life asked for;
                ``probes``: questions whether a peer answers.
        """
        attempts = sum(len(entry.asked) for entry in self._ledger)
        # A request, its answer (or two, where it met a duplicate) and a cancellation; a hello, its answer, a goodbye.
        most = 4 * attempts + 4 * links + beats + 2 * probes
        if sent > most:
            self.fail(f"{sent} messages for {attempts} attempts and {links} connections, which explain {most}")


ENTRY_NUMBER = struct.Struct("<Q")
REPLY_BODY = struct.Struct("<Q16s")


def _is_relayed(entry: Entry) -> bool:
    """Whether it is a fan-out that goes by relays, or a part of one: what becomes of it, its caller hears of them."""
    whole = entry.parent or entry
    return whole.kind == "fanout" and bool(whole.asked)


def _against_route(peer: Peer, service: str, server: str, *, is_fan_out: bool = False) -> str:
    record: Any = peer.record
    if record is None:
        return "without a record"
    if not peer.usable and not is_fan_out:
        return f"that is {peer.state}, after {peer.failures} failures"
    if record.state != "serving" or server not in record.services.get(service, ()):
        return f"whose record does not offer {service!r} at {server!r}"
    return ""
