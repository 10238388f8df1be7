"""A task that waits and is cancelled: the call ends here and at the server, and gives its room back."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

import onehop
from onehop import CallTimeout, RemoteError
from onehop.asyncio import Node
from onehop.testing.memory import Network


class Slow:
    """Handlers that wait until they are cancelled, and tell of it."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.heard: list[str] = []
        self.released = threading.Event()

    async def wait(self) -> None:
        self.entered.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.heard.append("cancelled")
            raise

    async def tidy_up(self) -> None:
        self.entered.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)
            self.heard.append("tidied up")

    async def read(self) -> int:
        return len(self.heard)


def in_flight(node: Any) -> int:
    return sum(peer.in_flight for peer in node.statistics().peers)


async def begun(call: Any, slow: Slow) -> asyncio.Task[Any]:
    """The task that waits for ``call``, whose handler has begun."""
    task = asyncio.ensure_future(call)
    await asyncio.wait_for(slow.entered.wait(), 10.0)
    return task


async def test_cancelled_task_cancels_the_handler_and_gives_its_room_back(node, until) -> None:
    slow, serving, calling = Slow(), node(), node()
    await serving.serve("slow", slow)
    task = await begun(calling.call("slow", "wait"), slow)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: slow.heard == ["cancelled"])
    await until(lambda: serving.statistics().taken == 0)
    assert in_flight(calling) == 0
    assert serving.statistics().received["cancelled"] == 1
    assert await calling.call("slow", "read") == 1


async def test_plain_handlers_request_is_marked_as_cancelled(node, until) -> None:
    serving, calling = node(), node()
    entered, seen = threading.Event(), threading.Event()

    def work() -> None:
        request = onehop.current()
        assert request is not None
        entered.set()
        while not request.cancelled:
            pass
        seen.set()

    await serving.serve("slow", {"work": work})
    task = asyncio.ensure_future(calling.call("slow", "work"))
    await until(entered.is_set)
    task.cancel()
    await until(seen.is_set)
    await until(lambda: serving.statistics().taken == 0)


async def test_timeout_of_asyncio_around_a_call_cancels_it(node, until) -> None:
    slow, serving, calling = Slow(), node(), node()
    await serving.serve("slow", slow)
    await calling.call("slow", "read")

    async def call_for_a_time() -> None:
        async with asyncio.timeout(60) as limit, asyncio.TaskGroup() as beside:

            async def end() -> None:
                await slow.entered.wait()
                limit.reschedule(asyncio.get_running_loop().time())

            beside.create_task(end())
            await calling.call("slow", "wait")

    with pytest.raises(TimeoutError) as caught:
        await call_for_a_time()
    assert not isinstance(caught.value, CallTimeout)
    await until(lambda: slow.heard == ["cancelled"])
    assert in_flight(calling) == 0


async def test_deadline_cancels_the_handler_too(node, until) -> None:
    slow, serving, calling = Slow(), node(), node()
    await serving.serve("slow", slow)
    await calling.call("slow", "read")
    with pytest.raises(CallTimeout) as caught:
        await calling.client("slow", timeout=0.5).call("wait")
    assert caught.value.executed == "unknown"
    await until(lambda: slow.heard == ["cancelled"])


@pytest.mark.parametrize("turns", range(0, 60, 4))
async def test_call_cancelled_at_any_moment_of_its_beginning_leaves_nothing(node, until, turns) -> None:
    slow, serving, calling = Slow(), node(), node()
    await serving.serve("slow", slow)
    task = asyncio.ensure_future(calling.call("slow", "wait"))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await calling.call("slow", "read") in (0, 1)
    assert in_flight(calling) == 0
    await until(lambda: serving.statistics().taken == 0)


async def test_handler_is_cancelled_once_so_that_it_can_tidy_up(node, until) -> None:
    slow, serving, calling = Slow(), node(), node()
    await serving.serve("slow", slow)
    task = await begun(calling.call("slow", "tidy_up"), slow)
    task.cancel()
    await until(lambda: serving.statistics().received.get("cancelled") == 1)
    await calling.close()  # tells the server again that its caller is gone
    await until(lambda: slow.heard == ["tidied up"])


async def test_cancellation_goes_on_to_what_the_handler_called(node, until) -> None:
    slow, middle, calling = Slow(), node(), node()
    await node().serve("slow", slow)

    async def relay() -> Any:
        return await middle.call("slow", "wait")

    await middle.serve("middle", {"relay": relay})
    task = await begun(calling.call("middle", "relay"), slow)
    task.cancel()
    await until(lambda: slow.heard == ["cancelled"])
    await until(lambda: in_flight(middle) == 0)


