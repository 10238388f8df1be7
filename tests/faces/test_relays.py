"""Fan-outs through relays: the same receipts as of those that go to each receiver directly, and each copy once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from onehop import SettingsError
from onehop.protocol import tree

NUMBER = 24


class Crowd:
    """Nodes that serve "clock", and what each of them has run."""

    def __init__(self, node: Callable[..., Any], number: int = NUMBER, **settings: Any) -> None:
        self.ran: Counter[tuple[str, Any]] = Counter()
        self.nodes: dict[str, Any] = {}
        self._lock = threading.Lock()
        self.gate = threading.Event()
        for index in range(number):
            self.add(node(**settings), f"server-{index}")

    def add(self, node: Any, name: str) -> None:
        def note(value: Any) -> None:
            with self._lock:
                self.ran[name, value] += 1

        def hold() -> None:
            assert self.gate.wait(30.0)

        self.nodes[name] = node
        node.serve("clock", {"note": note, "hold": hold}, server=name, workers=1)

    def seen_by(self, calling: Any) -> Any:
        assert calling.wait_for("clock", count=len(self.nodes), timeout=20.0)
        return calling

    def relays(self) -> list[str]:
        """Who was asked to pass something on."""
        return [
            name for name, each in self.nodes.items() if any(peer.state == "ready" for peer in each.statistics().peers)
        ]


@pytest.fixture
def crowd(node: Callable[..., Any]) -> Crowd:
    return Crowd(node)


def test_receipts_are_those_of_the_direct_form(node, crowd, eventually) -> None:
    through, direct = crowd.seen_by(node(fanout_direct=5)), crowd.seen_by(node())
    for number in range(3):
        told = [through.fanout("clock", "note", number), direct.fanout("clock", "note", number)]
        here, there = [[(each.server, each.node, each.host, each.outcome, each.reason) for each in one] for one in told]
        assert here == there
        assert {each.outcome for each in told[0]} == {"taken"}
        assert all(0 < each.seconds < 20 for each in told[0])
    assert sum(peer.state == "ready" for peer in through.statistics().peers) < NUMBER / 2
    eventually(lambda: len(crowd.ran) == 3 * NUMBER)
    eventually(lambda: set(crowd.ran.values()) == {2})


def test_a_fan_out_of_a_large_body_passes_through_untouched(node, crowd, eventually) -> None:
    large = "x" * 200_000
    assert {each.outcome for each in crowd.seen_by(node(fanout_direct=5)).fanout("clock", "note", large)} == {"taken"}
    eventually(lambda: crowd.ran == {(name, large): 1 for name in crowd.nodes})


def test_a_body_with_no_room_for_the_receivers_goes_directly(node, crowd, eventually) -> None:
    body = "x" * 999_000
    calling = crowd.seen_by(node(fanout_direct=5, max_message=999_100))
    assert {each.outcome for each in calling.fanout("clock", "note", body)} == {"taken"}
    assert sum(peer.state == "ready" for peer in calling.statistics().peers) == NUMBER
    eventually(lambda: len(crowd.ran) == NUMBER)


def test_many_fan_outs_at_once_reach_everybody_once(node, crowd, background, eventually) -> None:
    calling = crowd.seen_by(node(fanout_direct=5))

    def fan_out(first: int) -> set[str]:
        return {each.outcome for number in range(5) for each in calling.fanout("clock", "note", first + number)}

    under_way = [background(fan_out, first) for first in range(0, 80, 5)]  # more than a relay works at
    assert [each.result(60.0) for each in under_way] == [{"taken"}] * 16
    eventually(lambda: len(crowd.ran) == 80 * NUMBER, within=20.0)
    assert set(crowd.ran.values()) == {1}


def test_unwilling_nodes_are_asked_for_nothing(node, eventually) -> None:
    crowd = Crowd(node, 12, relay=False)
    calling = crowd.seen_by(node(fanout_direct=5))
    assert {each.outcome for each in calling.fanout("clock", "note", 1)} == {"taken"}
    assert sum(peer.state == "ready" for peer in calling.statistics().peers) == 12
    assert crowd.relays() == []
    eventually(lambda: set(crowd.ran.values()) == {1} and len(crowd.ran) == 12)


def test_receivers_that_are_gone_or_full_are_told_of_as_by_the_direct_form(node, crowd, eventually) -> None:
    full = node(inbox_messages=1, relay=False)
    crowd.add(full, "full")
    calling = crowd.seen_by(node(fanout_direct=5))
    calling.fanout("clock", "note", 0)
    eventually(lambda: len(crowd.ran) == NUMBER + 1)
    held = node()
    crowd.seen_by(held)
    call = held.client("clock").at("full").start("hold")
    eventually(lambda: full.statistics().taken == 1)
    crowd.nodes["server-7"].close()
    told = {each.server: each for each in calling.fanout("clock", "note", 1)}
    assert told.pop("full").outcome == "refused"
    gone = told.pop("server-7", None)
    assert gone is None or gone.outcome == "unreachable"
    crowd.gate.set()
    call.result()
    eventually(lambda: all(crowd.ran[name, 1] == (each.outcome == "taken") for name, each in told.items()))
    assert Counter(each.outcome for each in told.values())["taken"] >= NUMBER - 1 - tree.DEGREE / 10


def test_relays_that_leave_between_two_fan_outs_are_missed_by_nobody(node, crowd, eventually) -> None:
    calling = crowd.seen_by(node(fanout_direct=5, timeout=10.0))
    calling.fanout("clock", "note", 0)
    leaving = crowd.relays()[:2]
    for name in leaving:
        crowd.nodes.pop(name).close(drain=True)
    eventually(lambda: not any(each.server in leaving for each in calling.servers("clock")))
    told = {each.server: each.outcome for each in calling.fanout("clock", "note", 1)}
    assert told == dict.fromkeys(crowd.nodes, "taken")
    eventually(lambda: all(crowd.ran[name, 1] == 1 for name in crowd.nodes))


def test_the_name_of_the_relays_is_taken(make_node) -> None:
    node = make_node()
    for verb in (lambda: node.serve(tree.SERVICE, {"fanout": print}), lambda: node.client(tree.SERVICE)):
        with pytest.raises(SettingsError, match="take another name"):
            verb()
