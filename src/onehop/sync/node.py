"""The blocking face: a node, the services it offers and the clients it gives.

Every method may be called from any thread. Nothing happens at construction; the first use opens the registry, and
sockets and threads come when they are needed. A forked child finds its node new: another id, no services.
"""

from __future__ import annotations

import atexit
import os
import queue
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from types import TracebackType
from typing import Any, Self

from onehop.addresses import advertised, listening_ports
from onehop.errors import NodeClosed, SettingsError
from onehop.faces import Gathered, Network, Receipt, ServerView, checked_name, parts_of, servers_of, told
from onehop.interfaces import Record
from onehop.settings import Settings, from_environment, revise
from onehop.statistics import RELEASE, Statistics
from onehop.sync.client import Client, Stream
from onehop.sync.server import Listener, Server
from onehop.transport.blocking import BlockingEngine, run

_nodes: weakref.WeakSet[Node] = weakref.WeakSet()
_inherited_engines: list[BlockingEngine] = []
"""Of a forked child: the parent's engines, kept so that nothing of theirs is closed from here."""


class Node:
    """One process's presence: serves, and calls what others serve.

    Args:
        settings: all of them; by default those of the environment (``ONEHOP_*``).
        network: carries messages in the place of ZeroMQ, with a registry of its own; for tests, see
            :class:`onehop.testing.memory.Network`.
        overrides: single settings by name, such as ``timeout=5.0``.

    Raises:
        SettingsError: a setting does not fit.
    """

    def __init__(self, settings: Settings | None = None, *, network: Network | None = None, **overrides: Any) -> None:
        self.settings = from_environment(**overrides) if settings is None else revise(settings, **overrides)
        self._network = network
        self._engine: BlockingEngine | None = None
        self._closed = False
        self._servers: weakref.WeakSet[Server | Listener] = weakref.WeakSet()
        self._clients: dict[str, Client] = {}
        self._callbacks: list[Callable[[], None]] = []
        self._starting = threading.Lock()
        _nodes.add(self)

    def _core(self) -> BlockingEngine:
        """The engine, made at the first use."""
        engine = self._engine
        if engine is not None:
            return engine
        with self._starting:
            if self._closed:
                raise NodeClosed("this node was closed; make a new one")
            if self._engine is None:
                engine = BlockingEngine(self.settings, *parts_of(self.settings, self._network), RELEASE)
                for callback in self._callbacks:
                    engine.on_change(callback)
                try:
                    engine.start()
                except BaseException:  # it may be tried again, and again
                    engine.close()
                    raise
                self._engine = engine
            return self._engine

    def check(self) -> None:
        """See whether the settings can be used, as far as that shows without touching anything.

        Raises:
            SettingsError: no registry has that URL, the package it needs is missing, or nobody can listen at these
                ports, or be reached at that address; says what would be right.
        """
        parts_of(self.settings, self._network)
        listening_ports(self.settings.ports)
        advertised((), self.settings.advertise)

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
        return Server(self, checked_name(service, server), server or self.settings.host_name, handler, workers)

    def listen(self, service: str | Sequence[str], *, server: str = "", ahead: int | None = None) -> Listener:
        """Offer ``service`` (or several as one) without handlers: the caller polls for requests and answers them.

        Args:
            server: the name of this instance; the host's name where empty.
            ahead: for who polls in one thread, and no more than one, and runs in others: so many requests at most are
                polled and wait for one of those, which says :meth:`Incoming.begin`. The rest stay where their callers
                may give them up, and while none begins, callers prefer other servers. None where to poll is to begin.

        Raises:
            SettingsError: ``ahead`` is below 1.
        """
        if ahead is not None and ahead < 1:
            raise SettingsError(f"ahead is {ahead!r}; it must be 1 or more, or None")
        names = (service,) if isinstance(service, str) else tuple(service)
        checked = tuple(checked_name(name, server) for name in names)
        return Listener(self, checked, server or self.settings.host_name, ahead)

    # Calling --------------------------------------------------------------------------------------

    def client(self, service: str, **options: Any) -> Client:
        """A client of ``service``; ``options`` as in :meth:`Client.options`. Cheap, and safe to share among threads."""
        return Client(self, checked_name(service, options.get("server", "")), **options)

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
        return list(run(self._core().known("")))

    def servers(self, service: str | None = None) -> list[ServerView]:
        """The servers known now, of one service or of all."""
        engine = self._core()
        return servers_of(run(engine.known(service or "")), service, engine.protocol.id.hex())

    def wait_for(self, service: str, *, server: str = "", count: int = 1, timeout: float | None = None) -> bool:
        """Wait until at least ``count`` servers offer ``service`` (under the name ``server``, where given).

        Args:
            timeout: seconds; ``settings.timeout`` by default.

        Returns:
            Whether they do.
        """
        engine = self._core()
        until = monotonic() + (self.settings.timeout if timeout is None else timeout)
        run(engine.want(service, until))
        return run(engine.wait_for(lambda: len(engine.protocol.routes.of(service, server)) >= count, until))

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
        return f"<Node {told(engine)}>"

    def run(self) -> bool:
        """Serve until SIGTERM or SIGINT comes, or :meth:`close`; then drain and close. For the main thread.

        A second signal during the drain ends the process as usual.

        Returns:
            Whether everything taken was answered.

        Raises:
            SettingsError: called from another thread, to which no signal comes.
        """
        stops: queue.SimpleQueue[int] = queue.SimpleQueue()  # a handler may use it in the midst of its own wait
        try:
            before = {each: signal.signal(each, lambda *_: stops.put(1)) for each in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:
            raise SettingsError("run() waits for signals, which come to the main thread only: call it there") from None
        try:
            while not self._closed:
                with suppress(queue.Empty):
                    stops.get(timeout=0.5)
                    break
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
        drained = self.drain()
        self.close()
        return drained

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
        return run(self._engine.drain(timeout))

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

    def __enter__(self) -> Self:
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
        for each in list(self._servers):
            each._after_fork()
        self._servers.clear()
        if engine is not None:
            engine.forget()
            _inherited_engines.append(engine)


def _after_fork_in_child() -> None:
    for node in list(_nodes):
        node._after_fork()


@atexit.register
def _close_nodes() -> None:
    for node in list(_nodes):
        node.close()


os.register_at_fork(after_in_child=_after_fork_in_child)
