"""The driver that oslo.messaging loads for ``zmq://`` transport URLs."""

from __future__ import annotations

import itertools
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from urllib.parse import quote

from oslo_messaging import MessageDeliveryFailure, MessageUndeliverable, MessagingTimeout, RemoteError, Target
from oslo_messaging._drivers import base
from oslo_messaging.transport import TransportURL

from onehop import Client, Node, errors
from onehop.oslo import options, payload
from onehop.oslo.listener import Notification, PollListener, Request
from onehop.oslo.outbox import Address, Held, Outbox

LOG = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0  # seconds between attempts
CLIENTS_KEPT = 1024
CALL_TIMEOUT = 60.0  # of a call that names none, which oslo.messaging's client never makes
SHORTEST = 0.001  # a timeout of 0 is allowed, and ends as a timeout


class OutcomeUnknown(MessagingTimeout):  # type: ignore[misc]
    """The server went away before it answered, so nobody knows whether it ran the request. Raised at once."""


class NobodyServes(MessageUndeliverable, MessageDeliveryFailure):  # type: ignore[misc]
    """``at_least_once`` was asked for, and nobody serves the target at this moment."""

    def __str__(self) -> str:
        return str(self.exception)


class SendFailed(base.TransportDriverError):  # type: ignore[misc]
    """The message could not be sent for a reason on this side; the text says which."""


class Sending(NamedTuple):
    """A message on its way. ``attempts`` is None without a bound; ``ttl`` is how long the outbox may hold it."""

    address: Address
    method: str
    body: bytes
    attempts: int | None
    ttl: float
    mandatory: bool = False


class Core:
    """What the transports of a process share if their settings are the same: one node and its outbox."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.users = 0
        self.node = Node(**settings)
        self.outbox = Outbox(self.node)
        self._clients: dict[tuple[Any, ...], Client] = {}

    def client(self, address: Address, timeout: float, ready_timeout: float, monitor: float | None = None) -> Client:
        """A client, kept because the turn it takes among the servers is worth keeping."""
        key = (address, timeout, ready_timeout, monitor)
        client = self._clients.get(key)
        if client is None:
            if len(self._clients) >= CLIENTS_KEPT:
                self._clients.clear()
            client = self._clients[key] = self.node.client(
                address.service, server=address.server, timeout=timeout, ready_timeout=ready_timeout, monitor=monitor
            )
        return client


class Cores:
    """The cores of this process by settings. A forked child starts with none, and leaves its parent's alone."""

    def __init__(self) -> None:
        self._start()
        os.register_at_fork(after_in_child=self._start)

    def _start(self) -> None:
        self.process = os.getpid()
        self._lock = threading.RLock()
        self._table: dict[tuple[tuple[str, Any], ...], Core] = {}

    def acquire(self, settings: dict[str, Any]) -> Core:
        with self._lock:
            core = self._table.setdefault(tuple(sorted(settings.items())), Core(settings))
            core.users += 1
            return core

    def release(self, core: Core) -> None:
        with self._lock:
            core.users -= 1
            if core.users:
                return
            self._table = {key: each for key, each in self._table.items() if each is not core}
        core.outbox.close()
        core.node.close()


CORES = Cores()


