"""No system: what a simulated host does that has no part in a measurement, so that its neighbours notice it."""

from __future__ import annotations

import threading
from time import perf_counter

from benchmarks.messages import Message, decode, encode
from benchmarks.system import Sample, Setup

FOOTPRINT = 2 * 1024 * 1024
"""Bytes that it goes over: more than a processor's own caches hold."""
LINE = 64


class Server:
    """Has nothing to do."""

    def __init__(self, setup: Setup) -> None:
        """Nothing of the setup matters."""

    def start(self) -> str:
        return ""

    def serve(self) -> None:
        threading.Event().wait()

    def received(self) -> int:
        return 0


class Client:
    """Works for itself."""

    def __init__(self, setup: Setup) -> None:
        self._body = Message(setup.message).body
        self._memory = bytearray(FOOTPRINT)
        self._touch = bytes(FOOTPRINT // LINE)

    def connect(self, addresses: list[str]) -> None:
        """There is nobody to connect to."""

    def run(self, seconds: float, callers: int) -> Sample:
        began = perf_counter()
        rounds = 0
        while perf_counter() - began < seconds:
            for _ in range(100):
                decode(encode(self._body))
            self._memory[::LINE] = self._touch
            rounds += 1
        return Sample(rounds, perf_counter() - began)
