"""Nodes and their loops: whose they are, how they end together, and what else the loop may be busy with."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from typing import Any

import pytest

import onehop
from onehop import CallTimeout, NodeClosed, PeerLost, SettingsError
from onehop.asyncio import Node


async def double(value: int) -> int:
    return 2 * value


async def never() -> None:
    await asyncio.sleep(60)


async def elsewhere(steps: Any) -> Any:
    """What a coroutine comes to in another loop, in another thread."""
    return await asyncio.to_thread(lambda: asyncio.run(steps))


# Whose --------------------------------------------------------------------------------------------


async def test_node_is_used_in_the_loop_it_began_in_and_says_so_elsewhere(node) -> None:
    await node().serve("clock", {"double": double})
    calling = node()
    client = calling.client("clock")
    assert await client.call("double", 2) == 4
    begun = await client.start("double", 3)
    for use in (
        lambda: client.call("double", 2),
        lambda: client.cast("double", 2),
        lambda: client.start("double", 2),
        lambda: client.stream("double", 2).__anext__(),
        lambda: client.fanout("double", 2),
        lambda: client.gather("double", 2),
        lambda: calling.serve("clock", {"double": double}),
        lambda: calling.listen("clock"),
        lambda: calling.servers(),
        lambda: calling.wait_for("clock"),
        lambda: begun.result(),
        lambda: calling.drain(),
        lambda: calling.close(),
    ):
        with pytest.raises(SettingsError, match="belongs to another asyncio loop"):
            await elsewhere(use())
    with pytest.raises(SettingsError, match="inside of a running loop"):
        await asyncio.to_thread(begun.cancel)
    assert await begun.result() == 6
    assert await client.call("double", 2) == 4


def test_node_outside_of_a_loop_says_where_it_belongs(run_directory: str) -> None:
    with pytest.raises(SettingsError, match="inside of a running loop"):
        Node().id  # noqa: B018


async def test_node_tells_of_itself_in_any_thread(node) -> None:
    calling = node()
    await calling.servers()
    assert await asyncio.to_thread(lambda: calling.id) == calling.id
    assert (await asyncio.to_thread(calling.statistics)).node == calling.id


async def test_two_nodes_in_two_loops_in_two_threads_talk(node) -> None:
    serving, calling = node(), node()
    ready, end = threading.Event(), threading.Event()

    async def serve() -> None:
        await serving.serve("clock", {"double": double})
        ready.set()
        while not end.is_set():
            await asyncio.sleep(0.01)
        await serving.close()

    thread = asyncio.ensure_future(elsewhere(serve()))
    await asyncio.to_thread(ready.wait, 10.0)
    told = await asyncio.gather(*(calling.call("clock", "double", number) for number in range(300)))
    assert told == [2 * number for number in range(300)]
    end.set()
    await thread


async def test_both_faces_talk_to_each_other(zmq_node) -> None:
    with onehop.Node() as blocking:
        blocking.serve("blocking", {"triple": lambda value: 3 * value})
        looping = zmq_node()
        await looping.serve("looping", {"double": double})
        assert await looping.call("blocking", "triple", 2) == 6
        assert await asyncio.to_thread(blocking.call, "looping", "double", 2) == 4


# Closing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["calling", "serving"])
async def test_close_ends_the_calls_under_way_within_a_moment(node, until, side) -> None:
    serving, calling = node(), node()
    await serving.serve("clock", {"never": never})
    calls = [asyncio.ensure_future(calling.call("clock", "never")) for _ in range(100)]
    await until(lambda: serving.statistics().taken == 100)
    began = time.monotonic()
    await (serving if side == "serving" else calling).close()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {PeerLost}
    assert time.monotonic() - began < 3.0
    with pytest.raises(NodeClosed):
        await (serving if side == "serving" else calling).servers()


async def test_close_ends_who_waits_for_a_server(node) -> None:
    calling = node()
    await calling.servers()
    call = asyncio.ensure_future(calling.client("nobody", ready_timeout=30.0).call("read"))
    waiting = asyncio.ensure_future(calling.wait_for("nobody", timeout=30.0))
    await asyncio.sleep(0.05)
    await calling.close()
    with pytest.raises(NodeClosed):
        await call
    assert await waiting is False


async def test_close_while_it_starts_and_twice_at_once(node) -> None:
    for _ in range(5):
        one = node()
        using = asyncio.ensure_future(one.servers())
        await asyncio.sleep(0)
        await asyncio.gather(one.close(), one.close())
        await asyncio.gather(using, return_exceptions=True)
        with pytest.raises(NodeClosed):
            await one.servers()


async def test_close_under_load_gives_every_caller_an_outcome(node) -> None:
    for _ in range(5):
        serving, calling = node(), node()
        await serving.serve("clock", {"double": double, "plain": lambda value: value})

        async def work(method: str, client: Any = calling.client("clock")) -> str:  # noqa: B008
            try:
                while True:
                    await client.call(method, 1)
            except onehop.OnehopError as error:
                return type(error).__name__

        tasks = [asyncio.ensure_future(work(method)) for method in ("double", "plain") * 10]
        await asyncio.sleep(0.05)
        await serving.close()
        await calling.close()
        assert {*await asyncio.gather(*tasks)} <= {"PeerLost", "NodeClosed", "Rejected", "NoRoute"}


async def test_closed_nodes_leave_nothing_behind(zmq_node) -> None:
    async def use() -> None:
        async with Node() as serving, Node() as calling:
            await serving.serve("clock", {"double": double, "plain": len})
            assert await calling.call("clock", "double", 2) == 4
            assert await calling.call("clock", "plain", "ab") == 2

    await use()
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        await use()
    deadline = time.monotonic() + 5.0
    while len(os.listdir("/proc/self/fd")) > files:
        assert time.monotonic() < deadline
        gc.collect()
        await asyncio.sleep(0.01)


# A busy loop --------------------------------------------------------------------------------------


async def test_executor_that_is_busy_holds_up_nothing(node, until) -> None:
    release = threading.Event()
    loop = asyncio.get_running_loop()
    jobs = [loop.run_in_executor(None, release.wait, 60.0) for _ in range(64)]
    try:
        async with asyncio.timeout(10.0):
            await node().serve("clock", {"double": double})
            calling = node()
            assert await calling.call("clock", "double", 2) == 4
            assert len(await calling.fanout("clock", "double", 2)) == 1
            assert len(await calling.servers()) == 1
    finally:
        release.set()
        await asyncio.gather(*jobs)


async def test_loop_that_is_held_up_keeps_its_links_and_every_call_its_outcome(zmq_node) -> None:
    with onehop.Node(workers=32) as other:
        go_on = threading.Event()
        other.serve("clock", {"double": lambda value: 2 * value})
        other.serve("slow", {"hold": lambda: go_on.wait(30.0)})
        looping = zmq_node()
        await looping.serve("looping", {"double": double})
        client = looping.client("clock", timeout=20.0)
        await client.call("double", 2)
        assert await asyncio.to_thread(other.call, "looping", "double", 2) == 4
        peers = [peer.node for peer in looping.statistics().peers]
        slow = looping.client("slow", timeout=0.5)
        late = [asyncio.ensure_future(slow.call("hold")) for _ in range(100)]
        prompt = [asyncio.ensure_future(client.call("double", number)) for number in range(300)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        time.sleep(3.0)
        assert await asyncio.gather(*prompt) == [2 * number for number in range(300)]
        outcomes = await asyncio.gather(*late, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {CallTimeout}
        go_on.set()
        # None is lost; its own record may be heard of meanwhile.
        assert {*peers} <= {peer.node for peer in looping.statistics().peers}
        assert await client.call("double", 2) == 4
        assert await asyncio.to_thread(other.call, "looping", "double", 2) == 4
