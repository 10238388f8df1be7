"""Eclipse Zenoh between peers: a queryable answers calls, a subscriber takes one-way messages.

Peers connect where they are told, without multicast or gossip, so that each process has exactly the connections that
its part needs. The rest is as users get it; above all, a publisher drops what would congest.
"""

from __future__ import annotations

import json
import threading
import time
from itertools import cycle
from time import perf_counter
from typing import Any

import zenoh

from benchmarks.messages import Message, answer, decode, encode
from benchmarks.rabbitmq import free_ports
from benchmarks.system import Sample, Setup, in_threads, stream

MATCH_LIMIT = 30.0


def open_session(listen: list[str], connect: list[str]) -> zenoh.Session:
    """A peer with exactly these endpoints."""
    config = zenoh.Config()
    for key, value in {
        "mode": "peer",
        "listen/endpoints": listen,
        "connect/endpoints": connect,
        "scouting/multicast/enabled": False,
        "scouting/gossip/enabled": False,
    }.items():
        config.insert_json5(key, json.dumps(value))
    return zenoh.open(config)


def await_match(end: zenoh.Querier | zenoh.Publisher) -> None:
    """Return when somebody answers to, or takes, what ``end`` sends.

    Raises:
        TimeoutError: nobody does.
    """
    give_up = time.monotonic() + MATCH_LIMIT
    while not end.matching_status.matching:  # type: ignore[attr-defined]  # its stubs say bool
        if time.monotonic() > give_up:
            raise TimeoutError(f"nobody has declared {end.key_expr} within {MATCH_LIMIT:.0f} s")
        time.sleep(0.01)


class Server:
    """Answers and takes in callbacks, in zenoh's own threads. Its address: a key for calls, and where its peers are."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._received = setup, 0

    def start(self) -> str:
        endpoints = [f"tcp/127.0.0.1:{port}" for port in free_ports(self._setup.receivers)]
        self._sessions = [open_session([each], []) for each in endpoints]
        key = f"{self._setup.service}/call/{self._setup.name}"

        def reply(query: zenoh.Query) -> None:
            assert query.payload is not None
            query.reply(key, encode(answer(decode(query.payload.to_bytes()))))

        self._queryable = self._sessions[0].declare_queryable(key, reply, complete=True)
        self._subscribers = [
            each.declare_subscriber(f"{self._setup.service}/cast", self._take) for each in self._sessions
        ]
        return json.dumps([key, endpoints])

    def _take(self, sample: zenoh.Sample) -> None:
        decode(sample.payload.to_bytes())
        self._received += 1

    def serve(self) -> None:
        threading.Event().wait()

    def received(self) -> int:
        return self._received


class Client:
    """Threads call through one session; it knows each server by a key, and takes them in turn."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._message = setup, Message(setup.message)

    def connect(self, addresses: list[str]) -> None:
        found = [json.loads(each) for each in addresses]
        self._session = open_session([], [each for _, endpoints in found for each in endpoints])
        # One answer is wanted: there is nothing to consolidate.
        queriers = [
            self._session.declare_querier(key, consolidation=zenoh.ConsolidationMode.NONE, timeout=30)
            for key, _ in found
        ]
        self._publisher = self._session.declare_publisher(f"{self._setup.service}/cast")
        for each in queriers:
            await_match(each)
        await_match(self._publisher)
        self._queriers = cycle(queriers)

    def run(self, seconds: float, callers: int) -> Sample:
        queriers, body = self._queriers, self._message.body

        def call() -> Any:
            found = next(queriers).get(payload=encode(body)).recv().ok
            if found is None:
                raise RuntimeError("zenoh gave an error in place of an answer: it found nobody, or its time was up")
            return decode(found.payload.to_bytes())

        return in_threads(call, seconds, callers, self._message.answer)

    def cast(self, seconds: float) -> Sample:
        put, body = self._publisher.put, self._message.body
        sent, began = stream(lambda: put(encode(body)), seconds)
        return Sample(sent, perf_counter() - began)

    fanout = cast
