"""A client of one service, and what its verbs return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from onehop import handlers, payload
from onehop.errors import CallCancelled, CallError
from onehop.faces import AnyClient, Gathered, Receipt, bodies_of, gathered, receipt
from onehop.protocol import wire
from onehop.protocol.calls import FAILED, REPLIED
from onehop.transport.blocking import BlockingEngine, run
from onehop.transport.requests import Attempt, describe
from onehop.transport.waiting import acquire, new_lock

if TYPE_CHECKING:
    from onehop.sync.node import Node


class Client(AnyClient):
    """Calls one service, from any thread. The options are those of :class:`onehop.faces.AnyClient`."""

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
        """Calls by attribute: ``client.proxy.read(zone="utc")``."""
        return Proxy(self)

    def call(self, method: str, /, *arguments: Any, **keywords: Any) -> Any:
        """Call ``method`` at one server and return its reply.

        Raises:
            NoRoute: nobody offers the service. Rejected: who does refused. CallTimeout: the deadline passed.
            PeerLost: the server went away. RemoteError: the handler raised (one of ``errors`` is raised as itself).
            PayloadError: the arguments, or the reply, have no form.
        """
        node = self._node
        engine = node._engine or node._core()
        call = engine.request(self._terms, wire.REQUEST, 0, method, payload.encode((arguments, keywords)))
        if call.outcome is REPLIED and self._returns is None:
            return payload.decode(call.body)
        return self._value(method, call)

    def cast(self, method: str, /, *arguments: Any, **keywords: Any) -> None:
        """Have ``method`` run at one server; returns when that server has taken the request in.

        Raises:
            NoRoute, Rejected, CallTimeout, PeerLost, PayloadError: it was not taken in (or, as ``executed`` says, it is
                unknown).
        """
        self.cast_raw(method, payload.encode((arguments, keywords)))

    def cast_many(self, method: str, many: Iterable[Sequence[Any] | Mapping[str, Any]], /) -> None:
        """Have ``method`` run at one server once for each of ``many``, sent together in few messages.

        Returns when all were taken in; a server that is full is waited for, until the timeout of each message.

        Args:
            many: for each run its positional arguments (a sequence), or its keywords (a mapping).

        Raises:
            NoRoute, Rejected, CallTimeout, PeerLost, PayloadError: some were not taken in, or it is unknown.
        """
        run(self._node._core().cast_all(self._terms, method, bodies_of(many)))

    def start(self, method: str, /, *arguments: Any, **keywords: Any) -> Call:
        """Begin a call; its reply is fetched later. It is sent to one server and not tried at another."""
        body = payload.encode((arguments, keywords))
        engine = self._node._core()
        return Call(self, engine, run(engine.start_request(self._terms, wire.REQUEST, 0, method, body)))

    def stream(self, method: str, /, *arguments: Any, **keywords: Any) -> Stream:
        """Call ``method``, whose handler yields items; returns an iterator over them as they are produced.

        The server is never more than ``settings.stream_credit`` items ahead of the reader. The timeout is for the
        whole stream.
        """
        body = payload.encode((arguments, keywords))
        engine = self._node._core()
        return Stream(self, engine, run(engine.start_request(self._terms, wire.REQUEST, wire.STREAM, method, body)))

    def fanout(self, method: str, /, *arguments: Any, **keywords: Any) -> list[Receipt]:
        """Have ``method`` run at every server known now; returns a receipt for each, and raises for none of them."""
        return self.fanout_raw(method, payload.encode((arguments, keywords)))

    def gather(self, method: str, /, *arguments: Any, **keywords: Any) -> Gathered:
        """Call ``method`` at every server known now; replies by server, and an error for each that gave none."""
        engine = self._node._core()
        body = payload.encode((arguments, keywords))
        attempts = run(engine.scatter(self._terms, wire.REQUEST, 0, method, body))
        return gathered(attempts, lambda attempt: self._value(method, attempt.call))

    def ping(self) -> list[Receipt]:
        """A sign of life from the engine of every server known now."""
        return list(map(receipt, run(self._node._core().scatter(self._terms, wire.PING, 0, "ping", b""))))

    def call_raw(self, method: str, body: bytes) -> bytes | memoryview:
        """:meth:`call` with bytes in and bytes out."""
        node = self._node
        engine = node._engine or node._core()
        call = engine.request(self._terms, wire.REQUEST, 0, method, body)
        if call.outcome is FAILED:
            raise handlers.rebuild(call.body, self._errors, describe(method, self._terms, call.route))
        reply: bytes | memoryview = call.body
        return reply

    def cast_raw(self, method: str, body: bytes) -> None:
        """:meth:`cast` with bytes."""
        node = self._node
        engine = node._engine or node._core()
        engine.request(self._terms, wire.CAST, 0, method, body)

    def fanout_raw(self, method: str, body: bytes) -> list[Receipt]:
        """:meth:`fanout` with bytes."""
        return list(map(receipt, run(self._node._core().scatter(self._terms, wire.CAST, wire.FANOUT, method, body))))


class Proxy:
    """The methods of a service as attributes."""

    __slots__ = ("_client",)

    def __init__(self, client: Client) -> None:
        self._client = client

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("__"):
            raise AttributeError(method)
        call = self._client.call
        return lambda *arguments, **keywords: call(method, *arguments, **keywords)


class Call:
    """A call that was begun; see :meth:`Client.start`."""

    def __init__(self, client: Client, engine: BlockingEngine, attempt: Attempt) -> None:
        self._client = client
        self._engine = engine
        self._attempt = attempt
        self._cancelled = False
        self._waiting = new_lock()

    @property
    def done(self) -> bool:
        """Whether the outcome is here."""
        if self._attempt.call.outcome is None:
            self._attempt.link.look()
        return self._attempt.call.outcome is not None

    def result(self) -> Any:
        """Wait for the reply and return it; raises as :meth:`Client.call`, and CallCancelled after :meth:`cancel`."""
        attempt = self._attempt
        # One thread at a time: of several the engine would wake one. Not without an end, nor where there is nothing to
        # wait for: a signal handler may ask in the thread that waits, or a forked child for a thread that it has not.
        alone = attempt.call.outcome is None and acquire(self._waiting, attempt.until - monotonic())
        try:
            run(self._engine.outcome(attempt))
        except CallError as error:
            if self._cancelled:
                raise CallCancelled(f"{attempt} was cancelled here") from error
            raise
        finally:
            if alone:
                self._waiting.release()
        return self._client._value(attempt.method, attempt.call)

    def cancel(self) -> bool:
        """Give the call up and tell the server; False if it had ended.

        A thread that waits in :meth:`result` ends with CallCancelled.
        """
        before, self._cancelled = self._cancelled, True  # first: who waits in result() is woken by what follows
        if not self._engine.cancel(self._attempt.link, self._attempt.call):
            self._cancelled = before
            return False
        return True


class Stream(Iterator[Any]):
    """The items of a streaming call, as they are produced. Closing it early tells the server to stop."""

    def __init__(self, client: Client, engine: BlockingEngine, attempt: Attempt) -> None:
        self._client = client
        self._engine = engine
        self._attempt = attempt
        self._credit = client._node.settings.stream_credit
        self._read = 0
        self._ended = False
        self._reading = new_lock()
        self._grant(self._credit)

    def _grant(self, items: int) -> None:
        self._attempt.call.granted += items
        self._attempt.link.post(None, wire.pack(wire.CREDIT, number=items, id=self._attempt.call.id))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        """The next item.

        Raises:
            StopIteration: the handler ended. Otherwise as :meth:`Client.call`.
        """
        call = self._attempt.call
        alone = call.outcome is None and acquire(self._reading, self._attempt.until - monotonic())  # as in Call.result
        try:
            return self._next()
        finally:
            if alone:
                self._reading.release()

    def _next(self) -> Any:
        call = self._attempt.call
        items = call.items
        assert items is not None
        while not items and not self._ended:
            seen = call.signs
            if items:
                break
            if call.outcome is not None or not self._wait(seen):
                if items:
                    break
                self._ended = True
                run(self._engine.outcome(self._attempt, call.signs))
                if call.outcome is FAILED:
                    self._client._value(self._attempt.method, call)  # raises it
        try:
            body = items.popleft()
        except IndexError:
            raise StopIteration from None
        self._read += 1
        if self._read * 2 >= self._credit and not self._ended and call.outcome is None:
            self._grant(self._read)
            self._read = 0
        value = payload.decode(body)
        return value if self._client._returns is None else payload.restore(value, self._client._returns)

    def _wait(self, seen: int) -> bool:
        attempt = self._attempt
        return run(self._engine.wait(attempt.link, attempt.call, seen, attempt.patience()))

    def close(self) -> None:
        """Stop reading; the server is told, unless it has ended. May be called twice."""
        if not self._ended:
            self._ended = True
            self._engine.cancel(self._attempt.link, self._attempt.call)
            if self._attempt.call.items is not None:
                self._attempt.call.items.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):
            try:
                self.close()
            except Exception:  # the interpreter may be ending
                pass