class ZmqDriver(base.BaseDriver):  # type: ignore[misc]
    """RPC and notifications of one transport. Constructing it does nothing but read options.

    Args:
        conf: the program's ConfigOpts; our options are registered on it.
        url: ``zmq://`` or ``zmq:///realm``, with options of ``[oslo_messaging_zmq]`` in the query.
        default_exchange: the exchange of targets that name none.
        allowed_remote_exmods: modules whose exceptions are rebuilt as themselves.
    """

    def __init__(
        self, conf: Any, url: TransportURL, default_exchange: str | None = None, allowed_remote_exmods: Any = None
    ) -> None:
        super().__init__(conf, url, default_exchange, allowed_remote_exmods)
        self._group = options.register(conf, url)[options.GROUP]
        self._core: Core | None = None
        self._process = 0
        self._cleaned_up = False

    def require_features(self, requeue: bool = False) -> None:
        """All of them are there."""

    @property
    def core(self) -> Core:
        """This process's core for our settings, made at the first use.

        Raises:
            SendFailed: the transport was cleaned up.
        """
        if self._core is None or self._process != CORES.process:
            if self._cleaned_up:
                raise SendFailed("this transport was cleaned up; make a new one with get_rpc_transport()")
            self._option = {each.dest: self._group[each.dest] for each in options.OPTIONS}
            given = {each.dest: self._option[each.dest] for each in options.NODE_OPTIONS}
            settings = {name: value for name, value in given.items() if value is not None}
            self._core = CORES.acquire(settings | {"realm": self._url.virtual_host or ""})
            self._process = CORES.process
        return self._core

    # --- sending

    def send(
        self,
        target: Target,
        ctxt: Any,
        message: dict[str, Any],
        wait_for_reply: bool | None = None,
        timeout: float | None = None,
        call_monitor_timeout: float | None = None,
        retry: int | None = None,
        transport_options: Any = None,
        **_: Any,
    ) -> Any:
        """See the base class. ``timeout`` bounds the whole operation; what may have run is never sent again.

        Raises:
            MessagingTimeout: no reply within ``timeout``, or no sign of life within ``call_monitor_timeout``.
            OutcomeUnknown: the server is gone and may have run the request; also a MessagingTimeout.
            NobodyServes: at once, with ``at_least_once``; also MessageUndeliverable and MessageDeliveryFailure.
            MessageDeliveryFailure: not delivered after ``retry`` more attempts.
            SendFailed: too large, not serialisable, the transport was cleaned up, or the node cannot work here.
        """
        mandatory = bool(getattr(transport_options, "at_least_once", False))
        sending = self._sending(target, "", ctxt, message, None if mandatory else retry, mandatory)
        try:
            if target.fanout:
                return self._fanout(sending)
            if not wait_for_reply:
                return self._cast(sending, timeout)
            reply = self._call(
                sending, CALL_TIMEOUT if timeout is None else max(timeout, SHORTEST), call_monitor_timeout
            )
        except errors.OnehopError as error:
            raise translated(error, sending) from error
        answer = payload.decode(reply)
        if len(answer) == 1:
            return answer[0]
        raise payload.rebuild_failure(answer[1], self._allowed_remote_exmods)

    def send_notification(
        self, target: Target, ctxt: Any, message: dict[str, Any], version: Any, retry: int | None = None, **_: Any
    ) -> None:
        """See the base class. While nobody listens, the message is held in this process's memory, within bounds.

        ``version`` asks for an envelope, which would carry nothing that our own format does not.

        Raises:
            MessageDeliveryFailure: not delivered after ``retry`` more attempts.
            SendFailed: as in :meth:`send`.
        """
        sending = self._sending(target, "notify:", ctxt, message, retry)
        try:
            self._notify(sending)
        except errors.OnehopError as error:
            raise translated(error, sending) from error

    def _sending(
        self, target: Target, prefix: str, ctxt: Any, message: Any, retry: int | None, mandatory: bool = False
    ) -> Sending:
        address = Address(self._service(target, prefix), "" if prefix or target.fanout else target.server or "")
        method = message.get("method")
        try:
            _ = self.core
            body = payload.encode([ctxt if isinstance(ctxt, dict) else ctxt.to_dict(), message])
        except (errors.OnehopError, *payload.UNENCODABLE) as error:
            raise SendFailed(f"{method!r} to {address} cannot be sent: {error}") from error
        attempts = None if retry is None or retry < 0 else retry + 1
        ttl = self._option["notification_ttl" if prefix else "cast_ttl"]
        return Sending(address, method if isinstance(method, str) else "", body, attempts, ttl, mandatory)

    def _call(self, sending: Sending, timeout: float, monitor: float | None) -> bytes | memoryview:
        core = self.core
        wait = math.inf if sending.attempts is None and not sending.mandatory else 0.0

        def call(left: float) -> bytes | memoryview:
            return core.client(sending.address, left, wait, monitor).call_raw(sending.method, sending.body)

        return persist(call, timeout, sending.attempts)

    def _cast(self, sending: Sending, timeout: float | None = None) -> None:
        """Deliver to a receiver that is there, or leave the message in the outbox."""
        outbox = self.core.outbox
        may_hold = sending.attempts is None and not sending.mandatory
        if may_hold and outbox.holds(sending.address):
            return self._hold(sending, self._try_cast)
        limit = self._option["cast_timeout"] if timeout is None else timeout
        try:
            persist(lambda left: self._try_cast(sending, left), limit, sending.attempts)
        except errors.CallError as error:
            if not may_hold:
                raise
            if error.executed == "no":
                return self._hold(sending, self._try_cast)
            outbox.doubt(sending.address, error)

    def _try_cast(self, sending: Sending, left: float) -> None:
        limit = min(left, self._option["cast_timeout"])
        self.core.client(sending.address, limit, 0.0).cast_raw(sending.method, sending.body)

    def _fanout(self, sending: Sending) -> None:
        client = self.core.client(sending.address, self._option["cast_timeout"], 0.0)
        for each in client.fanout_raw(sending.method, sending.body):
            if each.outcome != "taken":
                where = f"{each.server} on {each.host}"
                LOG.warning("%r to all of %s missed %s: %s", sending.method, sending.address, where, each.reason)

    def _notify(self, sending: Sending) -> None:
        outbox = self.core.outbox
        if sending.attempts is None and outbox.holds(sending.address):
            return self._hold(sending, self._try_notify)
        try:
            persist(lambda left: self._try_notify(sending, left), sending.ttl, sending.attempts)
        except errors.NoRoute:
            if sending.attempts is not None:
                raise
            self._hold(sending, self._try_notify)

    def _try_notify(self, sending: Sending, left: float) -> None:
        """One copy for each pool that listens now; each is delivered, or held, by itself."""
        service = sending.address.service
        pools = sorted({view.server for view in self.core.node.servers(service)})
        if not pools:
            raise errors.NoRoute(f"nobody listens to {service}")
        for pool in pools:
            self._cast(sending._replace(address=Address(service, pool)))

    def _hold(self, sending: Sending, send: Callable[[Sending, float], None]) -> None:
        self.core.outbox.put(
            sending.address,
            Held(lambda left: send(sending, left), len(sending.body), time.monotonic() + sending.ttl),
            self._option["outbox_messages"],
            self._option["outbox_bytes"],
        )

    # --- receiving

    def listen(self, target: Target, batch_size: int, batch_timeout: float | None, **_: Any) -> base.Listener:
        """See the base class. Other processes see the server when this returns."""
        listener = self.core.node.listen(self._service(target), server=target.server)
        return base.PollStyleListenerAdapter(PollListener(listener, Request), batch_size, batch_timeout)

    def listen_for_notifications(
        self,
        targets_and_priorities: Iterable[tuple[Target, str]],
        pool: str | None,
        batch_size: int | None,
        batch_timeout: float | None,
        **_: Any,
    ) -> base.Listener:
        """See the base class. The listeners of one ``pool``, or of none, share its messages."""
        services = {self._service(target, "notify:", f".{priority}") for target, priority in targets_and_priorities}
        listener = self.core.node.listen(sorted(services), server=f"pool:{pool or ''}")
        return base.PollStyleListenerAdapter(PollListener(listener, Notification), batch_size or 1, batch_timeout)

    def cleanup(self) -> None:
        """Give the shared core back; the last transport that does so closes it. Twice is fine."""
        core, self._core, self._cleaned_up = self._core, None, True
        if core is not None and self._process == CORES.process:
            CORES.release(core)

    def _service(self, target: Target, prefix: str = "", suffix: str = "") -> str:
        exchange = target.exchange or self._default_exchange or ""
        return f"{prefix}{quote(exchange, safe='')}/{quote(target.topic + suffix, safe='')}"


