"""Fan-outs through relays: the origin's part, and a relay's. What is decided is asked of ``protocol/tree.py``.

At most once, as ever: a chunk goes a second way only if its relay surely took nothing, and a receiver only if the relay
says that it sent it nothing. Where a relay took the request and was lost, that is what the receipts say.
"""

from __future__ import annotations

import logging
from collections import deque
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING

from onehop.errors import PeerLost, Rejected, WireError
from onehop.interfaces import Record
from onehop.protocol import tree, wire
from onehop.protocol.inbox import Inbox, Request
from onehop.protocol.routes import Route
from onehop.protocol.wire import Body
from onehop.transport.inbound import Inbound
from onehop.transport.queue import Queue
from onehop.transport.requests import Attempt, Parcel, Terms, name_of

if TYPE_CHECKING:
    from onehop.transport.caller import Caller

log = logging.getLogger("onehop")

AT_ONCE = 8
"""Requests that a relay works at; one that comes then is refused, and its origin goes the direct way."""
BRIEF = 0.02
"""Seconds for which the origin waits for one relay before it looks after the next."""
HURRY = 1.0
"""Seconds, or a quarter of the time there is, after which a relay that cannot be reached is not waited for."""
MARGIN = 0.5
"""Seconds, or a tenth of the time there is, that a relay keeps for its answer to travel."""

Relayed = tuple[Attempt, list[Attempt]]
"""The request to a relay, and the attempts of its chunk."""


