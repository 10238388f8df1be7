"""zerorpc: RPC over ZeroMQ with gevent; callers are greenlets. One way: its pushers and publishers."""

from __future__ import annotations

import json
from itertools import cycle
from time import perf_counter
from typing import Any

import gevent
import zerorpc

from benchmarks.messages import Message, answer, decode, encode
from benchmarks.rabbitmq import free_ports
from benchmarks.system import Sample, Setup, repeat

BATCH = 100


class Server:
    """Answers in a greenlet for each call."""

    def __init__(self, setup: Setup) -> None:
        self._server = zerorpc.Server({"call": lambda request: encode(answer(decode(request)))})

    def start(self) -> str:
        address = f"tcp://127.0.0.1:{free_ports(1)[0]}"
        self._server.bind(address)
        return address

    def serve(self) -> None:
        self._server.run()

    def received(self) -> int:
        return 0


class Client:
    """A connection to each server, taken in turn."""

    def __init__(self, setup: Setup) -> None:
        self._message = Message(setup.message)

    def connect(self, addresses: list[str]) -> None:
        self._connections = cycle([zerorpc.Client(each) for each in addresses])

    def run(self, seconds: float, callers: int) -> Sample:
        connections, body, expected = self._connections, self._message.body, self._message.answer

        def call() -> Any:
            return decode(next(connections)("call", encode(body)))

        began = perf_counter()
        greenlets = [gevent.spawn(repeat, call, seconds, expected) for _ in range(callers)]
        gevent.joinall(greenlets, raise_error=True)
        return Sample.of((each.value for each in greenlets), perf_counter() - began)


class Taker:
    """Pullers or subscribers, each at an address of its own.

    Args:
        taker: ``"Puller"`` or ``"Subscriber"``.
        giver: what the client is.
    """

    def __init__(self, setup: Setup, taker: str, giver: str) -> None:
        self._takers = [getattr(zerorpc, taker)({"take": self._take}) for _ in range(setup.receivers)]
        self._received = 0

    def _take(self, message: bytes) -> None:
        decode(message)
        self._received += 1

    def start(self) -> str:
        addresses = [f"tcp://127.0.0.1:{port}" for port in free_ports(len(self._takers))]
        for each, address in zip(self._takers, addresses, strict=True):
            each.bind(address)
        return json.dumps(addresses)

    def serve(self) -> None:
        gevent.joinall([gevent.spawn(each.run) for each in self._takers], raise_error=True)

    def received(self) -> int:
        return self._received


class Giver:
    """A pusher (to one taker) or a publisher (to all; it drops what a slow one leaves too long)."""

    def __init__(self, setup: Setup, taker: str, giver: str) -> None:
        self._message, self._giver = Message(setup.message), getattr(zerorpc, giver)()

    def connect(self, addresses: list[str]) -> None:
        for each in addresses:
            for address in json.loads(each):
                self._giver.connect(address)

    def cast(self, seconds: float) -> Sample:
        give, body = self._giver.take, self._message.body
        sent, began = 0, perf_counter()
        while perf_counter() - began < seconds:
            for _ in range(BATCH):
                give(encode(body))
            sent += BATCH
        return Sample(sent, perf_counter() - began)

    fanout = cast
