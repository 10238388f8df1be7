"""What a node serves: instances whose handlers run in threads, and instances that are polled."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from onehop import handlers
from onehop.errors import EncodeError, SettingsError, TooLarge
from onehop.faces import arguments_of, fitting
from onehop.protocol import wire
from onehop.protocol.inbox import Request
from onehop.transport.blocking import BlockingEngine, run
from onehop.transport.engine import Engine
from onehop.transport.inbound import Queue
from onehop.transport.requests import serving
from onehop.transport.waiting import acquire, new_lock

if TYPE_CHECKING:
    from onehop.sync.node import Node

log = logging.getLogger("onehop")

SIGN_INTERVAL = 1.0
"""Seconds between signs of life to the reader of a stream that asks for no more items."""


class Server:
    """One instance of a service, run in threads. Made by :meth:`Node.serve`."""

    def __init__(self, node: Node, service: str, name: str, handler: Any, workers: int | None) -> None:
        self.service = service
        self.name = name
        self._node = node
        self._methods = handlers.methods_of(handler)
        self._engine: BlockingEngine | None = node._core()
        if workers is not None and workers < 1:
            raise SettingsError(f"workers is {workers!r}; it must be 1 or more")
        inline = frozenset(name for name, method in self._methods.items() if method.inline)
        idempotent = tuple(name for name, method in self._methods.items() if method.idempotent)
        self._queue = Queue(self._run, workers or node.settings.workers, self._methods, inline)
        self._engine.offer(service, name, self._queue, idempotent, receiver=True)
        node._servers.add(self)

    def _run(self, request: Request) -> None:
        """Run one request, in a worker (or inline)."""
        engine, inbound = self._engine, self._queue.inbound
        if engine is None:
            return
        if request.cancelled or (request.deadline is not None and request.deadline <= monotonic()):
            inbound.refuse(request, "expired")
            return
        token = serving.set(request)
        frame: wire.Frame | None
        try:
            method = self._methods.get(request.names[2])
            if method is None:
                raise handlers.Missing(f"it has {', '.join(sorted(self._methods))}")
            arguments, keywords = arguments_of(request.body)
            result = method.invoke(arguments, keywords)
            if request.flags & wire.STREAM:
                frame = wire.answer(wire.REPLY, wire.STREAM, request.id, b"\xc0")
                if not self._write(engine, request, result):
                    frame = None  # cut short: an end would read as if that had been all
            else:
                if hasattr(result, "__next__"):
                    result = list(result)
                frame = wire.answer(wire.REPLY, 0, request.id, fitting(result, engine.settings), len(self._queue))
        except BaseException as error:  # SystemExit too: it is the handler's doing, and its caller waits
            frame = wire.answer(wire.REPLY, wire.FAILED, request.id, handlers.failure(error), len(self._queue))
            if request.kind == wire.CAST:
                # Nobody waits for it, so nobody else would ever know.
                log.exception("the handler of cast %r of service %r raised", request.method, self.service)
                inbound.counts["casts whose handler raised"] += 1
        finally:
            serving.reset(token)
        inbound.put(request, frame if request.kind == wire.REQUEST else None)

    def _write(self, engine: Engine, request: Request, result: Any) -> bool:
        """Send the items of a stream, never more of them than its reader asked for; whether all were sent."""
        assert engine.inbound is not None
        if isinstance(result, (str, bytes, Mapping)) or not hasattr(result, "__iter__"):
            raise EncodeError(f"{request.method!r} returned {type(result).__name__}, which is not a stream; call it")
        lock = new_lock()
        lock.acquire()
        request.waiter = lock
        items = iter(result)
        try:
            for sent, item in enumerate(items):
                body = fitting(item, engine.settings)
                while request.granted <= sent:
                    if engine.expired(request) or engine.closed:
                        return False
                    if not acquire(lock, SIGN_INTERVAL):
                        # A reader that is gone is noticed only by sending to it.
                        engine.inbound.answer(request, wire.pack(wire.PROGRESS, id=request.id), last=False)
                if engine.expired(request):
                    return False
                frame = wire.answer(wire.ITEM, 0, request.id, body, number=sent & 0xFFFF_FFFF)
                engine.inbound.answer(request, frame, last=False)
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()
        return True

    def run(self) -> bool:
        """:meth:`onehop.Node.run`: serve until SIGTERM or SIGINT, then drain."""
        return self._node.run()

    def drain(self, timeout: float | None = None) -> bool:
        """Withdraw this instance and finish what it has taken; whether that was done within ``timeout`` seconds."""
        engine = self._engine
        return engine is None or run(engine.drain(timeout, self._queue))

    def close(self) -> None:
        """Withdraw this instance; what it has taken is still finished in the background. May be called twice."""
        if self._engine is not None and not self._engine.closed:
            self._engine.withdraw(self._queue)

    def _after_fork(self) -> None:
        self._engine = None
        self._queue = Queue()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
        request, inbound = self._request, self._engine.inbound
        if not request.answered and inbound is not None and not request.target.put(request):
            inbound.interrupt()  # whoever polls for it may be the one who leads

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
        node._servers.add(self)

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
                engine.inbound.refuse(request, "expired")
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
        while engine is not None and engine.inbound is not None:
            try:
                request = self._queue.tasks.popleft()
            except IndexError:  # a poll may take the last one
                return
            engine.inbound.refuse(request, "draining")

    def _after_fork(self) -> None:
        self._engine = None
        self._queue = Queue()