async def test_handler_that_cancels_itself_answers_its_caller(node) -> None:
    async def quit_at_once() -> None:
        raise asyncio.CancelledError("enough")

    await node().serve("slow", {"quit": quit_at_once})
    with pytest.raises(RemoteError, match="enough") as caught:
        await node().call("slow", "quit")
    assert caught.value.type == "CancelledError"


async def test_cancelled_wait_for_a_begun_call_leaves_it_to_others(node) -> None:
    release = asyncio.Event()

    async def hold() -> int:
        await release.wait()
        return 5

    await node().serve("slow", {"hold": hold})
    call = await node().client("slow").start("hold")
    first, second = asyncio.ensure_future(call.result()), asyncio.ensure_future(call.result())
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(call.result(), 0.02)
    release.set()
    assert await second == await call.result() == 5
    assert call.done


async def test_cancelled_serve_offers_nothing(node, until) -> None:
    serving, calling = node(), node()
    await serving.servers()
    task = asyncio.ensure_future(serving.serve("slow", {"read": len}))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await calling.servers("slow") == []
    await serving.serve("slow", {"read": len})
    assert await calling.call("slow", "read", "abc") == 3


async def test_cancelled_gather_cancels_the_handler_at_every_server(node, until) -> None:
    everyone, calling = [Slow() for _ in range(5)], node()
    for number, slow in enumerate(everyone):
        await node().serve("slow", slow, server=str(number))
    assert await calling.wait_for("slow", count=5, timeout=10.0)
    task = asyncio.ensure_future(calling.gather("slow", "wait"))
    await until(lambda: all(slow.entered.is_set() for slow in everyone))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: [slow.heard for slow in everyone] == [["cancelled"]] * 5)
    assert in_flight(calling) == 0
    assert {each.outcome for each in await calling.fanout("slow", "read")} == {"taken"}


async def test_fanout_to_nobody_has_nothing_to_wait_for(node) -> None:
    calling = node()
    await calling.servers()
    assert await asyncio.wait_for(calling.fanout("nobody", "read"), 10.0) == []


@pytest.mark.parametrize("verb", ["wait_for", "servers", "close"])
async def test_other_waits_can_be_cancelled(node, verb) -> None:
    calling = node()
    waits = {
        "wait_for": lambda: calling.wait_for("nobody", timeout=60.0),
        "servers": calling.servers,
        "close": calling.close,
    }
    await calling.servers()
    task = asyncio.ensure_future(waits[verb]())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    if verb != "close":
        assert await calling.servers() == []


async def test_coroutine_hears_that_its_caller_is_gone_and_gives_its_room_back(loop_kind: str, until) -> None:
    told: list[bool] = []

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            told.append(True)
            raise

    network = Network()
    async with Node(network=network) as serving:
        await serving.serve("clock", {"wait": wait})
        calling = onehop.Node(network=network)
        call = calling.client("clock", timeout=60.0, monitor=0.4).start
        await asyncio.to_thread(call, "wait")
        await until(lambda: serving.statistics().taken == 1)
        network.carrier.cut(network.endpoint(bytes.fromhex(serving.id)))  # noticed by the next sign of life
        await until(lambda: told == [True])
        await until(lambda: serving.statistics().taken == 0)
        assert await serving.drain(1.0)
        await asyncio.to_thread(calling.close)


async def test_request_that_is_given_up_before_its_task_begins_is_finished_all_the_same(loop_kind: str, until) -> None:
    begun: list[bool] = []

    async def work() -> None:
        begun.append(True)

    def factory(loop: asyncio.AbstractEventLoop, steps: Any, **more: Any) -> asyncio.Task[Any]:
        if getattr(steps, "__name__", "") == "_serve":  # at this moment another thread takes in that its caller gave up
            request = steps.cr_frame.f_locals["request"]
            request.cancelled = True
            request.waiter.release()
        return asyncio.Task(steps, loop=loop, **more)

    network = Network()
    async with Node(network=network) as serving, Node(network=network) as calling:
        await serving.serve("clock", {"work": work})
        asyncio.get_running_loop().set_task_factory(factory)
        with pytest.raises(onehop.OnehopError):
            await calling.client("clock", timeout=0.5).call("work")
        await until(lambda: serving.statistics().taken == 0)
        assert begun == []
