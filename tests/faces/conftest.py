"""Nodes of each face over each carrier, and handlers that wait for the test.

One body of tests serves both faces. The asyncio one is presented to them as if it were blocking: its loop runs in a
thread (``Portal``), and whatever a test asks is done there and waited for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from onehop import CallTimeout, Node
from onehop.testing.memory import Network


@pytest.fixture(params=["blocking", "asyncio", "uvloop"])
def face(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """``face(**settings)`` makes a node, which the test closes."""
    if request.param == "blocking":
        yield Node
        return
    with request.getfixturevalue("open_portal")(request.param) as portal:
        yield portal.node


@pytest.fixture
def make_node(face: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Makes nodes of the face, and closes them when the test is over."""
    nodes: list[Any] = []

    def make(**settings: Any) -> Any:
        nodes.append(face(**settings))
        return nodes[-1]

    yield make
    for node in reversed(nodes):
        node.close()


@pytest.fixture(params=["zmq", "memory"])
def node(request: pytest.FixtureRequest, make_node: Callable[..., Any]) -> Callable[..., Any]:
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


@pytest.fixture
def stays_alive(gate: Gate, background: Any) -> Callable[[Callable[[], Any], Callable[[], Any], float], Any]:
    """``stays_alive(begin, entered, seconds)``: what becomes of ``begin()`` when the gate opens after that time.

    The time is several times its monitor's patience. It has three chances: where the machine stands still for about
    that patience, no sign of life comes in time.
    """

    def begun(begin: Callable[[], Any], entered: Callable[[], Any], seconds: float) -> Any:
        for _ in range(3):
            under_way = background(begin)
            entered()
            gate.open.wait(seconds)
            if not under_way.ended:
                gate.open.set()
                return under_way.result()
            with suppress(CallTimeout):
                under_way.result()
        raise AssertionError("the signs of life of its server did not keep it alive")

    return begun
