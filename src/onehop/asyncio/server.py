"""What a node serves from a loop: instances whose handlers are coroutines or functions, and those that are polled."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Coroutine, Mapping
from contextvars import copy_context
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from onehop import handlers, payload
from onehop.errors import EncodeError, SettingsError
from onehop.protocol import wire
from onehop.protocol.inbox import Inbox, Request
from onehop.serving import SIGN_INTERVAL, Incoming, Runner, arguments_of, expired, fitting, many_of
from onehop.transport.loop import LoopEngine
from onehop.transport.queue import Queue
from onehop.transport.requests import serving

if TYPE_CHECKING:
    from onehop.asyncio.node import Node

log = logging.getLogger("onehop")


class _Running:
    """A request that a task runs. Who has news of it (credit, cancellation) calls :meth:`release`, in any thread."""

    __slots__ = ("_stopped", "begun", "credit", "engine", "request", "task")

    def __init__(self, engine: LoopEngine, request: Request) -> None:
        self.engine = engine
        self.request = request
        self.credit = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.begun = False
        self._stopped = False

    def release(self) -> None:
        self.engine.call_in_loop(self._told)

    def _told(self) -> None:
        # A task that has not begun would never come to its end, where it answers; it looks by itself when it begins.
        if self.request.cancelled and self.begun and self.task is not None and not self._stopped:
            self._stopped = True  # a second time would break into what the handler does at its end
            self.task.cancel()
        self.credit.set()


class Server:
    """One instance of a service. Made by :meth:`Node.serve`.

    Coroutine functions run as tasks of the loop; plain functions in worker threads, or (``inline``) in the loop.
    """

    def __init__(self, node: Node, engine: LoopEngine, service: str, name: str, handler: Any, workers: int | None):
        runner = Runner(service, handler, node.settings)
        if workers is not None and workers < 1:
            raise SettingsError(f"workers is {workers!r}; it must be 1 or more")
        self.service = service
        self.name = name
        self._node = node
        self._engine = engine
        self._runner = runner
        self._in_loop = frozenset(name for name, method in runner.methods.items() if _in_loop(method.function))
        self._context = copy_context()
        self._tasks: set[asyncio.Task[None]] = set()
        self._queue = Queue(self._run, workers or node.settings.workers, runner.methods, runner.inline | self._in_loop)
        runner.queue = self._queue

    async def _offer(self) -> None:
        offer = (self.service, self.name, self._queue, self._runner.idempotent)
        await _offered(self._engine, self._queue, self._engine.offer_in_loop(*offer))

    def _run(self, request: Request) -> None:
        if request.names[2] not in self._in_loop:
            self._runner.run(request)
            return
        running = request.waiter = _Running(self._engine, request)
        context = self._context.copy()
        context.run(serving.set, request)
        steps = self._serve(request, running)
        try:
            task = running.task = self._engine.loop.create_task(steps, context=context)
        except Exception as error:  # of a task factory, which is the program's
            has_begun = inspect.getcoroutinestate(steps) != inspect.CORO_CREATED  # where the factory is an eager one
            steps.close()
            request.waiter = None
            inbound = self._queue.inbound
            inbound.counts["requests whose run broke"] += 1
            log.error("there is no task for %r of service %r", request.method, self.service, exc_info=error)
            if has_begun:
                frame = wire.answer(wire.REPLY, wire.FAILED, request.id, handlers.failure(error), len(self._queue))
                inbound.put(request, frame if request.kind == wire.REQUEST else None)
            else:
                inbound.refuse(request, "full")
            return
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, request: Request, running: _Running) -> None:
        inbound = self._queue.inbound
        frame: wire.Frame | None = None
        running.begun = True
        try:
            if expired(request):
                frame = wire.reject(request.id, "expired")
                inbound.change(Inbox.refuse_taken, request, "expired")
            else:
                frame = await self._answer(request, running)
        except BaseException as error:  # SystemExit too: it is the handler's doing, and its caller waits
            if not (isinstance(error, asyncio.CancelledError) and request.cancelled):
                load = len(self._queue)
                frame = wire.answer(wire.REPLY, wire.FAILED, request.id, handlers.failure(error), load)
                if request.kind == wire.CAST:
                    self._runner.note_failed(request, error)
        finally:
            request.due, request.deadline = request.deadline, None  # what the handler left running is not bound by it
            inbound.put(request, frame if request.kind == wire.REQUEST else None)
            self._engine.lead_soon()

    async def _answer(self, request: Request, running: _Running) -> wire.Frame | None:
        method = self._runner.methods[request.method]
        pair = payload.decode_arguments(request.body)
        if pair is None:
            for each in many_of(request):
                try:
                    await method.invoke(*arguments_of(each))
                except Exception as error:
                    self._runner.note_failed(request, error)
            return None
        result = method.invoke(*pair)
        if not request.flags & wire.STREAM:
            value = [item async for item in result] if hasattr(result, "__anext__") else await result
            return wire.answer(wire.REPLY, 0, request.id, fitting(value, self._node.settings), len(self._queue))
        if not hasattr(result, "__anext__"):
            result = await result
        if not await self._write(request, running, result):
            return None  # cut short: an end would read as if that had been all
        return wire.answer(wire.REPLY, wire.STREAM, request.id, b"\xc0")

    async def _write(self, request: Request, running: _Running, result: Any) -> bool:
        """Send the items of a stream, never more of them than its reader asked for; whether all were sent."""
        is_async = hasattr(result, "__aiter__")
        if isinstance(result, (str, bytes, Mapping)) or not (is_async or hasattr(result, "__iter__")):
            raise EncodeError(f"{request.method!r} returned {type(result).__name__}, which is not a stream; call it")
        inbound, sent = self._queue.inbound, 0
        items = result if is_async else _each(result)
        try:
            async for item in items:
                body = fitting(item, self._node.settings)
                while request.granted <= sent:
                    if expired(request) or inbound.closing:
                        return False
                    running.credit.clear()
                    try:
                        async with asyncio.timeout(SIGN_INTERVAL):
                            await running.credit.wait()
                    except TimeoutError:
                        # A reader that is gone is noticed only by sending to it.
                        inbound.put(request, wire.pack(wire.PROGRESS, id=request.id), last=False)
                        self._engine.lead_soon()
                if expired(request):
                    return False
                frame = wire.answer(wire.ITEM, 0, request.id, body, number=sent & 0xFFFF_FFFF)
                inbound.put(request, frame, last=False)
                self._engine.lead_soon()
                sent += 1
        finally:
            close = getattr(items, "aclose", None)
            if close is not None:
                await close()
        return True

    async def run(self) -> bool:
        """:meth:`onehop.asyncio.Node.run`: serve until SIGTERM or SIGINT, then drain."""
        return await self._node.run()

    async def drain(self, timeout: float | None = None) -> bool:
        """Withdraw this instance and finish what it has taken; whether that was done within ``timeout`` seconds."""
        return self._engine.inherited or await self._engine.drain(timeout, self._queue)

    async def close(self) -> None:
        """Withdraw this instance; what it has taken is still finished in the background. May be called twice."""
        if not self._engine.closed:
            await self._engine.withdraw_in_loop(self._queue)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _offered(engine: LoopEngine, queue: Queue, offering: Coroutine[Any, Any, None]) -> None:
    """Wait until ``queue`` is offered; where the task that waits is cancelled, it is withdrawn again."""
    task = asyncio.ensure_future(offering)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not engine.closed:
            await engine.withdraw_in_loop(queue)
        raise


def _in_loop(function: Any) -> bool:
    """Whether calling ``function`` gives something to be awaited, or iterated over with ``async for``."""
    return any(
        inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each)
        for each in (function, getattr(function, "__call__", None))  # noqa: B004 (the method itself is looked at)
    )


async def _each(items: Any) -> Any:
    for item in items:
        yield item


class _Sleeper:
    """A task that polls, for whoever wakes it from any thread."""

    __slots__ = ("engine", "future")

    def __init__(self, engine: LoopEngine) -> None:
        self.engine = engine
        self.future: asyncio.Future[None] = engine.loop.create_future()

    def release(self) -> None:
        self.engine.call_in_loop(self._wake)

    def _wake(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


class Listener:
    """One instance of one or more services whose requests are polled. Made by :meth:`Node.listen`."""

    def __init__(self, engine: LoopEngine, services: tuple[str, ...], name: str) -> None:
        self.services = services
        self.name = name
        self._engine = engine
        self._queue = Queue()

    async def _offer(self) -> None:
        for service in self.services:
            offering = self._engine.offer_in_loop(service, self.name, self._queue, ())
            await _offered(self._engine, self._queue, offering)

    async def poll(self, limit: int = 1, timeout: float | None = None) -> list[Incoming]:
        """Wait for a request and return it with others that are there, up to ``limit``.

        Requests whose caller gave up are passed over. After :meth:`stop` it never waits: it returns what is left,
        then nothing.

        Args:
            timeout: seconds to wait; None for as long as it takes.
        """
        if self._engine.inherited:
            return []
        queue, inbound = self._queue, self._queue.inbound
        until = float("inf") if timeout is None else monotonic() + timeout
        found: list[Incoming] = []
        while len(found) < limit:
            try:
                request = queue.pop()
            except IndexError:
                if found or queue.stopped or monotonic() >= until:  # only the first is waited for
                    break
                await self._sleep(until)
                continue
            if expired(request):
                inbound.refuse(request, "expired")
            else:
                found.append(Incoming(request, self._engine.settings))
        return found

    async def _sleep(self, until: float) -> None:
        sleeper, idle = _Sleeper(self._engine), self._queue.idle
        idle.append(sleeper)
        try:
            if not self._queue.tasks and not self._queue.stopped:  # looked at after the sleeper can be found
                left = until - monotonic()
                await asyncio.wait([sleeper.future], timeout=None if left == float("inf") else max(left, 0.0))
        finally:
            if sleeper in idle:
                idle.remove(sleeper)
            elif self._queue.tasks:
                self._queue.wake_one()  # it was taken out for a request that another may have to take now

    async def stop(self) -> None:
        """Withdraw: nothing more comes, and :meth:`poll` waits no more. May be called twice."""
        if not self._engine.inherited:
            await self._engine.withdraw_in_loop(self._queue)

    async def close(self) -> None:
        """:meth:`stop`, and refuse what was not polled. May be called twice."""
        await self.stop()
        if not self._engine.inherited:
            self._queue.inbound.refuse_rest(self._queue)
