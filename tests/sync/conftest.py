"""Nodes over each carrier, and handlers that wait for the test."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from onehop import Node
from onehop.testing.memory import Network


@pytest.fixture(params=["zmq", "memory"])
def node(request: pytest.FixtureRequest, make_node: Callable[..., Node]) -> Callable[..., Node]:
    """Makes nodes that know each other: over ZeroMQ, then over memory."""
    if request.param == "zmq":
        return make_node
    network = Network()
    return lambda **settings: make_node(network=network, **settings)


class Gate:
    """A handler that says that it was entered, and waits until it may go on."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.runs = 0
        self._lock = threading.Lock()

    def hold(self, value: Any = None) -> Any:
        with self._lock:
            self.runs += 1
        self.entered.release()
        assert self.open.wait(30.0)
        return value

    def read(self) -> int:
        return self.runs

    def wait_entered(self, times: int = 1) -> None:
        for _ in range(times):
            assert self.entered.acquire(timeout=10.0)


@pytest.fixture
def gate() -> Gate:
    gate = Gate()
    yield gate  # type: ignore[misc]
    gate.open.set()
