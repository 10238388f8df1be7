"""What both faces do with a request that was taken in: run it by a table of methods, or give it to who polls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, NamedTuple

from onehop import handlers, payload
from onehop.errors import EncodeError, TooLarge
from onehop.protocol import wire
from onehop.protocol.inbox import Request
from onehop.settings import Settings
from onehop.transport.queue import Queue
from onehop.transport.requests import serving
from onehop.transport.waiting import acquire, new_lock

log = logging.getLogger("onehop")

SIGN_INTERVAL = 1.0
"""Seconds between signs of life to the reader of a stream that asks for no more items."""


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
    request = serving.get()
    if request is None:
        return None
    return Serving(request.service, request.server, request.method, request.node.hex(), request)


def many_of(request: Request) -> list[Any]:
    """The runs that the body of a cast asks for, where it is not one pair of arguments and keywords.

    Raises:
        DecodeError, BadArguments: it is something else.
    """
    value = payload.decode(request.body)
    if request.kind == wire.CAST and type(value) is list and value != [] and set(map(type, value)) == {list}:
        return value
    raise handlers.Misfit("the body is not a pair of arguments and keywords")


def arguments_of(value: Any) -> tuple[list[Any], dict[str, Any]]:
    """Arguments and keywords of one of many runs.

    Raises:
        BadArguments: it is something else.
    """
    if len(value) == 2 and type(value[0]) is list and type(value[1]) is dict:
        return value[0], value[1]
    raise handlers.Misfit("one of the body's many runs is not a pair of arguments and keywords")


def fitting(value: Any, settings: Settings) -> bytes:
    """The bytes of a handler's result.

    Raises:
        EncodeError, TooLarge: it has no form on the wire, or is beyond ``max_message``.
    """
    body = payload.encode(value)
    if len(body) > settings.max_message:
        raise too_large(body, settings)
    return body


def too_large(body: bytes, settings: Settings) -> TooLarge:
    """The error for a result beyond ``max_message``."""
    return TooLarge(f"the result has {len(body)} bytes; max_message allows {settings.max_message}")


def expired(request: Request) -> bool:
    """Whether ``request`` must not be run any more: its caller gave up or went away."""
    return request.cancelled or (request.deadline is not None and request.deadline <= monotonic())


class Runner:
    """Runs requests by a table of methods, each in the thread that asks.

    Args:
        service: its name, for the log.
        handler: what :func:`onehop.handlers.methods_of` takes.
        settings: of the node.
        queue: where the requests wait.
    """

    queue: Queue

    def __init__(self, service: str, handler: Any, settings: Settings) -> None:
        self.service = service
        self.methods = handlers.methods_of(handler)
        self.settings = settings

    @property
    def idempotent(self) -> tuple[str, ...]:
        """The methods that may be run again after an unknown outcome."""
        return tuple(name for name, method in self.methods.items() if method.idempotent)

    @property
    def inline(self) -> frozenset[str]:
        """The methods that the receiving thread may run."""
        return frozenset(name for name, method in self.methods.items() if method.inline)

    def run(self, request: Request) -> None:
        """Run one request and put its answer in the queue of the inbound socket; whoever asks sees that it leaves."""
        queue = self.queue
        inbound = queue.inbound
        if request.cancelled or (request.deadline is not None and request.deadline <= monotonic()):
            inbound.refuse(request, "expired")
            return
        token = serving.set(request)
        frame: wire.Frame | None = None
        try:
            method = self.methods.get(request.names[2])
            if method is None:
                raise handlers.Missing(f"it has {', '.join(sorted(self.methods))}")
            pair = payload.decode_arguments(request.body)
            if pair is None:
                self._run_each(request, method, many_of(request))
            else:
                result = method.invoke(*pair)
                if request.flags & wire.STREAM:
                    if self._write(request, result):  # else cut short: an end would read as if that had been all
                        frame = wire.answer(wire.REPLY, wire.STREAM, request.id, b"\xc0")
                else:
                    if hasattr(result, "__next__"):
                        result = list(result)
                    body = payload.encode(result)
                    if len(body) > self.settings.max_message:
                        raise too_large(body, self.settings)
                    frame = wire.answer(wire.REPLY, 0, request.id, body, len(queue.tasks) + queue.held)
        except BaseException as error:  # SystemExit too: it is the handler's doing, and its caller waits
            frame = wire.answer(
                wire.REPLY, wire.FAILED, request.id, handlers.failure(error), len(queue.tasks) + queue.held
            )
            if request.kind == wire.CAST:
                self.note_failed(request, error)
        finally:
            serving.reset(token)
        inbound.put(request, frame if request.kind == wire.REQUEST else None)

    def _run_each(self, request: Request, method: handlers.Method, many: list[Any]) -> None:
        invoke = method.invoke
        for each in many:
            try:
                arguments, keywords = arguments_of(each)
                invoke(arguments, keywords)
            except BaseException as error:
                self.note_failed(request, error)

    def note_failed(self, request: Request, error: BaseException) -> None:
        """The handler of a cast raised. Nobody waits for it, so nobody else would ever know."""
        text = "the handler of cast %r of service %r raised"
        log.error(text, request.method, self.service, exc_info=error)
        self.queue.inbound.counts["casts whose handler raised"] += 1

    def _write(self, request: Request, result: Any) -> bool:
        """Send the items of a stream, never more of them than its reader asked for; whether all were sent."""
        inbound = self.queue.inbound
        if isinstance(result, (str, bytes, Mapping)) or not hasattr(result, "__iter__"):
            raise EncodeError(f"{request.method!r} returned {type(result).__name__}, which is not a stream; call it")
        lock = new_lock()
        lock.acquire()
        request.waiter = lock
        items = iter(result)
        try:
            for sent, item in enumerate(items):
                body = fitting(item, self.settings)
                while request.granted <= sent:
                    if expired(request) or inbound.closing:
                        return False
                    if not acquire(lock, SIGN_INTERVAL):
                        # A reader that is gone is noticed only by sending to it.
                        inbound.answer(request, wire.pack(wire.PROGRESS, id=request.id), last=False)
                if expired(request):
                    return False
                frame = wire.answer(wire.ITEM, 0, request.id, body, number=sent & 0xFFFF_FFFF)
                inbound.answer(request, frame, last=False)
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()
        return True


class Incoming:
    """One request taken in by a :class:`Listener`, to be answered or done with.

    Args:
        begun: what is to be told once that it waits for nobody any more; see :meth:`begin`.
    """

    __slots__ = ("_begun", "_request", "_settings")

    def __init__(self, request: Request, settings: Settings, begun: Callable[[Request], None] | None = None) -> None:
        self._request = request
        self._settings = settings
        self._begun = begun

    def begin(self) -> bool:
        """Whoever is to run it begins; what ``ahead`` of :meth:`Node.listen` counts. To answer it tells as much.

        Returns:
            Whether to run it: False where nobody waits for its answer any more, as :attr:`given_up` says.
        """
        begun, self._begun, request = self._begun, None, self._request
        if begun is not None:
            begun(request)
        return not (request.kind == wire.REQUEST and expired(request))

    @property
    def id(self) -> str:
        """Names the request, as nothing else: the caller's node id and a number."""
        return f"{self._request.sender.node.hex()}-{self._request.id}"

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
    def given_up(self) -> bool:
        """Whether nobody waits for its answer any more; never so for a cast."""
        return self._request.kind == wire.REQUEST and expired(self._request)

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
        request, limit = self._request, self._settings.max_message
        if len(body) > limit:
            raise TooLarge(f"the reply has {len(body)} bytes; max_message allows {limit}")
        self._answer(wire.answer(wire.REPLY, 0, request.id, body, len(request.target)))

    def done(self) -> None:
        """It was dealt with: its room is free. Needed for casts."""
        if not self._request.answered:
            self._answer(None)

    def _answer(self, frame: wire.Frame | None) -> None:
        request = self._request
        if request.answered:
            return
        request.answered = True
        if self._begun is not None:
            self.begin()
        request.target.inbound.answer(request, frame if request.kind == wire.REQUEST else None)

    def requeue(self) -> None:
        """Put it back at the end of its listener's queue."""
        self.begin()
        request, queue = self._request, self._request.target
        if not request.answered and not queue.put(request):
            if queue.closed:
                queue.inbound.refuse_rest(queue)
            queue.inbound.interrupt()  # whoever polls for it may be the one who leads

    def __repr__(self) -> str:
        return f"<Incoming {self.kind} {self.method!r} of {self.service!r}>"
