"""The receiving side: requests and notifications as oslo.messaging polls and answers them."""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import Any

from oslo_messaging._drivers import base

from onehop import Incoming, Listener, errors
from onehop.oslo import payload

LOG = logging.getLogger(__name__)
AHEAD = 64
"""Requests that wait for a thread in oslo.messaging's queue, which has no bound of its own; the others wait in ours."""


class NotRun(Exception):
    """The caller has given the request up, so it must not run."""


class Request(base.RpcIncomingMessage):  # type: ignore[misc]
    """One RPC request."""

    def __init__(self, incoming: Incoming, ctxt: dict[str, Any], message: dict[str, Any]) -> None:
        super().__init__(ctxt, message, incoming.id)
        self._incoming = incoming
        self.client_timeout = incoming.monitor

    def acknowledge(self) -> None:
        """A thread of oslo.messaging's has taken it. The sender knew before, when this process took the request in.

        Raises:
            NotRun: the request waited here until its caller gave up; oslo.messaging skips it then.
        """
        if not self._incoming.begin():
            self._incoming.done()
            raise NotRun(f"{self.message.get('method')!r} is not run: its caller gave up while it waited for a thread")

    def requeue(self) -> None:
        self._incoming.requeue()

    def heartbeat(self) -> None:
        """The engine beats for us; this only tells oslo.messaging's thread when to end.

        Raises:
            NotRun: the request was answered, or nobody waits for its answer.
        """
        if self._incoming.answered or self._incoming.given_up:
            raise NotRun("the call is over")

    def reply(self, reply: Any = None, failure: payload.Failure | None = None) -> None:
        incoming = self._incoming
        try:
            if incoming.kind == "call":
                answer(incoming, reply, failure)
        except errors.OnehopError as error:
            LOG.warning("The reply to %r could not be sent: %s", self.message.get("method"), error)
        finally:
            incoming.done()


class Notification(Request):
    """One notification. oslo.messaging acknowledges it when it was handled, or requeues it."""

    def acknowledge(self) -> None:
        self._incoming.done()


def answer(incoming: Incoming, reply: Any, failure: payload.Failure | None) -> None:
    """Send a result or a failure; a result that cannot be sent becomes a failure, so that the caller does not wait."""
    try:
        incoming.reply_raw(payload.encode_failure(failure) if failure else payload.encode([reply]))
    except (*payload.UNENCODABLE, errors.PayloadError):
        problem: Any = failure or sys.exc_info()
        LOG.error("The result of %r of %r cannot be sent: %s", incoming.method, incoming.service, sys.exc_info()[1])
        incoming.reply_raw(payload.encode_failure(problem, limit=2000))


class PollListener(base.PollStyleListener):  # type: ignore[misc]
    """Batches of requests, or of notifications, from a node's listener."""

    def __init__(self, listener: Listener, message: type[Request]) -> None:
        super().__init__()
        self._listener = listener
        self._message = message
        self._stopped = threading.Event()

    def poll(
        self, timeout: float | None = None, batch_size: int | None = 1, batch_timeout: float | None = None
    ) -> list[Request]:
        """Wait for the first message, then up to ``batch_timeout`` seconds more for a full batch.

        After :meth:`stop` it never waits; it returns the rest, then an empty list.
        """
        wanted = batch_size or 1
        batch: list[Request] = []
        deadline = None if timeout is None else time.monotonic() + timeout
        while len(batch) < wanted:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            taken = self._listener.poll(limit=wanted - len(batch), timeout=left)
            if not taken:
                if deadline is None:
                    self._stopped.wait()  # no more comes, since the node was closed: do not ask again and again
                break
            first = not batch
            for incoming in taken:
                message = self._open(incoming)
                if message is not None:
                    batch.append(message)
            if batch and first:
                deadline = None if batch_timeout is None else time.monotonic() + batch_timeout
        return batch

    def _open(self, incoming: Incoming) -> Request | None:
        try:
            ctxt, message = payload.decode(incoming.body)
            if not isinstance(ctxt, dict) or not isinstance(message, dict):
                raise ValueError("not a context and a message")
        except Exception as error:  # RecursionError, too: who lost one here would lose its place for ever
            LOG.error("A request of %s to %s is not of oslo.messaging: %s", incoming.sender, incoming.service, error)
            if incoming.kind == "call":
                answer(incoming, None, sys.exc_info())  # type: ignore[arg-type]
            incoming.done()
            return None
        return self._message(incoming, ctxt, message)

    def stop(self) -> None:
        self._stopped.set()
        self._listener.stop()

    def cleanup(self) -> None:
        self._stopped.set()
        self._listener.close()
