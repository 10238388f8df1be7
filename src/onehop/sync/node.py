"""The blocking face: a node, the services it offers and the clients it gives.

Every method may be called from any thread. Nothing happens at construction; the first use opens the registry, and
sockets and threads come when they are needed. A forked child finds its node new: another id, no services.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from time import monotonic
from types import TracebackType
from typing import Any, NamedTuple

import onehop
from onehop import handlers, payload
from onehop.errors import (
    CallCancelled,
    CallError,
    EncodeError,
    NodeClosed,
    NoSuchMethod,
    Rejected,
    SettingsError,
    TooLarge,
)
from onehop.interfaces import Record
from onehop.protocol import wire
from onehop.protocol.calls import FAILED, LOST
from onehop.protocol.inbox import Request
from onehop.registry import open_registry
from onehop.registry.local import LocalRegistry
from onehop.settings import Settings, from_environment, revise
from onehop.statistics import Statistics
from onehop.transport.engine import Attempt, Engine, Terms, inherited
from onehop.transport.inbound import Queue
from onehop.transport.memory import Network
from onehop.transport.sockets import ZmqCarrier
from onehop.transport.waiting import acquire, new_lock

log = logging.getLogger("onehop")

_running: ContextVar[Request | None] = ContextVar("onehop_running", default=None)
_nodes: weakref.WeakSet[Node] = weakref.WeakSet()
_inherited_engines: list[Engine] = []
"""Of a forked child: the parent's engines, kept so that nothing of theirs is closed from here."""


class Receipt(NamedTuple):
    """What became of one receiver's copy."""

    server: str
    node: str
    host: str
    outcome: str
    """``"taken"``, ``"unreachable"`` or ``"refused"``."""
    reason: str = ""
    seconds: float = 0.0


class Gathered(NamedTuple):
    """What came of asking every server. Keys are (server name, node id)."""

    replies: dict[tuple[str, str], Any]
    errors: dict[tuple[str, str], Exception]

    @property
    def missing(self) -> list[tuple[str, str]]:
        """Who did not reply, in a stable order."""
        return sorted(self.errors)


class ServerView(NamedTuple):
    """One server of a service, as the registry tells it."""

    service: str
    server: str
    node: str
    host: str
    pid: int
    state: str
    local: bool


class Serving(NamedTuple):
    """The request that the running handler serves; see :func:`current`."""

    service: str
    server: str
    method: str
    sender: str
    """The node id of the caller, in hexadecimal."""
    request: Request

    def remaining(self) -> float | None:
        """Seconds until the caller gives up; None for never."""
        return None if self.request.deadline is None else self.request.deadline - monotonic()

    @property
    def cancelled(self) -> bool:
        """Whether the caller gave up or is gone."""
        return self.request.cancelled


def current() -> Serving | None:
    """The request that the calling handler serves; None outside of one."""
    request = _running.get()
    if request is None:
        return None
    return Serving(request.service, request.server, request.method, request.node.hex(), request)


