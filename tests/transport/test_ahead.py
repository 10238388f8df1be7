"""Listeners of who polls in one thread and runs in others: no more is polled than those begin, and some."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from onehop import Incoming, Node, SettingsError

AHEAD = 4


class Polling:
    """Polls in a thread until there is nothing more, as oslo.messaging does, and keeps what it was given."""

    def __init__(self, listener: Any) -> None:
        self.listener = listener
        self.found: list[Incoming] = []
        self.has_ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while batch := self.listener.poll():
            self.found += batch
        self.has_ended.set()


def cast(node: Node, count: int) -> None:
    client = node.client("clock", timeout=20.0)
    for _ in range(count):
        client.cast_raw("read", b"\x90")


def test_what_has_begun_makes_room_for_the_next(make_node, eventually) -> None:
    polling = Polling(make_node().listen("clock", ahead=AHEAD))
    cast(make_node(), 20)
    eventually(lambda: len(polling.found) == AHEAD)
    for done in range(20):
        eventually(lambda done=done: len(polling.found) > done)
        assert len(polling.found) <= done + AHEAD
        polling.found[done].begin()
        polling.found[done].done()


def test_a_poll_that_waits_for_room_ends_with_its_time(make_node, eventually) -> None:
    listener = make_node().listen("clock", ahead=AHEAD)
    found: list[Incoming] = []

    def is_full() -> bool:
        found.extend(listener.poll(limit=10, timeout=1.0))
        return len(found) >= AHEAD

    calls = [make_node().client("clock", timeout=20.0).start("read") for _ in range(AHEAD + 1)]
    eventually(is_full, within=20.0)
    assert listener.poll(timeout=0.1) == []
    for each in found:
        assert each.begin()
    (last,) = listener.poll(timeout=20.0)
    for each in (*found, last):
        each.reply_raw(b"\x01")
    assert [call.result() for call in calls] == [1] * (AHEAD + 1)


def test_all_that_was_taken_in_is_handed_out_after_stop(make_node, eventually) -> None:
    listener = make_node().listen("clock", ahead=AHEAD)
    polling = Polling(listener)
    cast(make_node(), 20)
    eventually(lambda: len(polling.found) == AHEAD)
    listener.stop()
    assert polling.has_ended.wait(20.0)
    assert len(polling.found) == 20


def test_a_poll_that_waits_for_room_ends_when_the_node_is_closed(make_node, eventually) -> None:
    serving = make_node()
    polling = Polling(serving.listen("clock", ahead=AHEAD))
    cast(make_node(), 20)
    eventually(lambda: len(polling.found) == AHEAD)
    serving.close()
    assert polling.has_ended.wait(20.0)


def test_a_server_where_nothing_begins_is_avoided_until_one_does(make_node, eventually) -> None:
    polling = Polling(make_node().listen("clock", ahead=AHEAD))
    calling = make_node()

    def state() -> str:
        (peer,) = calling.statistics().peers
        return peer.state

    calls = [calling.client("clock", timeout=60.0).start("read") for _ in range(20)]
    eventually(lambda: state() == "stalled", within=20.0)
    assert len(polling.found) == AHEAD
    polling.found[0].begin()  # one: less than makes room for the next
    eventually(lambda: state() == "ready", within=20.0)
    for number in range(20):
        eventually(lambda number=number: len(polling.found) > number)
        polling.found[number].reply_raw(b"\x01")
    assert [call.result() for call in calls] == [1] * 20


def test_a_server_where_nothing_begins_is_in_nobodys_way_once_it_has_stopped(make_node, eventually) -> None:
    serving = make_node()
    listener = serving.listen("clock", ahead=AHEAD)
    Polling(listener)
    calling = make_node()

    def state() -> str:
        (peer,) = calling.statistics().peers
        return peer.state

    calls = [calling.client("clock", timeout=60.0).start("read") for _ in range(AHEAD - 1)]
    eventually(lambda: state() == "stalled", within=20.0)
    listener.stop()
    serving.serve("other", {"read": lambda: 1})
    eventually(lambda: state() == "ready", within=20.0)
    for each in calls:
        each.cancel()


@pytest.mark.parametrize("ahead", [0, -1])
def test_room_for_nobody_is_refused(make_node, ahead: int) -> None:
    with pytest.raises(SettingsError, match="ahead"):
        make_node().listen("clock", ahead=ahead)
