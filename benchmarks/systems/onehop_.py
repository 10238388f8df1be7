"""onehop's blocking face, as a program uses it, over its default transport between the processes of a host: ipc."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import onehop
from benchmarks.messages import Message, answer
from benchmarks.system import Sample, Setup, in_threads

FANNERS = 16
"""Fan-outs under way at once: each waits for its receipts, where a publisher of others waits for nothing."""
STRETCH = 64
"""Casts between two looks at the clock."""
START_LIMIT = 30.0
"""Seconds until all servers must have been seen."""
LARGEST = 32 * 1024 * 1024
"""Bytes of a message: above the default, for the largest that is measured."""


def settings(setup: Setup) -> dict[str, Any]:
    """Of a node: everything in the directory of this measurement, and large messages allowed."""
    return {"run_directory": setup.directory, "realm": setup.service, "max_message": LARGEST, "registry": "local"}


class Service:
    """What is served, and how much of it came."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.received = 0

    def methods(self, inline: bool) -> dict[str, Any]:
        """The methods: run by the thread that receives, or by a pool of workers."""

        @onehop.method(inline=inline)
        def note(body: dict[str, Any]) -> None:
            with self._lock:  # several workers count
                self.received += 1

        return {"answer": onehop.method(inline=inline)(lambda body: answer(body)), "note": note}


class Server:
    """Nodes that serve, each with a pool of ``workers`` or ``inline``."""

    def __init__(self, setup: Setup, inline: bool, workers: int = 8) -> None:
        self._setup, self._inline, self._workers = setup, inline, workers
        self._service = Service()
        self._nodes = [onehop.Node(**settings(setup)) for _ in range(setup.receivers)]

    def start(self) -> str:
        methods = self._service.methods(self._inline)
        for number, node in enumerate(self._nodes):
            name = f"{self._setup.name}-{number}"
            node.serve(self._setup.service, methods, server=name, workers=self._workers)
        return self._setup.name

    def serve(self) -> None:
        self._nodes[0].run()

    def received(self) -> int:
        return self._service.received


class CastStream:
    """The arguments of one cast after the other, for ``seconds``.

    Attributes:
        sent: how many there were.
    """

    def __init__(self, body: Any, seconds: float) -> None:
        self._arguments = (body,)
        self._seconds = seconds
        self.sent = 0

    def __iter__(self) -> Iterator[tuple[Any]]:
        end = perf_counter() + self._seconds
        while perf_counter() < end:
            yield from (self._arguments,) * STRETCH
            self.sent += STRETCH


class Client:
    """One node and one client of the service, shared by its threads."""

    def __init__(self, setup: Setup, inline: bool, workers: int = 8) -> None:
        self._setup = setup
        self._message = Message(setup.message)
        self._node = onehop.Node(**settings(setup))
        self._client = self._node.client(setup.service)

    def connect(self, addresses: list[str]) -> None:
        self._receivers = len(addresses) * self._setup.receivers
        if not self._node.wait_for(self._setup.service, count=self._receivers, timeout=START_LIMIT):
            raise TimeoutError(f"not all of {self._receivers} servers were seen within {START_LIMIT:.0f} s")

    def run(self, seconds: float, callers: int) -> Sample:
        call, body = self._client.call, self._message.body
        return in_threads(lambda: call("answer", body), seconds, callers, self._message.answer)

    def cast(self, seconds: float) -> Sample:
        stream, began = CastStream(self._message.body, seconds), perf_counter()
        self._client.cast_many("note", stream)
        return Sample(stream.sent, perf_counter() - began)

    def fanout(self, seconds: float) -> Sample:
        return in_threads(self._fan_out, seconds, FANNERS, self._receivers)

    def _fan_out(self) -> int:
        return sum(each.outcome == "taken" for each in self._client.fanout("note", self._message.body))
