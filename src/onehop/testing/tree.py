"""Fan-outs through relays, as ``transport/tree.py`` sends them, on virtual time. What is decided is the real core's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from onehop.errors import CallError, PeerLost, Rejected, WireError
from onehop.interfaces import Record
from onehop.protocol import tree, wire
from onehop.protocol.calls import REPLIED, Call
from onehop.protocol.inbox import Request
from onehop.protocol.routes import Route
from onehop.testing.clock import Task, Waiting
from onehop.testing.invariants import ENTRY_NUMBER, Entry
from onehop.testing.link import EngineLink

if TYPE_CHECKING:
    from onehop.testing.engine import VirtualEngine

AT_ONCE = 8
HURRY = 1.0
MARGIN = 0.5
"""As in the real engine."""


class VirtualTree:
    """The origin's part and a relay's, of one engine. It is the target of what a relay is asked."""

    def __init__(self, engine: VirtualEngine) -> None:
        self._engine = engine
        self._turn = 0
        self.under_way = 0

    def __len__(self) -> int:
        return self.under_way

    # The origin -----------------------------------------------------------------------------------

    def fan_out(self, entry: Entry, receivers: Sequence[Route]) -> None:
        """Send the parts of ``entry`` to their ``receivers``."""
        engine = self._engine
        chunks, direct = tree.plan(receivers, engine.protocol.id, self._turn)
        self._turn += 1
        for chunk in chunks:
            task = Task(engine.clock)
            task.start(self._ask(entry, chunk, task))
        for route in direct:
            engine.post(_part(entry, route), route)

    def _ask(self, entry: Entry, chunk: tree.Chunk, task: Task) -> Waiting:
        engine, now = self._engine, self._engine.clock.now
        body = ENTRY_NUMBER.pack(entry.number) + bytes(max(0, entry.size - ENTRY_NUMBER.size))
        request = tree.request(entry.service, "work", map(tree.receiver_of, chunk.receivers), body)
        peer = chunk.relay.peer
        link = yield from engine.connect(peer, now + min(HURRY, (entry.deadline - now) / 4), task)
        call = Call(wire.REQUEST, entry.deadline, len(request))
        error: CallError | None = PeerLost("it was not asked", executed="no")
        if isinstance(link, EngineLink) and not link.calls.full(len(request)):
            entry.asked.append((peer.id, engine.clock.now))
            section = wire.names(tree.SERVICE, "", tree.METHOD)
            link.calls.begin(call)
            error = yield from engine.ask(link, call, 0, None, section, request, task)
        if not engine.dead:
            self._hear(entry, chunk, call, error)

    def _hear(self, entry: Entry, chunk: tree.Chunk, call: Call, error: CallError | None) -> None:
        told = [tree.Receipt(tree.UNKNOWN, 0.0, "", "its relay was lost")] * len(chunk.receivers)
        if error is None and call.outcome == REPLIED:
            told = tree.parse_receipts(call.body, len(chunk.receivers))
        elif error is not None and error.executed == "no":
            told = [tree.Receipt(tree.NOT_SENT, 0.0)] * len(chunk.receivers)
        for route, receipt in zip(chunk.receivers, told, strict=True):
            part = _part(entry, route)
            if receipt.outcome == tree.NOT_SENT:
                self._engine.post(part, route)
            elif receipt.outcome == tree.TAKEN:
                self._engine.finish(part, "taken")
            elif receipt.outcome == tree.REFUSED:
                executed = "unknown" if receipt.reason == "duplicate" else "no"
                refusal = Rejected(receipt.text, reason=receipt.reason, executed=executed)  # type: ignore[arg-type]
                self._engine.finish(part, "error", refusal)
            else:
                self._engine.finish(part, "error", PeerLost(receipt.text))

    # A relay --------------------------------------------------------------------------------------

    def serve(self, request: Request) -> None:
        """Pass on what ``request`` asks for, or refuse it; called again when it has news."""
        engine = self._engine
        if request.queued:
            return
        request.queued = True
        if self.under_way >= AT_ONCE:
            engine.reply(request, wire.reject(request.id, "full"))
            return
        try:
            service, method, receivers, body = tree.parse_request(request.body)
        except WireError:
            engine.reply(request, wire.reject(request.id, "malformed"))
            return
        self.under_way += 1
        now = engine.clock.now
        left = (request.deadline or now) - now
        job = _Job(request, service, method, body, now + left - min(MARGIN, left / 10), dict.fromkeys(receivers))
        for receiver in receivers:
            task = Task(engine.clock)
            task.start(self._pass_on(job, receiver, task))

    def _pass_on(self, job: _Job, receiver: tree.Receiver, task: Task) -> Waiting:
        engine, told, body = self._engine, job.told, job.body
        record = Record(node=receiver.node, host=receiver.host, endpoints=receiver.endpoints)
        peer = engine.protocol.peers.introduce(record)
        link = yield from engine.connect(peer, job.until, task)
        receipt = tree.Receipt(tree.NOT_SENT, 0.0)
        if isinstance(link, EngineLink) and not link.calls.full(len(body)):
            engine.invariants.passed_on(body, peer.id, receiver.server)
            call = Call(wire.CAST, job.until, len(body))
            section = wire.names(job.service, receiver.server, job.method)
            link.calls.begin(call)
            error = yield from engine.ask(link, call, wire.FANOUT, None, section, bytes(body), task)
            receipt = _receipt(call, error)
        told[receiver] = receipt
        if None not in told.values() and not engine.dead:
            self.under_way -= 1
            answer = tree.receipts(each for each in told.values() if each is not None)
            engine.reply(job.request, wire.answer(wire.REPLY, 0, job.request.id, answer))


class _Job(NamedTuple):
    """What a relay was asked to pass on, and what became of it."""

    request: Request
    service: str
    method: str
    body: wire.Body
    until: float
    told: dict[tree.Receiver, tree.Receipt | None]


def _part(entry: Entry, route: Route) -> Entry:
    return entry.receivers[route.peer.id, route.server]


def _receipt(call: Call, error: CallError | None) -> tree.Receipt:
    if error is None:
        return tree.Receipt(tree.TAKEN, 0.0)
    outcome = tree.REFUSED if isinstance(error, Rejected) else tree.UNKNOWN
    if error.executed == "no" and not call.sent:
        outcome = tree.NOT_SENT
    return tree.Receipt(outcome, 0.0, getattr(error, "reason", ""), str(error))
