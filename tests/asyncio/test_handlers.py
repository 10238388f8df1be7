"""Handlers in a loop: coroutines as tasks, plain functions in threads, inline ones in the loop."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from typing import Any

import pytest

import onehop
from onehop import CallTimeout, RemoteError

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="none")


async def test_each_kind_runs_where_it_should(node) -> None:
    async def coroutine() -> str:
        return threading.current_thread().name

    class Callable:
        async def __call__(self) -> str:
            return threading.current_thread().name

    here = threading.current_thread().name
    handlers = {
        "coroutine": coroutine,
        "callable": Callable(),
        "plain": lambda: threading.current_thread().name,
        "inline": onehop.method(inline=True)(lambda: threading.current_thread().name),
    }
    await node().serve("clock", handlers)
    client = node().client("clock")
    told = {name: await client.call(name) for name in handlers}
    assert told == {"coroutine": here, "callable": here, "plain": "onehop-worker", "inline": here}


async def test_plain_handlers_do_not_hold_up_the_loop(node) -> None:
    go_on, entered = threading.Event(), threading.Semaphore(0)

    def work() -> bool:
        entered.release()
        return go_on.wait(30.0)

    async def read() -> int:
        return 1

    await node().serve("clock", {"work": work, "read": read}, workers=4)
    client = node().client("clock")
    working = [asyncio.ensure_future(client.call("work")) for _ in range(8)]
    assert [await client.call("read") for _ in range(20)] == [1] * 20
    assert not any(task.done() for task in working)
    go_on.set()
    assert await asyncio.gather(*working) == [True] * 8


async def test_coroutines_run_side_by_side_without_workers(node) -> None:
    everybody = asyncio.Barrier(300)

    async def meet() -> bool:
        await everybody.wait()
        return True

    await node().serve("clock", {"meet": meet}, workers=1)
    client = node().client("clock")
    assert await asyncio.gather(*(client.call("meet") for _ in range(300))) == [True] * 300


async def test_first_use_by_many_tasks_at_once_opens_one_link(node) -> None:
    calls = 0

    async def double(value: int) -> int:
        nonlocal calls
        calls += 1
        return 2 * value

    serving, calling = node(), node()
    await serving.serve("clock", {"double": double})
    told = await asyncio.gather(*(calling.call("clock", "double", number) for number in range(400)))
    assert told == [2 * number for number in range(400)]
    assert len(calling.statistics().peers) == 1
    assert calls == 400


async def test_handler_knows_its_request_and_calls_end_with_it(node) -> None:
    seen: list[Any] = []
    middle = node()

    async def never() -> None:
        await asyncio.sleep(60)

    async def relay() -> None:
        now = onehop.current()
        assert now is not None
        seen.append((now.service, now.server, now.method, now.sender))
        began = time.monotonic()
        try:
            await middle.client("slow", timeout=30.0).call("never")
        finally:
            seen.append(time.monotonic() - began)

    await node().serve("slow", {"never": never})
    await middle.serve("middle", {"relay": relay}, server="a")
    calling = node()
    await calling.wait_for("middle")
    client = calling.client("middle", timeout=0.5)
    await client.options(timeout=20.0).ping()
    with pytest.raises((CallTimeout, RemoteError)):
        await client.call("relay")
    async with asyncio.timeout(20):
        while len(seen) < 2:
            await asyncio.sleep(0.01)
    assert seen[0] == ("middle", "a", "relay", calling.id)
    assert seen[1] < 2.0
    assert onehop.current() is None


async def test_what_a_handler_leaves_running_is_not_bound_by_its_deadline(node) -> None:
    middle, later = node(), []

    async def read() -> int:
        return 5

    async def begin() -> None:
        async def go_on() -> Any:
            await asyncio.sleep(0.6)
            return await middle.call("clock", "read")

        later.append(asyncio.ensure_future(go_on()))

    await node().serve("clock", {"read": read})
    await middle.serve("middle", {"begin": begin})
    client = node().client("middle", timeout=0.5)
    await client.options(timeout=20.0).ping()
    await client.call("begin")
    assert await later[0] == 5


async def test_handlers_see_the_context_of_serve_and_keep_theirs_to_themselves(node) -> None:
    async def swap(value: str) -> str:
        before = request_id.get()
        request_id.set(value)
        await asyncio.sleep(0)
        assert request_id.get() == value
        return before

    request_id.set("serving")
    await node().serve("clock", {"swap": swap})
    request_id.set("calling")
    client = node().client("clock")
    told = await asyncio.gather(*(client.call("swap", str(number)) for number in range(20)))
    assert told == ["serving"] * 20
    assert request_id.get() == "calling"


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("kind", ["coroutine", "plain", "inline"])
async def test_handler_that_exits_answers_its_caller_and_nobody_ends(node, error, kind) -> None:
    async def coroutine() -> None:
        raise error(3)

    def plain() -> None:
        raise error(3)

    inline = onehop.method(inline=True)(lambda: plain())
    serving = node()
    await serving.serve("clock", {"coroutine": coroutine, "plain": plain, "inline": inline, "read": lambda: 1})
    client = node().client("clock")
    for _ in range(3):
        with pytest.raises(RemoteError) as caught:
            await client.call(kind)
        assert (caught.value.type, caught.value.executed) == (error.__name__, "yes")
    assert await client.call("read") == 1
    assert serving.statistics().taken == 0


async def test_cast_whose_coroutine_fails_is_logged_and_counted(node, until, caplog) -> None:
    async def fail() -> None:
        raise ValueError("will not")

    serving = node()
    await serving.serve("clock", {"fail": fail})
    with caplog.at_level(logging.ERROR, "onehop"):
        await node().cast("clock", "fail")
        await until(lambda: serving.statistics().dropped.get("casts whose handler raised") == 1)
    assert "the handler of cast 'fail' of service 'clock' raised" in caplog.text
    await until(lambda: serving.statistics().taken == 0)


async def test_drain_finishes_the_coroutines_that_were_taken(node, until) -> None:
    go_on = asyncio.Event()

    async def hold() -> int:
        await go_on.wait()
        return 5

    serving, calling = node(), node()
    await serving.serve("clock", {"hold": hold})
    held = asyncio.ensure_future(calling.call("clock", "hold"))
    await until(lambda: serving.statistics().taken == 1)
    assert await serving.drain(0.05) is False
    closing = asyncio.ensure_future(serving.close(drain=True))
    go_on.set()
    assert await held == 5
    await closing


@pytest.mark.parametrize("size", [0, 64 * 1024, 8 * 1024 * 1024 - 64])
async def test_bodies_of_any_size_go_to_and_fro(node, size) -> None:
    async def echo(value: bytes) -> bytes:
        return value

    await node().serve("clock", {"echo": echo})
    client = node().client("clock")
    bodies = [bytes([number]) * size for number in range(4)]
    assert await asyncio.gather(*(client.call("echo", body) for body in bodies)) == bodies


async def test_tasks_may_poll_one_listener(node) -> None:
    listener = await node().listen("clock")
    client = node().client("clock")

    async def answer() -> int:
        count = 0
        while found := await listener.poll(limit=3, timeout=None):
            for incoming in found:
                incoming.reply_raw(bytes(incoming.body))
                count += 1
        return count

    answering = [asyncio.ensure_future(answer()) for _ in range(4)]
    bodies = [number.to_bytes(2, "big") for number in range(500)]
    assert list(map(bytes, await asyncio.gather(*(client.call_raw("read", body) for body in bodies)))) == bodies
    await listener.stop()
    assert sum(await asyncio.gather(*answering)) == 500
