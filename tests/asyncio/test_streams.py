"""Async iteration over a stream: back-pressure, ends, and readers that leave."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest

from onehop import CallTimeout, PeerLost, RemoteError


class Counter:
    """Yields numbers, and tells how far it is and how it ended."""

    def __init__(self) -> None:
        self.begun = 0
        self.yielded = 0
        self.ended = asyncio.Event()

    async def count(self, items: int, size: int = 0) -> AsyncIterator[Any]:
        self.begun += 1
        try:
            for number in range(items):
                self.yielded = number + 1
                yield b"x" * size or number
        finally:
            await asyncio.sleep(0)  # its end may take its time
            self.ended.set()

    async def fail_after(self, items: int) -> AsyncIterator[int]:
        for number in range(items):
            yield number
        raise ValueError("out of numbers")

    async def listed(self) -> list[int]:
        return [1, 2, 3]

    async def text(self) -> str:
        return "abc"


async def ended(counter: Counter) -> None:
    await asyncio.wait_for(counter.ended.wait(), 20.0)


@pytest.mark.parametrize("items", [0, 1, 31, 32, 33, 500])
async def test_items_of_an_async_generator_arrive_in_order(node, items) -> None:
    await node().serve("clock", Counter())
    stream = node().stream("clock", "count", items)
    assert [item async for item in stream] == list(range(items))
    assert [item async for item in stream] == []


async def test_async_generator_that_is_called_gives_a_list_and_a_coroutines_list_may_be_streamed(node) -> None:
    await node().serve("clock", Counter())
    calling = node()
    assert await calling.call("clock", "count", 4) == [0, 1, 2, 3]
    assert [item async for item in calling.stream("clock", "listed")] == [1, 2, 3]
    with pytest.raises(RemoteError, match="which is not a stream; call it"):
        await anext(calling.stream("clock", "text"))


@pytest.mark.parametrize("credit", [1, 2, 10])
async def test_writer_is_never_more_than_the_credit_ahead(node, until, credit) -> None:
    counter = Counter()
    await node().serve("clock", counter)
    read, ahead = 0, 0
    async for number in node(stream_credit=credit).stream("clock", "count", 1000):
        assert number == read
        read += 1
        # The next item is taken from the generator before its credit is there: one more.
        ahead = max(ahead, counter.yielded - read)
        if read == 20:
            await until(lambda: counter.yielded >= 20 + (credit + 1) // 2)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(counter.ended.wait(), 0.1)
            ahead = max(ahead, counter.yielded - read)
    assert read == 1000
    assert ahead <= credit + 1


async def test_large_items_arrive_whole(node) -> None:
    await node().serve("clock", Counter())
    assert [len(item) async for item in node().stream("clock", "count", 40, 1_000_000)] == [1_000_000] * 40


async def test_leaving_the_block_stops_the_handler(node) -> None:
    counter = Counter()
    await node().serve("clock", counter)
    async with node().stream("clock", "count", 1_000_000) as stream:
        async for number in stream:
            if number == 3:
                break
    await ended(counter)
    assert counter.yielded < 1000
    assert [item async for item in stream] == []
    await stream.close()


async def test_stream_that_is_forgotten_stops_the_handler(node) -> None:
    counter = Counter()
    await node().serve("clock", counter)
    calling = node()
    async for _ in calling.stream("clock", "count", 1_000_000):
        break
    gc.collect()
    await ended(counter)


async def test_reader_that_is_cancelled_stops_the_handler(node) -> None:
    counter = Counter()
    await node().serve("clock", counter)
    calling, first = node(), asyncio.Event()

    async def read() -> None:
        async for _ in calling.stream("clock", "count", 1_000_000):
            first.set()

    task = asyncio.ensure_future(read())
    await asyncio.wait_for(first.wait(), 5.0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    gc.collect()
    await ended(counter)


async def test_node_that_is_closed_stops_the_handler_and_ends_the_stream(node) -> None:
    counter = Counter()
    await node().serve("clock", counter)
    calling = node()
    stream = calling.stream("clock", "count", 1_000_000)
    assert await anext(stream) == 0
    await calling.close()
    await ended(counter)
    with pytest.raises(PeerLost):
        async for _ in stream:
            pass


async def test_a_wait_for_an_item_that_is_cancelled_loses_none(node) -> None:
    go_on = asyncio.Event()

    async def slowly() -> AsyncIterator[int]:
        yield 1
        await go_on.wait()
        yield 2

    await node().serve("clock", {"slowly": slowly})
    async with node().stream("clock", "slowly") as stream:
        assert await anext(stream) == 1
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await anext(stream)
        go_on.set()
        assert [item async for item in stream] == [2]


async def test_stream_closed_while_it_begins_stops_the_handler(node, until) -> None:
    counter, serving, calling = Counter(), node(), node()
    await serving.serve("clock", counter)
    stream = calling.stream("clock", "count", 1_000_000)
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    await stream.close()
    with pytest.raises(StopAsyncIteration):
        await first
    await until(lambda: serving.statistics().taken == 0)
    assert sum(peer.in_flight for peer in calling.statistics().peers) == 0


async def test_stream_closed_before_it_began_never_begins(node) -> None:
    counter = Counter()
    await node().serve("clock", counter)
    stream = node().stream("clock", "count", 5)
    await stream.close()
    assert [item async for item in stream] == []
    assert counter.begun == 0


async def test_closing_wakes_who_waits_for_an_item(node) -> None:
    entered = asyncio.Event()

    async def silent() -> AsyncIterator[int]:
        entered.set()
        await asyncio.sleep(60)
        yield 1

    await node().serve("clock", {"silent": silent})
    stream = node().stream("clock", "silent")
    waiting = asyncio.ensure_future(anext(stream))
    await entered.wait()  # it is asked for when the first item is
    await stream.close()
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(waiting, 2.0)


async def test_two_tasks_may_read_one_stream(node) -> None:
    counter = Counter()
    await node().serve("clock", counter)
    stream = node().stream("clock", "count", 500)

    async def read() -> list[int]:
        return [item async for item in stream]

    first, second = await asyncio.gather(read(), read())
    assert sorted(first + second) == list(range(500))
    assert counter.begun == 1


async def test_error_in_the_middle_comes_after_the_items(node) -> None:
    await node().serve("clock", Counter())
    stream = node().client("clock", errors=(ValueError,)).stream("fail_after", 3)
    assert [await anext(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="out of numbers"):
        await anext(stream)


async def test_stream_ends_at_its_deadline_and_so_does_its_handler(node) -> None:
    counter = Counter()

    async def silent() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.sleep(60)
        finally:
            counter.ended.set()

    await node().serve("clock", {"silent": silent})
    client = node().client("clock", timeout=0.5)
    await client.options(timeout=20.0).ping()
    stream = client.stream("silent")
    assert await anext(stream) == 1
    with pytest.raises(CallTimeout):
        await anext(stream)
    await ended(counter)


async def test_many_streams_of_one_client_do_not_mix(node) -> None:
    async def count(start: int) -> AsyncIterator[int]:
        for number in range(start, start + 200):
            yield number

    await node().serve("clock", {"count": count})
    client = node().client("clock")

    async def read(start: int) -> list[int]:
        return [item async for item in client.stream("count", start)]

    starts = range(0, 20_000, 1000)
    assert await asyncio.gather(*map(read, starts)) == [list(range(start, start + 200)) for start in starts]
