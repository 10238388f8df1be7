"""How much Python of ours one RPC by way of oslo.messaging may cost: counted, not timed; see tests/test_budget.py.

Only what the package does is counted. What oslo.messaging and its executor do besides is theirs.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from onehop.transport.native import native

CALLER, SERVER = ((18, 39), (41, 58)) if native is not None else ((24, 41), (45, 59))
"""Python functions and built-in ones, with and without the compiled functions."""
ROUNDS = 100
BATCHES = 5
"""The cheapest batch counts: how often a thread looks before something is there is up to the machine."""
CONTEXT = {f"key_{number}": f"value {number}" for number in range(30)}
ARGUMENTS = {"host": "compute-1", "flavor": {"vcpus": 4, "memory_mb": 8192}, "networks": ["a", "b"], "retry": True}


class Endpoint:
    def echo(self, ctxt: Any, **arguments: Any) -> Any:
        return arguments


class Count:
    """What the profiled threads call in this package: Python functions, and built-in ones."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []  # threads append to a list without losing anything

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if not frame.f_globals.get("__name__", "").startswith("onehop."):
            return
        if event == "call":
            self.events.append((event, f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname}"))
        elif event == "c_call":
            self.events.append((event, getattr(argument, "__qualname__", repr(argument))))

    def batch(self) -> Counter[tuple[str, str]]:
        """What was counted since the last time."""
        found, self.events[:] = Counter(self.events), []
        return found


def calls(counted: Counter[tuple[str, str]]) -> tuple[float, float]:
    """Python functions and built-in ones of one RPC."""
    python, builtin = (sum(n for (kind, _), n in counted.items() if kind == each) for each in ("call", "c_call"))
    return python / ROUNDS, builtin / ROUNDS


def judge(name: str, batches: list[Counter[tuple[str, str]]], budget: tuple[int, int], show: Any) -> None:
    best = min(batches, key=calls)
    python, builtin = calls(best)
    told = "\n".join(f"  {count / ROUNDS:5.2f} {what}" for (_, what), count in best.most_common())
    with show.disabled():
        print(
            f"\n{name}: {python:.1f} Python-level calls (budget {budget[0]}), {builtin:.1f} built-in ones ({budget[1]})"
        )
    assert python <= budget[0], told
    assert builtin <= budget[1], told


@pytest.fixture
def served(bus: Any) -> Iterator[Count]:
    """Counts what the server's threads call; they begin with it."""
    count = Count()
    threading.setprofile(count)
    try:
        bus.serve("compute", Endpoint(), transport=bus.transport("zmq:///?zone=server"))
        yield count
    finally:
        threading.setprofile(None)


def in_batches(client: Any, count: Count) -> list[Counter[tuple[str, str]]]:
    found = []
    for batch in range(1 + BATCHES):
        count.batch()
        for _ in range(ROUNDS):
            assert client.call(CONTEXT, "echo", **ARGUMENTS) == ARGUMENTS
        if batch:  # before the first, connections and threads were made
            found.append(count.batch())
    return found


def test_steady_call_keeps_its_budget_at_the_caller(bus: Any, capsys: Any, request: Any) -> None:
    bus.serve("compute", Endpoint(), transport=bus.transport("zmq:///?zone=server"))
    count = Count()
    client = bus.client("compute")
    client.call({}, "echo")  # the node's own threads are started unprofiled
    sys.setprofile(count)
    try:
        batches = in_batches(client, count)
    finally:
        sys.setprofile(None)
    judge(request.node.name, batches, CALLER, capsys)


def test_steady_call_keeps_its_budget_at_the_server(bus: Any, served: Count, capsys: Any, request: Any) -> None:
    judge(request.node.name, in_batches(bus.client("compute"), served), SERVER, capsys)
