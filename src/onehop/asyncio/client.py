"""A client of one service, for tasks, and what its verbs return."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from onehop import handlers, payload
from onehop.errors import CallCancelled, CallError
from onehop.faces import AnyClient, Gathered, Receipt, bodies_of, gathered, receipt
from onehop.protocol import wire
from onehop.protocol.calls import FAILED
from onehop.transport.loop import LoopEngine
from onehop.transport.requests import Attempt, describe

if TYPE_CHECKING:
    from onehop.asyncio.node import Node


class Client(AnyClient):
    """Calls one service, from tasks of one loop. The options are those of :class:`onehop.faces.AnyClient`.

    A task that is cancelled while it waits for a call cancels the call, at the server too.
    """

    def __init__(self, node: Node, service: str, **options: Any) -> None:
        super().__init__(node.settings, service, **options)
        self._node = node

    def at(self, server: str) -> Client:
        """A client of the server of that name only."""
        return self.options(server=server)

    def options(self, **options: Any) -> Client:
        """A client with some options changed."""
        return self._node.client(self.service, **self._changed(options))

    @property
    def proxy(self) -> Proxy:
        """Calls by attribute: ``await client.proxy.read(zone="utc")``."""
        return Proxy(self)

    async def call(self, method: str, /, *arguments: Any, **keywords: Any) -> Any:
        """Call ``method`` at one server and return its reply.

        Raises:
            NoRoute: nobody offers the service. Rejected: who does refused. CallTimeout: the deadline passed.
            PeerLost: the server went away. RemoteError: the handler raised (one of ``errors`` is raised as itself).
            PayloadError: the arguments, or the reply, have no form.
        """
        engine = self._node._engine or await self._node._core()
        call = await engine.request(self._terms, wire.REQUEST, 0, method, payload.encode((arguments, keywords)))
        return self._value(method, call)

    async def cast(self, method: str, /, *arguments: Any, **keywords: Any) -> None:
        """Have ``method`` run at one server; returns when that server has taken the request in.

        Raises:
            NoRoute, Rejected, CallTimeout, PeerLost, PayloadError: it was not taken in (or, as ``executed`` says, it is
                unknown).
        """
        await self.cast_raw(method, payload.encode((arguments, keywords)))

    async def cast_many(self, method: str, many: Iterable[Sequence[Any] | Mapping[str, Any]], /) -> None:
        """Have ``method`` run at one server once for each of ``many``, sent together in few messages.

        Returns when all were taken in; a server that is full is waited for, until the timeout of each message.

        Args:
            many: for each run its positional arguments (a sequence), or its keywords (a mapping).

        Raises:
            NoRoute, Rejected, CallTimeout, PeerLost, PayloadError: some were not taken in, or it is unknown.
        """
        await (await self._node._core()).cast_all(self._terms, method, bodies_of(many))

    async def start(self, method: str, /, *arguments: Any, **keywords: Any) -> Call:
        """Begin a call; its reply is fetched later. It is sent to one server and not tried at another."""
        body = payload.encode((arguments, keywords))
        engine = await self._node._core()
        return Call(self, engine, await engine.start_request(self._terms, wire.REQUEST, 0, method, body))

    def stream(self, method: str, /, *arguments: Any, **keywords: Any) -> Stream:
        """Call ``method``, whose handler yields items: ``async for item in client.stream(...)``, as they are produced.

        The call begins with the first item that is asked for, or with ``async with``. The server is never more than
        ``settings.stream_credit`` items ahead of the reader. The timeout is for the whole stream.
        """
        return Stream(self, method, payload.encode((arguments, keywords)))

    async def fanout(self, method: str, /, *arguments: Any, **keywords: Any) -> list[Receipt]:
        """Have ``method`` run at every server known now; returns a receipt for each, and raises for none of them."""
        return await self.fanout_raw(method, payload.encode((arguments, keywords)))

    async def gather(self, method: str, /, *arguments: Any, **keywords: Any) -> Gathered:
        """Call ``method`` at every server known now; replies by server, and an error for each that gave none."""
        body = payload.encode((arguments, keywords))
        attempts = await self._scatter(wire.REQUEST, 0, method, body)
        return gathered(attempts, lambda attempt: self._value(method, attempt.call))

    async def ping(self) -> list[Receipt]:
        """A sign of life from the engine of every server known now."""
        return list(map(receipt, await self._scatter(wire.PING, 0, "ping", b"")))

    async def call_raw(self, method: str, body: bytes) -> bytes | memoryview:
        """:meth:`call` with bytes in and bytes out."""
        engine = self._node._engine or await self._node._core()
        call = await engine.request(self._terms, wire.REQUEST, 0, method, body)
        if call.outcome is FAILED:
            raise handlers.rebuild(call.body, self._errors, describe(method, self._terms, call.route))
        reply: bytes | memoryview = call.body
        return reply

    async def cast_raw(self, method: str, body: bytes) -> None:
        """:meth:`cast` with bytes."""
        engine = self._node._engine or await self._node._core()
        await engine.request(self._terms, wire.CAST, 0, method, body)

    async def fanout_raw(self, method: str, body: bytes) -> list[Receipt]:
        """:meth:`fanout` with bytes."""
        return list(map(receipt, await self._scatter(wire.CAST, wire.FANOUT, method, body)))

    async def _scatter(self, kind: int, flags: int, method: str, body: bytes) -> list[Attempt]:
        engine = await self._node._core()
        return await engine.scatter(self._terms, kind, flags, method, body)


class Proxy:
    """The methods of a service as attributes."""

    __slots__ = ("_client",)

    def __init__(self, client: Client) -> None:
        self._client = client

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        if method.startswith("__"):
            raise AttributeError(method)
        call = self._client.call
        return lambda *arguments, **keywords: call(method, *arguments, **keywords)


class Call:
    """A call that was begun; see :meth:`Client.start`."""

    def __init__(self, client: Client, engine: LoopEngine, attempt: Attempt) -> None:
        self._client = client
        self._engine = engine
        self._attempt = attempt
        self._cancelled = False

    @property
    def done(self) -> bool:
        """Whether the outcome is here."""
        if self._attempt.call.outcome is None:
            self._engine.check_loop()
            self._attempt.link.look()
        return self._attempt.call.outcome is not None

    async def result(self) -> Any:
        """Wait for the reply and return it; raises as :meth:`Client.call`, and CallCancelled after :meth:`cancel`.

        A task that is cancelled here leaves the call as it is; others may wait for it.
        """
        self._engine.check_loop()
        try:
            await self._engine.outcome(self._attempt)
        except CallError as error:
            if self._cancelled:
                raise CallCancelled(f"{self._attempt} was cancelled here") from error
            raise
        return self._client._value(self._attempt.method, self._attempt.call)

    def cancel(self) -> bool:
        """Give the call up and tell the server; False if it had ended.

        A task that waits in :meth:`result` ends with CallCancelled.
        """
        self._engine.check_loop()
        before, self._cancelled = self._cancelled, True  # first: who waits in result() is woken by what follows
        if not self._engine.cancel(self._attempt.link, self._attempt.call):
            self._cancelled = before
            return False
        return True


class Stream(AsyncIterator[Any]):
    """The items of a streaming call, as they are produced. Closing it early tells the server to stop."""

    def __init__(self, client: Client, method: str, body: bytes) -> None:
        self._client = client
        self._method = method
        self._body = body
        self._engine: LoopEngine | None = None
        self._attempt: Attempt | None = None
        self._credit = client._node.settings.stream_credit
        self._read = 0
        self._ended = False
        self._closed = False
        self._beginning = asyncio.Lock()

    async def _begin(self) -> None:
        async with self._beginning:  # two tasks may ask for the first item
            if self._attempt is None:
                engine = self._engine = await self._client._node._core()
                terms = self._client._terms
                attempt = await engine.start_request(terms, wire.REQUEST, wire.STREAM, self._method, self._body)
                self._attempt = attempt
                self._grant(attempt, self._credit)
                if self._closed:  # meanwhile
                    self._stop()

    def _grant(self, attempt: Attempt, items: int) -> None:
        attempt.call.granted += items
        attempt.link.post(None, wire.pack(wire.CREDIT, number=items, id=attempt.call.id))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        """The next item.

        Raises:
            StopAsyncIteration: the handler ended, or the stream was closed. Otherwise as :meth:`Client.call`.
        """
        if self._attempt is None and not self._closed:
            await self._begin()
        engine, attempt = self._engine, self._attempt
        if engine is None or attempt is None:  # closed before it began
            raise StopAsyncIteration
        call = attempt.call
        items = call.items
        assert items is not None
        while not items and not self._ended:
            if call.outcome is None and await engine.wait(attempt.link, call, call.signs, attempt.patience()):
                continue
            if not items and not self._ended:
                self._ended = True
                await engine.outcome(attempt, call.signs)
                if call.outcome is FAILED:
                    self._client._value(self._method, call)  # raises it
        if not items:
            raise StopAsyncIteration
        body = items.popleft()
        self._read += 1
        if self._read * 2 >= self._credit and not self._ended and call.outcome is None:
            self._grant(attempt, self._read)
            self._read = 0
        value = payload.decode(body)
        return value if self._client._returns is None else payload.restore(value, self._client._returns)

    async def close(self) -> None:
        """Stop reading; the server is told, unless it has ended. May be called twice."""
        self._stop()

    def _stop(self) -> None:
        self._closed = True
        if not self._ended and self._attempt is not None and self._engine is not None:
            self._ended = True
            self._engine.cancel(self._attempt.link, self._attempt.call)
            if self._attempt.call.items is not None:
                self._attempt.call.items.clear()

    async def __aenter__(self) -> Self:
        await self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None and not engine.closed and not self._ended:
            engine.call_in_loop(self._stop)  # the collector may run in any thread
