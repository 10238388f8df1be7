"""Streams: items as they are produced, and a reader who holds the writer."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from onehop import CallTimeout, NodeClosed, NoSuchMethod, PeerLost, RemoteError


class Counter:
    """Yields numbers, and tells how far it is and how it ended."""

    def __init__(self) -> None:
        self.yielded = 0
        self.ended = threading.Event()

    def count(self, items: int, size: int = 0) -> Iterator[Any]:
        try:
            for number in range(items):
                self.yielded = number + 1
                yield number if not size else number.to_bytes(4, "big") * (size // 4)
        finally:
            self.ended.set()

    def fail_after(self, items: int) -> Iterator[int]:
        yield from range(items)
        raise ValueError("out of numbers")

    def listed(self) -> list[int]:
        return [1, 2, 3]

    def plain(self) -> int:
        return 5

    def text(self) -> str:
        return "abc"


@pytest.fixture
def counter() -> Counter:
    return Counter()


@pytest.mark.parametrize("items", [0, 1, 31, 32, 33, 500])
def test_items_arrive_in_order_and_then_it_ends(node, counter, items) -> None:
    node().serve("clock", counter)
    stream = node().stream("clock", "count", items)
    assert list(stream) == list(range(items))
    assert list(stream) == []


def test_any_iterable_may_be_streamed(node, counter) -> None:
    node().serve("clock", counter)
    assert list(node().stream("clock", "listed")) == [1, 2, 3]


def test_generator_that_is_called_gives_a_list(node, counter) -> None:
    node().serve("clock", counter)
    assert node().call("clock", "count", 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("method", ["plain", "text"])
def test_what_is_no_stream_is_told(node, counter, method) -> None:
    node().serve("clock", counter)
    with pytest.raises(RemoteError, match="which is not a stream; call it"):
        next(node().stream("clock", method))


def test_items_arrive_as_they_are_produced(node) -> None:
    go_on = threading.Event()

    def slowly() -> Iterator[int]:
        yield 1
        assert go_on.wait(10)
        yield 2

    node().serve("clock", {"slowly": slowly})
    stream = node().stream("clock", "slowly")
    assert next(stream) == 1
    go_on.set()
    assert list(stream) == [2]


@pytest.mark.parametrize("credit", [1, 2, 10])
def test_writer_is_never_more_than_the_credit_ahead(node, counter, eventually, credit) -> None:
    node().serve("clock", counter)
    stream = node(stream_credit=credit).stream("clock", "count", 1000)
    read, ahead = 0, 0
    for number in stream:
        assert number == read
        read += 1
        # The next item is taken from the generator before its credit is there: one more.
        ahead = max(ahead, counter.yielded - read)
        if read == 20:
            eventually(lambda: counter.yielded >= 20 + (credit + 1) // 2)
            assert not counter.ended.wait(0.1)
            ahead = max(ahead, counter.yielded - read)
    assert read == 1000
    assert ahead <= credit + 1


def test_large_items_arrive_whole(node, counter) -> None:
    node().serve("clock", counter)
    items = list(node().stream("clock", "count", 40, 100_000))
    assert [item == number.to_bytes(4, "big") * 25_000 for number, item in enumerate(items)] == [True] * 40


def test_stream_whose_handler_fails_midway_gives_its_items_first(node, counter) -> None:
    node().serve("clock", counter)
    stream = node().stream("clock", "fail_after", 3)
    assert [next(stream), next(stream), next(stream)] == [0, 1, 2]
    with pytest.raises(RemoteError, match="out of numbers") as caught:
        next(stream)
    assert caught.value.executed == "yes"
    assert list(stream) == []


def test_error_of_a_stream_is_rebuilt_from_the_allowed_ones(node, counter) -> None:
    node().serve("clock", counter)
    with pytest.raises(ValueError, match="out of numbers"):
        list(node().client("clock", errors=(ValueError,)).stream("fail_after", 2))


def test_closing_a_stream_early_stops_the_handler(node, counter) -> None:
    serving = node()
    serving.serve("clock", counter)
    with node().stream("clock", "count", 1_000_000) as stream:
        assert next(stream) == 0
    assert counter.ended.wait(5.0)
    assert counter.yielded < 1000
    stream.close()
    assert list(stream) == []


def test_stream_that_is_forgotten_stops_the_handler(node, counter) -> None:
    node().serve("clock", counter)
    calling = node()
    assert next(calling.stream("clock", "count", 1_000_000)) == 0
    gc.collect()
    assert counter.ended.wait(5.0)


def test_reader_that_goes_away_stops_the_handler(node, counter) -> None:
    node().serve("clock", counter)
    calling = node()
    stream = calling.stream("clock", "count", 1_000_000)
    assert next(stream) == 0
    calling.close()
    assert counter.ended.wait(5.0)
    with pytest.raises((PeerLost, NodeClosed)):
        list(stream)


def test_server_that_goes_away_ends_the_stream_with_an_error(node, counter) -> None:
    serving = node()
    serving.serve("clock", counter)
    stream = node().stream("clock", "count", 1_000_000)
    assert next(stream) == 0
    serving.close()
    with pytest.raises(PeerLost):
        for _ in stream:
            pass


def test_stream_ends_at_its_deadline(node, gate) -> None:
    def wait() -> Iterator[int]:
        yield 1
        gate.hold()

    node().serve("clock", {"wait": wait})
    client = node().client("clock", timeout=0.5)
    client.options(timeout=20.0).ping()
    stream = client.stream("wait")
    began = time.monotonic()
    assert next(stream) == 1
    with pytest.raises(CallTimeout):
        next(stream)
    assert time.monotonic() - began < 5


def test_stream_cut_by_its_deadline_never_looks_complete(node, counter) -> None:
    node().serve("clock", counter)
    client = node().client("clock", timeout=0.5)
    client.options(timeout=20.0).ping()
    stream = client.stream("count", 200)
    assert next(stream) == 0
    assert counter.ended.wait(5.0)  # the server gave up: its reader did not come in time
    with pytest.raises(CallTimeout):
        for _ in stream:
            pass


def test_monitored_stream_stays_while_the_server_lives(node, gate, stays_alive) -> None:
    def wait() -> Iterator[int]:
        yield 1
        gate.hold()
        yield 2

    node().serve("clock", {"wait": wait})
    client = node().client("clock", timeout=30.0, monitor=0.4)
    assert stays_alive(lambda: list(client.stream("wait")), gate.wait_entered, 1.2) == [1, 2]


def test_missing_method_of_a_stream_is_told(node, counter) -> None:
    node().serve("clock", counter)
    with pytest.raises(NoSuchMethod):
        list(node().stream("clock", "cuont", 1))


def test_streams_of_one_client_do_not_mix(node, counter, background) -> None:
    node().serve("clock", {"count": lambda start, items: iter(range(start, start + items))})
    client = node().client("clock")
    readers = [background(list, client.stream("count", start, 300)) for start in range(0, 8000, 1000)]
    expected = [list(range(start, start + 300)) for start in range(0, 8000, 1000)]
    assert [each.result(within=30) for each in readers] == expected
