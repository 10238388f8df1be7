"""Fan-outs to very many receivers by way of relays: who passes on to whom, and what the two say to each other (wire 8).

The tree has two levels. The origin splits the receivers into chunks, and asks one willing node of each to pass the cast
on to the rest of it. Chunks follow from the node ids alone, and relays stay for a while: so the links that a fan-out
needs, about ``sqrt(n)`` at the origin and at each relay, are warm when the next one comes.

Until nodes have keys a relay is trusted as every peer is: with what it passes on, and with what it says became of it.
With keys the origin signs the body, which a relay never touches.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from math import isqrt
from typing import NamedTuple

from onehop.errors import WireError
from onehop.protocol import wire
from onehop.protocol.routes import Route
from onehop.protocol.wire import Body

SERVICE, METHOD = "onehop.relay", "fanout"
"""Where relays are asked. No record lists it: ``Record.relay`` says who is willing."""
DEGREE = 100
"""Chunks, about, at most: beyond, they become larger instead."""
STAY = 64
"""Fan-outs of one origin for which a chunk keeps its relay, if that lives."""

OUTCOMES = TAKEN, REFUSED, UNKNOWN, NOT_SENT = "taken", "refused", "unknown", "not sent"
"""What a relay says of a receiver. Only what was NOT_SENT may be sent again."""

_HEAD = struct.Struct("<I")
_NONSENSE = (struct.error, ValueError, TypeError, AttributeError, RecursionError)
_Numbered = tuple[int, Route]


# Who passes on to whom ----------------------------------------------------------------------------


class Chunk(NamedTuple):
    """The receivers that ``relay`` is asked to pass on to. It is none of them: the origin sends it its own copy."""

    relay: Route
    receivers: list[Route]


def plan(routes: Sequence[Route], own: bytes, turn: int) -> tuple[list[Chunk], list[Route]]:
    """Whom a fan-out is sent to: relays with their chunks, and the receivers to which it goes directly.

    Each receiver is in exactly one of them.

    Args:
        routes: all receivers.
        own: the origin's node id. It is no relay of its own.
        turn: how many fan-outs the origin has made: relays take turns, and no two origins have the same.
    """
    size = max(isqrt(len(routes)), len(routes) // DEGREE) * 3 // 2
    place = int.from_bytes(blake2b(own + (turn // STAY).to_bytes(8, "little"), digest_size=16).digest(), "big")
    numbered = [(int.from_bytes(route.peer.id, "big"), route) for route in routes]
    chunks: list[Chunk] = []
    direct: list[Route] = []
    for part in _split(numbered, own, size, 1):
        relay = min((each for each in part if _is_willing(each, own)), key=lambda each: each[0] ^ place, default=None)
        if relay is not None:
            rest = [route for number, route in part if number != relay[0]]
            if rest:
                chunks.append(Chunk(relay[1], rest[: 4 * size]))
            direct += rest[4 * size :]
        direct += [route for number, route in part if relay is None or number == relay[0]]
    return chunks, direct


def _split(routes: list[_Numbered], own: bytes, size: int, bit: int) -> list[list[_Numbered]]:
    """Halve by one bit of the node ids after the other: who comes or goes changes its own chunk only.

    Not where a half would have no relay.
    """
    if len(routes) > size:
        halves: tuple[list[_Numbered], list[_Numbered]] = ([], [])
        for each in routes:
            halves[each[0] & bit != 0].append(each)
        if all(any(_is_willing(each, own) for each in half) for half in halves):
            return [part for half in halves for part in _split(half, own, size, bit << 1)]
    return [routes]


def _is_willing(each: _Numbered, own: bytes) -> bool:
    peer = each[1].peer
    return peer.record is not None and peer.record.relay and not peer.failures and peer.id != own


# What they say to each other ----------------------------------------------------------------------


class Receiver(NamedTuple):
    """Whom a relay is to send to. It need not know the service, whose records may be 10,000, to find this one."""

    node: str
    server: str
    host: str
    endpoints: tuple[str, ...]


class Receipt(NamedTuple):
    """What a relay says of one receiver.

    Args:
        outcome: TAKEN, REFUSED, UNKNOWN or NOT_SENT.
        seconds: from the relay's taking the request in until it knew.
        reason: of a refusal; one of :data:`onehop.protocol.wire.REASONS`.
        text: for people.
    """

    outcome: str
    seconds: float
    reason: str = ""
    text: str = ""


def receiver_of(route: Route) -> Receiver:
    """``route`` as a relay is told of it."""
    record = route.peer.record
    host, endpoints = ("", ()) if record is None else (record.host, record.endpoints)
    return Receiver(route.peer.id.hex(), route.server, host, endpoints)


def request(service: str, method: str, receivers: Iterable[Receiver], body: Body) -> bytes:
    """The body of a request to a relay (wire 8.2): pass the cast ``body`` on to ``receivers``."""
    head = _json([service, method, list(receivers)])
    return b"".join((_HEAD.pack(len(head)), head, body))


def parse_request(raw: Body) -> tuple[str, str, list[Receiver], Body]:
    """Service, method, receivers and body of a request to a relay.

    Raises:
        WireError: it is not that.
    """
    try:
        end = _HEAD.size + _HEAD.unpack_from(raw)[0]
        service, method, told = json.loads(bytes(raw[_HEAD.size : end]))
        receivers = [Receiver(node, server, host, tuple(endpoints)) for node, server, host, endpoints in told]
        for node, server, host, endpoints in receivers:
            wire.names(service, server, method)
            is_text = all(isinstance(each, str) for each in (host, *endpoints))
            if len(bytes.fromhex(node)) != 16 or not endpoints or not is_text:
                raise WireError(f"{node!r} on {host!r} at {endpoints!r} is no receiver")
    except _NONSENSE as error:
        raise WireError(f"a request to a relay that cannot be read: {error}") from None
    return service, method, receivers, raw[end:]


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def receipts(told: Iterable[Receipt]) -> bytes:
    """The body of a relay's answer (wire 8.3), in the order of the request."""
    return _json(list(told))


def parse_receipts(raw: Body, number: int) -> list[Receipt]:
    """What a relay says of the ``number`` receivers it was asked to pass on to.

    Raises:
        WireError: it is not that.
    """
    try:
        found = [Receipt(str(outcome), float(seconds), str(reason), str(text))
                 for outcome, seconds, reason, text in json.loads(bytes(raw))]  # fmt: skip
    except _NONSENSE as error:
        raise WireError(f"an answer of a relay that cannot be read: {error}") from None
    if len(found) != number or any(each.outcome not in OUTCOMES for each in found):
        raise WireError(f"an answer of a relay that is not one of {', '.join(OUTCOMES)} for each of {number}")
    return found