class Node:
    """One process's presence: serves, and calls what others serve.

    Args:
        settings: all of them; by default those of the environment (``ONEHOP_*``).
        network: carries messages inside this process instead of over ZeroMQ, with a registry of its own: for tests.
        overrides: single settings by name, such as ``timeout=5.0``.

    Raises:
        SettingsError: a setting does not fit.
    """

    def __init__(self, settings: Settings | None = None, *, network: Network | None = None, **overrides: Any) -> None:
        self.settings = from_environment(**overrides) if settings is None else revise(settings, **overrides)
        self._network = network
        self._engine: Engine | None = None
        self._closed = False
        self._servers: list[Server | Listener] = []
        self._clients: dict[str, Client] = {}
        self._callbacks: list[Callable[[], None]] = []
        self._starting = threading.Lock()
        _nodes.add(self)

    def _core(self) -> Engine:
        """The engine, made at the first use."""
        engine = self._engine
        if engine is not None:
            return engine
        with self._starting:
            if self._closed:
                raise NodeClosed("this node was closed; make a new one")
            if self._engine is None:
                engine = self._make()
                for callback in self._callbacks:
                    engine.on_change(callback)
                engine.start()
                self._engine = engine
            return self._engine

    def _make(self) -> Engine:
        if self._network is not None:
            network = self._network
            return Engine(self.settings, network.carrier(), network.registry(), network.endpoint, onehop.__version__)
        registry = open_registry(self.settings.registry, self.settings)
        local = registry if isinstance(registry, LocalRegistry) else LocalRegistry(self.settings)

        def endpoint(node: bytes) -> str:
            # Half of the id: a socket's path has 107 bytes at most, and 64 random bits do not meet by chance.
            return f"ipc://{local.prepare()}/{node.hex()[:16]}.sock"

        return Engine(self.settings, ZmqCarrier(), registry, endpoint, onehop.__version__)

    # Serving --------------------------------------------------------------------------------------

    def serve(self, service: str, handler: Any, *, server: str = "", workers: int | None = None) -> Server:
        """Offer the methods of ``handler`` as ``service``, in threads, until the returned server is closed.

        Args:
            handler: an object, a module, a dict of functions or a function; see :func:`onehop.handlers.methods_of`.
            server: the name of this instance; the host's name where empty. Several may share one.
            workers: threads at most; ``settings.workers`` by default.

        Raises:
            SettingsError, RegistryError, ResourceLimit, NodeClosed: it cannot be offered; says what to change.
        """
        return Server(self, _checked_name(service), server or self.settings.host_name, handler, workers)

    def listen(self, service: str | Sequence[str], *, server: str = "") -> Listener:
        """Offer ``service`` (or several as one) without handlers: the caller polls for requests and answers them.

        Args:
            server: the name of this instance; the host's name where empty.
        """
        names = (service,) if isinstance(service, str) else tuple(service)
        return Listener(self, tuple(_checked_name(name) for name in names), server or self.settings.host_name)

    # Calling --------------------------------------------------------------------------------------

    def client(self, service: str, **options: Any) -> Client:
        """A client of ``service``; ``options`` as in :meth:`Client.options`. Cheap, and safe to share among threads."""
        return Client(self, _checked_name(service), **options)

    def _client(self, service: str) -> Client:
        client = self._clients.get(service)
        if client is None:
            if len(self._clients) > 1024:
                self._clients.clear()
            client = self._clients[service] = self.client(service)
        return client

    def call(self, service: str, method: str, /, *arguments: Any, **keywords: Any) -> Any:
        """:meth:`Client.call` on a client with the default options."""
        return self._client(service).call(method, *arguments, **keywords)

    def cast(self, service: str, method: str, /, *arguments: Any, **keywords: Any) -> None:
        """:meth:`Client.cast` on a client with the default options."""
        self._client(service).cast(method, *arguments, **keywords)

    def stream(self, service: str, method: str, /, *arguments: Any, **keywords: Any) -> Stream:
        """:meth:`Client.stream` on a client with the default options."""
        return self._client(service).stream(method, *arguments, **keywords)

    def fanout(self, service: str, method: str, /, *arguments: Any, **keywords: Any) -> list[Receipt]:
        """:meth:`Client.fanout` on a client with the default options."""
        return self._client(service).fanout(method, *arguments, **keywords)

    def gather(self, service: str, method: str, /, *arguments: Any, **keywords: Any) -> Gathered:
        """:meth:`Client.gather` on a client with the default options."""
        return self._client(service).gather(method, *arguments, **keywords)

    # Looking --------------------------------------------------------------------------------------

    def nodes(self) -> list[Record]:
        """The records known now."""
        engine = self._core()
        engine.registry.refresh()
        return list(engine.records)

    def servers(self, service: str | None = None) -> list[ServerView]:
        """The servers known now, of one service or of all."""
        own = self._core().protocol.id.hex()
        return [
            ServerView(name, server, record.node, record.host, record.pid, record.state, record.node == own)
            for record in self.nodes()
            for name, servers in sorted(record.services.items())
            if service is None or name == service
            for server in servers
        ]

    def wait_for(self, service: str, *, server: str = "", count: int = 1, timeout: float | None = None) -> bool:
        """Wait until at least ``count`` servers offer ``service`` (under the name ``server``, where given).

        Args:
            timeout: seconds; ``settings.timeout`` by default.

        Returns:
            Whether they do.
        """
        engine = self._core()
        until = monotonic() + (self.settings.timeout if timeout is None else timeout)
        return engine.wait_for(lambda: len(engine.protocol.routes.of(service, server)) >= count, until)

    def on_change(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called after each change of what is known of other nodes; it must be quick."""
        self._callbacks.append(callback)
        if self._engine is not None:
            self._engine.on_change(callback)

    def ping(self, service: str, *, server: str = "", timeout: float = 1.0) -> list[Receipt]:
        """Ask the engine of every server of ``service`` for a sign of life; ``seconds`` is the time to and fro."""
        return self.client(service, server=server, timeout=timeout).ping()

    @property
    def id(self) -> str:
        """The node id, in hexadecimal; a forked child has its own."""
        return self._core().protocol.id.hex()

    def statistics(self) -> Statistics:
        """What this node counts, at this moment."""
        return self._core().statistics()

    def __repr__(self) -> str:
        engine = self._engine
        if engine is None:
            return f"<Node {self.settings.host_name}: {'closed' if self._closed else 'not used yet'}>"
        now = engine.statistics()
        ready = sum(peer.state == "ready" for peer in now.peers)
        flight = sum(peer.in_flight for peer in now.peers)
        return (
            f"<Node {now.node[:8]} on {now.host}: {len(now.peers)} peers ({ready} ready) | "
            f"{flight} requests under way, {now.taken} taken>"
        )

    # Ending ---------------------------------------------------------------------------------------

    def drain(self, timeout: float | None = None) -> bool:
        """Say goodbye to peers, refuse new requests, and finish those that were taken.

        Args:
            timeout: seconds; ``settings.drain_timeout`` by default.

        Returns:
            Whether everything taken was answered in time.
        """
        if self._engine is None:
            return True
        return self._engine.drain(self.settings.drain_timeout if timeout is None else timeout)

    def close(self, *, drain: bool = False) -> None:
        """End everything now, or after a :meth:`drain`. A closed node stays closed. May be called twice.

        Calls under way end as PeerLost; requests taken and not answered are left (their callers hear PeerLost).
        """
        if drain and not self._closed:
            self.drain()
        with self._starting:
            self._closed = True
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def __enter__(self) -> Node:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _after_fork(self) -> None:
        """In the child: drop what was inherited, without closing it."""
        engine, self._engine = self._engine, None
        self._starting = threading.Lock()
        self._callbacks.clear()
        for each in self._servers:
            each._after_fork()
        self._servers.clear()
        if engine is not None:
            engine.registry.forget()
            _inherited_engines.append(engine)


def _after_fork_in_child() -> None:
    for node in list(_nodes):
        node._after_fork()


@atexit.register
def _close_nodes() -> None:
    for node in list(_nodes):
        node.close()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _checked_name(service: str) -> str:
    if not isinstance(service, str) or not service:
        raise SettingsError(f"service is {service!r}; it must be a name, such as 'clock'")
    return service


class Server:
    """One instance of a service, run in threads. Made by :meth:`Node.serve`."""

    def __init__(self, node: Node, service: str, name: str, handler: Any, workers: int | None) -> None:
        self.service = service
        self.name = name
        self._node = node
        self._methods = handlers.methods_of(handler)
        self._engine: Engine | None = node._core()
        if workers is not None and workers < 1:
            raise SettingsError(f"workers is {workers!r}; it must be 1 or more")
        inline = frozenset(name for name, method in self._methods.items() if method.inline)
        idempotent = tuple(name for name, method in self._methods.items() if method.idempotent)
        self._queue = Queue(self._run, workers or node.settings.workers, inline)
        self._engine.offer(service, name, self._queue, idempotent, receiver=True)
        node._servers.append(self)

    def _run(self, request: Request) -> None:
        """Run one request, in a worker (or inline)."""
        engine = self._engine
        if engine is None or engine.inbound is None:
            return
        inbound = engine.inbound
        if engine.expired(request):
            inbound.answer(request, _refusal(request, "expired"))
            return
        inherited_token = inherited.set(request.deadline)
        running_token = _running.set(request)
        try:
            method = self._methods.get(request.method)
            if method is None:
                raise NoSuchMethod(f"it has {', '.join(sorted(self._methods))}")
            arguments, keywords = _arguments(request.body)
            result = method.invoke(arguments, keywords)
            if request.flags & wire.STREAM:
                self._write(engine, request, result)
                frame = wire.answer(wire.REPLY, wire.STREAM, request.id, b"\xc0")
            else:
                if hasattr(result, "__next__"):
                    result = list(result)
                frame = wire.answer(wire.REPLY, 0, request.id, _fitting(engine, result), len(self._queue))
        except Exception as error:
            frame = wire.answer(wire.REPLY, wire.FAILED, request.id, handlers.failure(error), len(self._queue))
            if request.kind == wire.CAST:
                # Nobody waits for it, so nobody else would ever know.
                log.exception("the handler of cast %s.%s raised", self.service, request.method)
                inbound.counts["casts whose handler raised"] += 1
        finally:
            _running.reset(running_token)
            inherited.reset(inherited_token)
        inbound.answer(request, frame if request.kind == wire.REQUEST else None)

    def _write(self, engine: Engine, request: Request, result: Any) -> None:
        """Send the items of a stream, never more of them than its reader asked for."""
        assert engine.inbound is not None
        if isinstance(result, (str, bytes, Mapping)) or not hasattr(result, "__iter__"):
            raise EncodeError(f"{request.method!r} returned {type(result).__name__}, which is not a stream; call it")
        lock = new_lock()
        lock.acquire()
        request.waiter = lock
        items = iter(result)
        try:
            for sent, item in enumerate(items):
                body = _fitting(engine, item)
                while request.granted <= sent:
                    if engine.expired(request) or engine.closed:
                        return
                    acquire(lock, 1.0)
                if engine.expired(request):
                    return
                frame = wire.answer(wire.ITEM, 0, request.id, body, number=sent & 0xFFFF_FFFF)
                engine.inbound.answer(request, frame, last=False)
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()

    def drain(self, timeout: float | None = None) -> bool:
        """Withdraw this instance and finish what it has taken; whether that was done within ``timeout`` seconds."""
        engine = self._engine
        return engine is None or engine.drain(timeout or self._node.settings.drain_timeout, self._queue)

    def close(self) -> None:
        """Withdraw this instance; what it has taken is still finished in the background. May be called twice."""
        if self._engine is not None and not self._engine.closed:
            self._engine.withdraw(self._queue)

    def _after_fork(self) -> None:
        self._engine = None
        self._queue = Queue()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _refusal(request: Request, reason: str) -> wire.Frame | None:
    return wire.reject(request.id, reason) if request.kind == wire.REQUEST else None


def _arguments(body: bytes | memoryview) -> tuple[list[Any], dict[str, Any]]:
    value = payload.decode(body)
    if isinstance(value, list) and len(value) == 2 and isinstance(value[0], list) and isinstance(value[1], dict):
        return value[0], value[1]
    raise handlers.BadArguments("the body is not a pair of arguments and keywords")


def _fitting(engine: Engine, value: Any) -> bytes:
    body = payload.encode(value)
    if len(body) > engine.settings.max_message:
        raise TooLarge(f"the result has {len(body)} bytes; max_message allows {engine.settings.max_message}")
    return body


class Incoming:
    """One request taken in by a :class:`Listener`, to be answered or done with."""

    __slots__ = ("_engine", "_request")

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine = engine
        self._request = request

    @property
    def kind(self) -> str:
        """``"call"``, ``"stream"``, ``"cast"`` or ``"fanout"``."""
        if self._request.kind == wire.REQUEST:
            return "stream" if self._request.flags & wire.STREAM else "call"
        return "fanout" if self._request.flags & wire.FANOUT else "cast"

    @property
    def service(self) -> str:
        return self._request.service

    @property
    def server(self) -> str:
        return self._request.server

    @property
    def method(self) -> str:
        return self._request.method

    @property
    def body(self) -> bytes | memoryview:
        return self._request.body

    @property
    def sender(self) -> str:
        """The caller's node id, in hexadecimal."""
        return self._request.node.hex()

    @property
    def monitor(self) -> float | None:
        """Seconds within which the caller wants signs of life (the engine gives them); None for none."""
        return self._request.monitor

    @property
    def cancelled(self) -> bool:
        """Whether the caller gave up or is gone."""
        return self._request.cancelled

    @property
    def answered(self) -> bool:
        """Whether it was answered or done with."""
        return self._request.answered

    def remaining(self) -> float | None:
        """Seconds until the caller gives up; None for never."""
        return None if self._request.deadline is None else self._request.deadline - monotonic()

    def reply_raw(self, body: bytes) -> None:
        """Send ``body`` as the reply; for a cast, only give its room back. The second answer does nothing.

        Raises:
            TooLarge: beyond ``max_message``; nothing was sent, another answer may be given.
        """
        request, limit = self._request, self._engine.settings.max_message
        if len(body) > limit:
            raise TooLarge(f"the reply has {len(body)} bytes; max_message allows {limit}")
        self._answer(wire.answer(wire.REPLY, 0, request.id, body, len(request.target)))

    def done(self) -> None:
        """It was dealt with: its room is free. Needed for casts."""
        self._answer(None)

    def _answer(self, frame: wire.Frame | None) -> None:
        request, inbound = self._request, self._engine.inbound
        if request.answered or inbound is None:
            return
        request.answered = True
        inbound.answer(request, frame if request.kind == wire.REQUEST else None)

    def requeue(self) -> None:
        """Put it back at the end of its listener's queue."""
        if not self._request.answered:
            self._request.target.put(self._request)

    def __repr__(self) -> str:
        return f"<Incoming {self.kind} {self.method!r} of {self.service!r}>"


class Listener:
    """One instance of one or more services whose requests are polled. Made by :meth:`Node.listen`."""

    def __init__(self, node: Node, services: tuple[str, ...], name: str) -> None:
        self.services = services
        self.name = name
        self._engine: Engine | None = node._core()
        self._queue = Queue()
        for service in services:
            self._engine.offer(service, name, self._queue, (), receiver=False)
        node._servers.append(self)

    def poll(self, limit: int = 1, timeout: float | None = None) -> list[Incoming]:
        """Wait for a request and return it with others that are there, up to ``limit``.

        Requests whose caller gave up are passed over. After :meth:`stop` it never waits: it returns what is left,
        then nothing.

        Args:
            timeout: seconds to wait; None for as long as it takes.
        """
        engine = self._engine
        if engine is None or engine.inbound is None:
            return []
        until = float("inf") if timeout is None else monotonic() + timeout
        found: list[Incoming] = []
        while len(found) < limit:
            # Only the first is waited for.
            request = engine.inbound.take(self._queue, until if not found else 0.0)
            if request is None:
                break
            if engine.expired(request):
                engine.inbound.answer(request, _refusal(request, "expired"))
            else:
                found.append(Incoming(engine, request))
        return found

    def stop(self) -> None:
        """Withdraw: nothing more comes, and :meth:`poll` waits no more. May be called twice."""
        if self._engine is not None:
            self._engine.withdraw(self._queue)

    def close(self) -> None:
        """:meth:`stop`, and refuse what was not polled. May be called twice."""
        self.stop()
        engine = self._engine
        while engine is not None and engine.inbound is not None and self._queue.tasks:
            request = self._queue.tasks.popleft()
            engine.inbound.answer(request, _refusal(request, "draining"))

    def _after_fork(self) -> None:
        self._engine = None
        self._queue = Queue()


class Client:
    """Calls one service. Immutable but for whose turn it is; made by :meth:`Node.client`.

    Args:
        server: only the server of that name, never another; any where empty.
        timeout: seconds for everything; ``settings.timeout`` by default. Inside a handler a call ends no later than
            the request that the handler serves.
        ready_timeout: seconds that may pass while nobody offers the service; ``settings.ready_timeout`` by default.
        monitor: the server is to give a sign of life while it works; without one for so many seconds the call ends.
        idempotent: whether methods may be sent again after an unknown outcome; by default as the server declared them.
        returns: the type of the reply, which is restored.
        errors: exception classes that are made anew when a handler raised one of them.
    """

    def __init__(
        self,
        node: Node,
        service: str,
        *,
        server: str = "",
        timeout: float | None = None,
        ready_timeout: float | None = None,
        monitor: float | None = None,
        idempotent: bool | None = None,
        returns: Any = None,
        errors: Sequence[type[Exception]] = (),
    ) -> None:
        settings = node.settings
        for name, value in (("timeout", timeout), ("monitor", monitor)):
            if value is not None and not value > 0:
                raise SettingsError(f"{name} is {value!r}; it must be a number of seconds above 0")
        if ready_timeout is not None and not ready_timeout >= 0:
            raise SettingsError(f"ready_timeout is {ready_timeout!r}; it must be 0 or more seconds")
        self.service = service
        self.server = server
        self._node = node
        self._options: dict[str, Any] = {
            "server": server, "timeout": timeout, "ready_timeout": ready_timeout, "monitor": monitor,
            "idempotent": idempotent, "returns": returns, "errors": errors,
        }  # fmt: skip
        self._returns = returns
        self._errors = tuple(errors)
        self._terms = Terms(
            service,
            server,
            settings.timeout if timeout is None else timeout,
            settings.ready_timeout if ready_timeout is None else ready_timeout,
            monitor,
            idempotent,
        )

    def at(self, server: str) -> Client:
        """A client of the server of that name only."""
        return self.options(server=server)

    def options(self, **options: Any) -> Client:
        """A client with some options changed."""
        unknown = options.keys() - self._options.keys()
        if unknown:
            raise SettingsError(f"no option is called {unknown.pop()!r}; there are: {', '.join(self._options)}")
        return Client(self._node, self.service, **{**self._options, **options})

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
        attempt = engine.request(self._terms, wire.REQUEST, 0, method, payload.encode((arguments, keywords)))
        return self._value(attempt)

    def _value(self, attempt: Attempt) -> Any:
        call = attempt.call
        if call.outcome is FAILED:
            raise handlers.rebuild(call.body, self._errors, str(attempt))
        value = payload.decode(call.body)
        return value if self._returns is None else payload.restore(value, self._returns)

    def cast(self, method: str, /, *arguments: Any, **keywords: Any) -> None:
        """Have ``method`` run at one server; returns when that server has taken the request in.

        Raises:
            NoRoute, Rejected, CallTimeout, PeerLost, PayloadError: it was not taken in (or, as ``executed`` says, it is
                unknown).
        """
        self.cast_raw(method, payload.encode((arguments, keywords)))

    def start(self, method: str, /, *arguments: Any, **keywords: Any) -> Call:
        """Begin a call; its reply is fetched later. It is sent to one server and not tried at another."""
        body = payload.encode((arguments, keywords))
        engine = self._node._core()
        return Call(self, engine, engine.request(self._terms, wire.REQUEST, 0, method, body, wait=False))

    def stream(self, method: str, /, *arguments: Any, **keywords: Any) -> Stream:
        """Call ``method``, whose handler yields items; returns an iterator over them as they are produced.

        The server is never more than ``settings.stream_credit`` items ahead of the reader. The timeout is for the
        whole stream.
        """
        body = payload.encode((arguments, keywords))
        engine = self._node._core()
        return Stream(self, engine, engine.request(self._terms, wire.REQUEST, wire.STREAM, method, body, wait=False))

    def fanout(self, method: str, /, *arguments: Any, **keywords: Any) -> list[Receipt]:
        """Have ``method`` run at every server of the service known now; one receipt each, and never an error for one."""
        return self.fanout_raw(method, payload.encode((arguments, keywords)))

    def gather(self, method: str, /, *arguments: Any, **keywords: Any) -> Gathered:
        """Call ``method`` at every server known now; replies by server, and an error for each that gave none."""
        engine = self._node._core()
        body = payload.encode((arguments, keywords))
        replies: dict[tuple[str, str], Any] = {}
        errors: dict[tuple[str, str], Exception] = {}
        for attempt in engine.scatter(self._terms, wire.REQUEST, 0, method, body):
            key = (attempt.route.server, attempt.route.peer.id.hex())
            try:
                if attempt.error is not None:
                    raise attempt.error
                replies[key] = self._value(attempt)
            except Exception as error:
                errors[key] = error
        return Gathered(replies, errors)

    def ping(self) -> list[Receipt]:
        """A sign of life from the engine of every server known now."""
        return [_receipt(each) for each in self._node._core().scatter(self._terms, wire.PING, 0, "ping", b"")]

    def call_raw(self, method: str, body: bytes) -> bytes | memoryview:
        """:meth:`call` with bytes in and bytes out."""
        node = self._node
        engine = node._engine or node._core()
        attempt = engine.request(self._terms, wire.REQUEST, 0, method, body)
        if attempt.call.outcome is FAILED:
            raise handlers.rebuild(attempt.call.body, self._errors, str(attempt))
        reply: bytes | memoryview = attempt.call.body
        return reply

    def cast_raw(self, method: str, body: bytes) -> None:
        """:meth:`cast` with bytes."""
        node = self._node
        engine = node._engine or node._core()
        engine.request(self._terms, wire.CAST, 0, method, body)

    def fanout_raw(self, method: str, body: bytes) -> list[Receipt]:
        """:meth:`fanout` with bytes."""
        return [
            _receipt(each) for each in self._node._core().scatter(self._terms, wire.CAST, wire.FANOUT, method, body)
        ]

    def __repr__(self) -> str:
        return f"<Client of {self._terms}>"


def _receipt(attempt: Attempt) -> Receipt:
    peer, error = attempt.route.peer, attempt.error
    host = peer.record.host if peer.record is not None else ""
    if error is None:
        return Receipt(attempt.route.server, peer.id.hex(), host, "taken", "", attempt.seconds)
    outcome = "refused" if isinstance(error, Rejected) else "unreachable"
    return Receipt(attempt.route.server, peer.id.hex(), host, outcome, str(error), attempt.seconds)


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

    def __init__(self, client: Client, engine: Engine, attempt: Attempt) -> None:
        self._client = client
        self._engine = engine
        self._attempt = attempt
        self._cancelled = False

    @property
    def done(self) -> bool:
        """Whether the outcome is here."""
        if self._attempt.call.outcome is None:
            self._attempt.link.look()
        return self._attempt.call.outcome is not None

    def result(self) -> Any:
        """Wait for the reply and return it; raises as :meth:`Client.call`, and CallCancelled after :meth:`cancel`."""
        if self._cancelled:
            raise CallCancelled(f"{self._attempt} was cancelled here")
        try:
            self._engine.outcome(self._attempt)
        except CallError as error:
            if self._cancelled:
                raise CallCancelled(f"{self._attempt} was cancelled here") from error
            raise
        return self._client._value(self._attempt)

    def cancel(self) -> bool:
        """Give the call up: a thread in :meth:`result` ends with CallCancelled, the server is told. False if it had ended."""
        call = self._attempt.call
        if not self._engine.cancel(self._attempt.link, call):
            return False
        self._cancelled = True
        call.body = "cancelled here"
        call.outcome = LOST
        self._attempt.link.tell([call])
        return True


class Stream(Iterator[Any]):
    """The items of a streaming call, as they are produced. Closing it early tells the server to stop."""

    def __init__(self, client: Client, engine: Engine, attempt: Attempt) -> None:
        self._client = client
        self._engine = engine
        self._attempt = attempt
        self._credit = client._node.settings.stream_credit
        self._read = 0
        self._ended = False
        self._grant(self._credit)

    def _grant(self, items: int) -> None:
        self._attempt.link.post(None, wire.pack(wire.CREDIT, number=items, id=self._attempt.call.id))

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        """The next item.

        Raises:
            StopIteration: the handler ended. Otherwise as :meth:`Client.call`.
        """
        call, link = self._attempt.call, self._attempt.link
        items = call.items
        assert items is not None
        while not items and not self._ended:
            seen = call.signs
            if items:
                break
            if call.outcome is not None or not link.wait(call, seen, self._attempt.until):
                if items:
                    break
                self._ended = True
                self._engine.outcome(self._attempt)
                if call.outcome is FAILED:
                    self._client._value(self._attempt)  # raises it
        if not items:
            raise StopIteration
        body = items.popleft()
        self._read += 1
        if self._read * 2 >= self._credit and not self._ended and call.outcome is None:
            self._grant(self._read)
            self._read = 0
        value = payload.decode(body)
        return value if self._client._returns is None else payload.restore(value, self._client._returns)

    def close(self) -> None:
        """Stop reading; the server is told, unless it has ended. May be called twice."""
        if not self._ended:
            self._ended = True
            self._engine.cancel(self._attempt.link, self._attempt.call)
            if self._attempt.call.items is not None:
                self._attempt.call.items.clear()

    def __enter__(self) -> Stream:
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