class Tree:
    """Both parts, of one engine.

    Args:
        caller: sends, and waits in the engine's way.
    """

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._turns = count()
        self._places = deque(range(AT_ONCE))

    # The origin -----------------------------------------------------------------------------------

    async def fan_out(self, everyone: list[Attempt], body: Body) -> None:
        """Send a cast to the routes of all attempts, and see each to its outcome or ``error``."""
        caller = self._caller
        chunks, direct = tree.plan([each.route for each in everyone], caller.protocol.id, next(self._turns))
        attempts, first = {each.route: each for each in everyone}, everyone[0]
        terms = Terms(tree.SERVICE, "", first.until - first.started, 0.0)
        relayed: list[Relayed] = []
        parcels: list[Parcel] = []
        for relay, receivers in chunks:
            request = tree.request(first.terms.service, first.method, map(tree.receiver_of, receivers), body)
            if len(request) > caller.settings.max_message:
                direct += receivers
                continue
            asked = Attempt(terms, tree.METHOD, first.until, first.started)
            asked.route = Route(relay.peer, tree.SERVICE, "")
            relayed.append((asked, [attempts[route] for route in receivers]))
            parcels.append((asked, wire.REQUEST, 0, request))
        sent = [attempts[route] for route in direct]
        parcels += [(each, wire.CAST, wire.FANOUT, body) for each in sent]
        try:
            await self._see_through(parcels, relayed, sent, body)
        except BaseException:  # who asked was interrupted, or cancelled
            for asked, _told in relayed:
                if asked.error is None and asked.under_way:
                    caller.cancel(asked.link, asked.call)
            raise
        await caller.conclude_all(sent)

    async def _see_through(
        self, waiting: list[Parcel], relayed: list[Relayed], sent: list[Attempt], body: Body
    ) -> None:
        """Send what is ``waiting``, until every relay has answered, or is lost.

        Args:
            sent: gets the attempts which go directly since a relay surely did not pass them on.
        """
        caller = self._caller
        waiting = caller.send_all(waiting)
        while waiting or relayed:
            waiting = await caller.send_ready(waiting)
            still: list[Relayed] = []
            unsent: list[Attempt] = []
            for each in relayed:
                if await self._is_open(each[0]):
                    still.append(each)
                else:
                    unsent += self._hear(*each)
            relayed = still
            caller.look_at(sent)
            waiting = [parcel for parcel in waiting if parcel[0].error is None]
            waiting += caller.send_all((each, wire.CAST, wire.FANOUT, body) for each in unsent)
            sent += unsent

    async def _is_open(self, asked: Attempt) -> bool:
        """Whether a relay may still answer; if not, ``asked`` has its outcome or ``error``."""
        now = monotonic()
        if asked.error is not None:
            return False
        if not asked.under_way:
            if now < asked.started + min(HURRY, (asked.until - asked.started) / 4):
                return True
            asked.error = PeerLost(f"{asked} could not be reached soon enough", executed="no")
            return False
        call = asked.call
        if (
            call.outcome is None and now < asked.until
            and not await self._caller.wait(asked.link, call, call.signs, min(now + BRIEF, asked.until))
        ):  # fmt: skip
            return True
        await self._caller.conclude(asked)
        return False

    def _hear(self, asked: Attempt, told: list[Attempt]) -> list[Attempt]:
        """Take in what a relay said of its chunk; returns the attempts of which nothing was sent."""
        asked.seconds = monotonic() - asked.started
        relay, error = name_of(asked.route.peer), asked.error
        said: list[tree.Receipt] = []
        try:
            if error is None:
                said = tree.parse_receipts(asked.call.body, len(told))
        except WireError as wrong:  # or it says that it failed
            error = PeerLost(str(wrong))
        if error is not None:
            outcome, why = tree.NOT_SENT if error.executed == "no" else tree.UNKNOWN, f"was lost ({error})"
            said = [tree.Receipt(outcome, 0.0, "", f"{each}: its relay {why}; unknown whether it ran") for each in told]
        way = asked.seconds - max(each.seconds for each in said)
        unsent = []
        for each, (outcome, seconds, reason, text) in zip(told, said, strict=True):
            each.seconds = way + seconds
            text = f"{text} (through a relay, {relay})"
            if outcome == tree.NOT_SENT:
                unsent.append(each)
            elif outcome == tree.REFUSED:
                each.error = Rejected(text, reason=reason, executed="unknown" if reason == "duplicate" else "no")
            elif outcome == tree.UNKNOWN:
                each.error = PeerLost(text)
        return unsent

    # A relay --------------------------------------------------------------------------------------

    def offer(self, inbound: Inbound) -> None:
        """Take requests to pass something on, where the settings say that this node is willing."""
        if self._caller.settings.relay:
            # Whoever receives only admits them: neither is it held up, nor are the workers of a service.
            queue = Queue(self._admit, 1, inline=frozenset((tree.METHOD,)))
            queue.inbound = inbound
            inbound.change(Inbox.offer, tree.SERVICE, "", queue)

    def _admit(self, request: Request) -> None:
        inbound: Inbound = request.target.inbound
        if request.kind != wire.REQUEST or request.method != tree.METHOD:
            inbound.refuse(request, "malformed")
            return
        try:
            place = self._places.pop()
        except IndexError:
            inbound.refuse(request, "full")
            return
        steps = self._serve(request, place)
        try:
            self._caller.spawn(steps)
        except RuntimeError:
            steps.close()
            self._places.append(place)
            inbound.refuse(request, "full")

    async def _serve(self, request: Request, place: int) -> None:
        """Pass on what ``request`` asks for, and answer it."""
        inbound: Inbound = request.target.inbound
        try:
            if self._caller.protocol.inbox.expired(request, monotonic()):
                inbound.refuse(request, "expired")
                return
            try:
                parsed = tree.parse_request(request.body)
            except WireError:
                inbound.refuse(request, "malformed")
                return
            try:
                receipts = await self._pass_on(request, *parsed)
                frame = wire.answer(wire.REPLY, 0, request.id, tree.receipts(receipts))
            except Exception:  # some may have been sent: whoever asked has to hear that it is unknown
                if not self._caller.closed:
                    log.exception("passing a fan-out on for node %s met an error", request.node.hex())
                frame = wire.answer(wire.REPLY, wire.FAILED, request.id, b"")
            inbound.answer(request, frame)
        finally:
            self._places.append(place)

    async def _pass_on(
        self, request: Request, service: str, method: str, receivers: list[tree.Receiver], body: Body
    ) -> list[tree.Receipt]:
        caller, now = self._caller, monotonic()
        left = caller.settings.timeout if request.deadline is None else request.deadline - now
        left -= min(MARGIN, left / 10)
        terms, attempts = Terms(service, "", left, 0.0), []
        with caller.lock:
            for node, server, host, endpoints in receivers:
                record = Record(node=node, host=host, endpoints=endpoints)
                attempts.append(Attempt(terms, method, now + left, now))
                attempts[-1].route = Route(caller.protocol.peers.introduce(record), service, server)
        parcels = [(each, wire.CAST, wire.FANOUT, body) for each in attempts]
        await caller.see_through(attempts, caller.send_all(parcels))
        return list(map(_receipt, attempts))


def _receipt(attempt: Attempt) -> tree.Receipt:
    """What a relay says of one receiver."""
    error = attempt.error
    if error is None:
        return tree.Receipt(tree.TAKEN, attempt.seconds)
    outcome = tree.REFUSED if isinstance(error, Rejected) else tree.UNKNOWN
    if error.executed == "no" and not (attempt.under_way and attempt.call.sent):
        outcome = tree.NOT_SENT
    return tree.Receipt(outcome, attempt.seconds, getattr(error, "reason", ""), str(error))