def persist(attempt: Callable[[float], Any], limit: float, attempts: int | None) -> Any:
    """Try until it works, ``limit`` seconds are over or the ``attempts`` are used up (None: no bound).

    Only what surely did not run is tried again. That nobody is there is final where attempts have no bound: the
    attempt itself waited then, or is not meant to.
    """
    deadline = time.monotonic() + limit
    left, pause = limit, FIRST_PAUSE
    for number in itertools.count(1):
        try:
            return attempt(left)
        except errors.CallError as error:
            final = isinstance(error, errors.CallTimeout | errors.RemoteError) or error.executed != "no"
            if final or number == attempts or (attempts is None and isinstance(error, errors.NoRoute)):
                raise
            pause = min(2 * pause, LONGEST_PAUSE) * random.uniform(0.5, 1.0)
            left = deadline - time.monotonic() - pause
            if left <= 0:
                raise
        time.sleep(pause)
    return None


def translated(error: errors.OnehopError, sending: Sending) -> Exception:
    """What oslo.messaging's users expect in the place of ``error``."""
    what = f"{sending.method!r} to {sending.address}: {error}"
    if isinstance(error, errors.RemoteError):
        return RemoteError(error.type, error.detail, error.trace)
    if not isinstance(error, errors.CallError):
        return SendFailed(what)
    if isinstance(error, errors.NoRoute) and sending.mandatory:
        return NobodyServes(error, "", str(sending.address), what)
    if isinstance(error, errors.CallTimeout):
        return MessagingTimeout(what)
    if error.executed != "no":
        return OutcomeUnknown(what)
    if sending.attempts is not None:
        return MessageDeliveryFailure(f"{what} (after {sending.attempts} attempts)")
    return MessagingTimeout(what)
