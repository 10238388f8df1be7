"""The asyncio face: a node, the services it offers and the clients it gives.

A node belongs to the loop in which it is first used, and is used in that loop only. Nothing happens at construction;
the first use opens the registry, and sockets come when they are needed.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic
from types import TracebackType
from typing import Any, Self

from onehop.asyncio.client import Client, Stream
from onehop.asyncio.server import Listener, Server
from onehop.errors import NodeClosed, SettingsError
from onehop.faces import Gathered, Network, Receipt, ServerView, checked_name, parts_of, servers_of, told
from onehop.interfaces import Record
from onehop.settings import Settings, from_environment, revise
from onehop.statistics import RELEASE, Statistics
from onehop.transport.loop import LoopEngine

_nodes: weakref.WeakSet[Node] = weakref.WeakSet()
_inherited_engines: list[LoopEngine] = []
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
        self._engine: LoopEngine | None = None
        self._making: LoopEngine | None = None
        self._starting: asyncio.Future[None] | None = None
        self._closed = False
        self._clients: dict[str, Client] = {}
        self._callbacks: list[Callable[[], None]] = []
        _nodes.add(self)

    def _made(self) -> LoopEngine:
        """The engine, made at the first use."""
        if self._closed:
            raise NodeClosed("this node was closed; make a new one")
        engine = self._making
        if engine is None:
            engine = self._making = LoopEngine(self.settings, *parts_of(self.settings, self._network), RELEASE)
            for callback in self._callbacks:
                engine.on_change_in_loop(callback)
        return engine

    async def _core(self) -> LoopEngine:
        """The engine, started."""
        engine = self._made()
        engine.check_loop()
        if self._engine is None:
            if self._starting is None:
                self._starting = asyncio.ensure_future(self._start(engine))
            await asyncio.shield(self._starting)  # others may wait for it too
        return engine

    async def _start(self, engine: LoopEngine) -> None:
        try:
            await engine.start_in_loop()
            self._engine = engine
        finally:
            self._starting = None  # after a failure, it may be tried again

    def check(self) -> None:
        """See whether the registry can be used as its URL says, as far as that shows without touching anything.

        Raises:
            SettingsError: nothing has that URL, or the package it needs is missing; says what would be right.
        """
        parts_of(self.settings, self._network)

    # Serving --------------------------------------------------------------------------------------

    async def serve(self, service: str, handler: Any, *, server: str = "", workers: int | None = None) -> Server:
        """Offer the methods of ``handler`` as ``service`` until the returned server is closed.

        Coroutine functions run as tasks of the loop, plain functions in threads; those marked ``inline`` in the loop.

        Args:
            handler: an object, a module, a dict of functions or a function; see :func:`onehop.handlers.methods_of`.
            server: the name of this instance; the host's name where empty. Several may share one.
            workers: threads at most; ``settings.workers`` by default.

        Raises:
            SettingsError, RegistryError, ResourceLimit, NodeClosed: it cannot be offered; says what to change.
        """
        name = server or self.settings.host_name
        made = Server(self, await self._core(), checked_name(service, server), name, handler, workers)
        await made._offer()
        return made

    async def listen(self, service: str | Sequence[str], *, server: str = "") -> Listener:
        """Offer ``service`` (or several as one) without handlers: the caller polls for requests and answers them.

        Args:
            server: the name of this instance; the host's name where empty.
        """
        names = (service,) if isinstance(service, str) else tuple(service)
        checked = tuple(checked_name(name, server) for name in names)
        listener = Listener(await self._core(), checked, server or self.settings.host_name)
        await listener._offer()
        return listener

    # Calling --------------------------------------------------------------------------------------

    def client(self, service: str, **options: Any) -> Client:
        """A client of ``service``; ``options`` as in :meth:`Client.options`. Cheap, and safe to share among tasks."""
        return Client(self, checked_name(service, options.get("server", "")), **options)

    def _client(self, service: str) -> Client:
        client = self._clients.get(service)
        if client is None:
            if len(self._clients) > 1024:
                self._clients.clear()
            client = self._clients[service] = self.client(service)
        return client

    async def call(self, service: str, method: str, /, *arguments: Any, **keywords: Any) -> Any:
        """:meth:`Client.call` on a client with the default options."""
        return await self._client(service).call(method, *arguments, **keywords)

    async def cast(self, service: str, method: str, /, *arguments: Any, **keywords: Any) -> None:
        """:meth:`Client.cast` on a client with the default options."""
        await self._client(service).cast(method, *arguments, **keywords)

    def stream(self, service: str, method: str, /, *arguments: Any, **keywords: Any) -> Stream:
        """:meth:`Client.stream` on a client with the default options."""
        return self._client(service).stream(method, *arguments, **keywords)

    async def fanout(self, service: str, method: str, /, *arguments: Any, **keywords: Any) -> list[Receipt]:
        """:meth:`Client.fanout` on a client with the default options."""
        return await self._client(service).fanout(method, *arguments, **keywords)

    async def gather(self, service: str, method: str, /, *arguments: Any, **keywords: Any) -> Gathered:
        """:meth:`Client.gather` on a client with the default options."""
        return await self._client(service).gather(method, *arguments, **keywords)

    # Looking --------------------------------------------------------------------------------------

    async def nodes(self) -> list[Record]:
        """The records known now."""
        return list(await (await self._core()).known(""))

    async def servers(self, service: str | None = None) -> list[ServerView]:
        """The servers known now, of one service or of all."""
        engine = await self._core()
        return servers_of(await engine.known(service or ""), service, self.id)

    async def wait_for(self, service: str, *, server: str = "", count: int = 1, timeout: float | None = None) -> bool:
        """Wait until at least ``count`` servers offer ``service`` (under the name ``server``, where given).

        Args:
            timeout: seconds; ``settings.timeout`` by default.

        Returns:
            Whether they do.
        """
        engine = await self._core()
        until = monotonic() + (self.settings.timeout if timeout is None else timeout)
        await engine.want(service, until)
        return await engine.wait_for(lambda: len(engine.protocol.routes.of(service, server)) >= count, until)

    def on_change(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called in the loop after each change of what is known of other nodes."""
        self._callbacks.append(callback)
        if self._making is not None:
            self._making.on_change_in_loop(callback)

    async def ping(self, service: str, *, server: str = "", timeout: float = 1.0) -> list[Receipt]:
        """Ask the engine of every server of ``service`` for a sign of life; ``seconds`` is the time to and fro."""
        return await self.client(service, server=server, timeout=timeout).ping()

    @property
    def id(self) -> str:
        """The node id, in hexadecimal; a forked child has its own."""
        return self._made().protocol.id.hex()

    def statistics(self) -> Statistics:
        """What this node counts, at this moment."""
        return self._made().statistics()

    def __repr__(self) -> str:
        if self._engine is None:
            return f"<Node {self.settings.host_name}: {'closed' if self._closed else 'not used yet'}>"
        return f"<Node {told(self._engine)}>"

    # The end --------------------------------------------------------------------------------------

    async def run(self) -> bool:
        """Serve until SIGTERM or SIGINT comes, or :meth:`close`; then drain and close. For the main thread.

        A second signal during the drain ends the process as usual.

        Returns:
            Whether everything taken was answered.

        Raises:
            SettingsError: called in a loop of another thread, to which no signal comes.
        """
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        signals = (signal.SIGTERM, signal.SIGINT)
        before = [signal.getsignal(each) for each in signals]
        try:
            for each in signals:
                loop.add_signal_handler(each, stop.set)
        except (ValueError, RuntimeError):
            raise SettingsError("run() waits for signals, which come to the main thread only: call it there") from None
        try:
            while not self._closed and not stop.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await stop.wait()
        finally:
            for each, handler in zip(signals, before, strict=True):
                loop.remove_signal_handler(each)
                signal.signal(each, handler)
        drained = await self.drain()
        await self.close()
        return drained

    async def drain(self, timeout: float | None = None) -> bool:
        """Tell every peer, take nothing more, and finish what was taken.

        Args:
            timeout: seconds; ``settings.drain_timeout`` by default.

        Returns:
            Whether everything was answered in time.
        """
        if self._engine is None:
            return True
        self._engine.check_loop()
        return await self._engine.drain(timeout)

    async def close(self, *, drain: bool = False) -> None:
        """End everything now, or after a :meth:`drain`. A closed node stays closed. May be called twice.

        Calls under way end as PeerLost; requests taken and not answered are left (their callers hear PeerLost).
        """
        if self._making is not None:
            self._making.check_loop()
        if drain and not self._closed:
            await self.drain()
        self._closed = True
        if self._starting is not None:
            await asyncio.wait([self._starting])
        engine, self._engine, self._making = self._making, None, None
        if engine is not None:
            await engine.close_in_loop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _after_fork(self) -> None:
        """In the child: drop what was inherited, without closing it."""
        engine, self._engine, self._making, self._starting = self._making, None, None, None
        self._callbacks.clear()
        if engine is not None:
            engine.forget()
            _inherited_engines.append(engine)


def _after_fork_in_child() -> None:
    for node in list(_nodes):
        node._after_fork()


@atexit.register
def _close_nodes() -> None:
    for node in list(_nodes):
        if node._making is not None:
            node._making.close()


os.register_at_fork(after_in_child=_after_fork_in_child)
