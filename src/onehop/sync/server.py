"""What a node serves: instances whose handlers run in threads, and instances that are polled."""

from __future__ import annotations

import sys
from contextlib import suppress
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from onehop.errors import SettingsError
from onehop.protocol import wire
from onehop.protocol.inbox import Request
from onehop.serving import Incoming, Runner, expired
from onehop.transport.blocking import BlockingEngine, run
from onehop.transport.queue import Queue
from onehop.transport.waiting import new_lock

if TYPE_CHECKING:
    from onehop.sync.node import Node
    from onehop.transport.inbound import Inbound


UNCOUNTED = sys.maxsize


class Server:
    """One instance of a service, run in threads. Made by :meth:`Node.serve`."""

    def __init__(self, node: Node, service: str, name: str, handler: Any, workers: int | None) -> None:
        self.service = service
        self.name = name
        self._node = node
        runner = Runner(service, handler, node.settings)
        if workers is not None and workers < 1:
            raise SettingsError(f"workers is {workers!r}; it must be 1 or more")
        self._engine: BlockingEngine | None = node._core()
        self._queue = Queue(runner.run, workers or node.settings.workers, runner.methods, runner.inline)
        runner.queue = self._queue
        self._engine.offer(service, name, self._queue, runner.idempotent, receiver=True)
        node._servers.add(self)

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


class Listener:
    """One instance of one or more services whose requests are polled. Made by :meth:`Node.listen`."""

    def __init__(self, node: Node, services: tuple[str, ...], name: str, ahead: int | None) -> None:
        self.services = services
        self.name = name
        self._engine: BlockingEngine | None = node._core()
        self._queue = Queue()
        self._most = UNCOUNTED if ahead is None else ahead
        self._count_anew()
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
            wait_until = until if not found else 0.0  # only the first is waited for
            if self._polled - self._began >= self._most and not self._may_take(engine.inbound, wait_until):
                break
            request = engine.inbound.take(self._queue, wait_until)
            if request is None:
                break
            if request.kind == wire.PING:
                self._answer_echo(engine.inbound, request)
            elif expired(request):
                engine.inbound.refuse(request, "expired")
            elif self._most == UNCOUNTED:
                found.append(Incoming(request, engine.settings))
            else:
                self._polled += 1
                found.append(Incoming(request, engine.settings, self._note_begun))
        return found

    def _count_anew(self) -> None:
        self._counting = new_lock()
        self._polled = self._began = 0  # of what is counted; the first is the polling thread's
        self._echoes: list[Request] = []
        # Where a poll that may take no more waits, and receives meanwhile: what has begun since.
        self._begun = self._queue.beside = Queue()
        self._is_held = False

    def _may_take(self, inbound: Inbound, until: float) -> bool:
        """Wait until half of what may be ahead has begun, so that polls go on for a while then."""
        while True:
            with self._counting:
                self._is_held = self._polled - self._began > self._most // 2 and not self._queue.stopped
                if not self._is_held:
                    return True
            try:
                if inbound.take(self._begun, until) is None and not self._queue.stopped:
                    return False
            finally:
                with self._counting:
                    self._is_held = False
                    self._begun.tasks.clear()

    def _answer_echo(self, inbound: Inbound, echo: Request) -> None:
        """An echo asks whether workers take requests: while some of ours wait for one, the next that begins tells."""
        with self._counting:
            held = self._polled > self._began
            if held:
                self._echoes.append(echo)
        if not held:
            inbound.refuse(echo, "expired")
        elif self._queue.stopped:  # looked at after it can be found
            self._let_go(inbound)

    def _let_go(self, inbound: Inbound) -> None:
        """Answer the echoes that are held: nothing more depends on them. Without the lock: a signal handler may ask."""
        while self._echoes:
            with suppress(IndexError):
                inbound.refuse(self._echoes.pop(), "expired")

    def _note_begun(self, request: Request) -> None:
        engine = self._engine
        with self._counting:
            self._began += 1
            echoes, self._echoes = self._echoes, []
            is_awaited = self._is_held and self._polled - self._began <= self._most // 2
            with suppress(IndexError):  # a held poll does not come to those that wait in the queue
                while self._is_held and self._queue.tasks[0].kind == wire.PING:
                    echoes.append(self._queue.pop())
        if engine is None or engine.inbound is None:
            return
        for each in echoes:
            engine.inbound.refuse(each, "expired")
        if is_awaited and not self._begun.put(request):
            engine.inbound.interrupt()

    def stop(self) -> None:
        """Withdraw: nothing more comes, and :meth:`poll` waits no more. May be called twice."""
        engine = self._engine
        if engine is None:
            return
        engine.withdraw(self._queue)
        if engine.inbound is not None:
            self._let_go(engine.inbound)

    def close(self) -> None:
        """:meth:`stop`, and refuse what was not polled. May be called twice."""
        self.stop()
        engine = self._engine
        if engine is not None and engine.inbound is not None:
            engine.inbound.refuse_rest(self._queue)

    def _after_fork(self) -> None:
        self._engine = None
        self._queue = Queue()
        self._count_anew()
