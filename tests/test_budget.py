"""How much Python one call may cost: counted, not timed, so that a slow machine does not matter.

A budget is what was measured when the engine was tuned, and a little. Who goes beyond it has put something into
the path between a caller and its reply.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

import onehop
from onehop.testing.memory import Network
from onehop.transport.native import native

CALLER = {"zmq": (13, 24), "zmq, pure": (22, 26), "memory": (25, 44)}
SERVER = {"zmq": (18, 35), "zmq, pure": (29, 39), "memory": (29, 52)}
"""Python functions and built-in ones."""
ROUNDS = 100
BATCHES = 5
"""The cheapest batch counts: how often a thread looks before the answer is there is up to the machine."""


class Count:
    """Counts the calls of Python functions and of built-in ones that the profiled thread makes."""

    def __init__(self) -> None:
        self.python: Counter[str] = Counter()
        self.builtin: Counter[str] = Counter()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self.python[f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}"] += 1
        elif event == "c_call":
            self.builtin[getattr(argument, "__qualname__", repr(argument))] += 1

    @property
    def per_call(self) -> tuple[float, float]:
        return sum(self.python.values()) / ROUNDS, sum(self.builtin.values()) / ROUNDS

    def told(self) -> str:
        return "\n".join(
            f"  {count / ROUNDS:5.2f} {name}" for name, count in (self.python + self.builtin).most_common()
        )


@pytest.fixture(params=["zmq", "memory"])
def nodes(request: pytest.FixtureRequest, make_node: Callable[..., Any]) -> tuple[Any, Any, str]:
    details = {"network": Network()} if request.param == "memory" else {}
    pure = ", pure" if request.param == "zmq" and native is None else ""
    return make_node(**details), make_node(**details), request.param + pure


def steady(client: Any) -> None:
    for number in range(300):
        assert client.call("echo", number) == number


def judge(name: str, counts: list[Count], budget: tuple[int, int], show: Any) -> None:
    best = min(counts, key=lambda count: count.per_call)
    python, builtin = best.per_call
    with show.disabled():
        print(
            f"\n{name}: {python:.1f} Python-level calls (budget {budget[0]}), {builtin:.1f} built-in ones ({budget[1]})"
        )
    assert python <= budget[0], best.told()
    assert builtin <= budget[1], best.told()


def test_steady_call_of_a_lone_caller_keeps_its_budget(nodes, capsys, request) -> None:
    serving, calling, carrier = nodes
    serving.serve("clock", {"echo": onehop.method(inline=True)(lambda value: value)})
    client = calling.client("clock")
    steady(client)
    counts = [Count() for _ in range(BATCHES)]
    call = client.call
    for count in counts:
        sys.setprofile(count)
        try:
            for number in range(ROUNDS):
                call("echo", number)
        finally:
            sys.setprofile(None)
    judge(request.node.name, counts, CALLER[carrier], capsys)


def test_request_served_inline_keeps_its_budget(nodes, capsys, request) -> None:
    serving, calling, carrier = nodes

    def profile(count: Any) -> None:  # of the receiving thread, which runs this
        sys.setprofile(count.pop() if count else None)

    counts = [Count() for _ in range(BATCHES)]
    box: list[Count] = []
    echo = onehop.method(inline=True)(lambda value: value)
    serving.serve("clock", {"echo": echo, "profile": onehop.method(inline=True)(lambda: profile(box))})
    client = calling.client("clock")
    steady(client)
    for count in counts:
        box.append(count)
        client.call("profile")
        for number in range(ROUNDS):
            client.call("echo", number)
        client.call("profile")
    judge(request.node.name, counts, SERVER[carrier], capsys)
