"""The driver that oslo.messaging loads for transport URLs that begin with ``zmq:`` or ``zmq+``."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from oslo_messaging import (
    MessageDeliveryFailure,
    MessageUndeliverable,
    MessagingException,
    MessagingTimeout,
    RemoteError,
    Target,
)
from oslo_messaging._drivers import base
from oslo_messaging.transport import TransportURL

from onehop import Listener, errors
from onehop.oslo import options, payload
from onehop.oslo.core import CORES, Core, Sending
from onehop.oslo.listener import AHEAD, Notification, PollListener, Request

CALL_TIMEOUT = 60.0  # of a call that names none, which oslo.messaging's client never makes
NOTIFY = "notify:"  # topics of notifications are none of RPC's
SHORTEST = 0.001  # a timeout of 0 is allowed, and ends as a timeout


class OutcomeUnknown(MessagingTimeout):  # type: ignore[misc]
    """The server went away before it answered, so nobody knows whether it ran the request. Raised at once."""


class NobodyServes(MessageUndeliverable, MessageDeliveryFailure):  # type: ignore[misc]
    """``at_least_once`` was asked for, and nobody serves the target at this moment."""

    def __str__(self) -> str:
        return str(self.exception)


class SendFailed(base.TransportDriverError):  # type: ignore[misc]
    """The message could not be sent for a reason on this side; the text says which."""


class ListenFailed(MessagingException):  # type: ignore[misc]
    """Nothing can be received here; the text says why.

    No TransportDriverError: where a server meets one at its start, oslo.messaging 18.3.1 ends in an AttributeError.
    """


class ZmqDriver(base.BaseDriver):  # type: ignore[misc]
    """RPC and notifications of one transport. Constructing it does nothing but read options.

    Args:
        conf: the program's ConfigOpts; our options are registered on it.
        url: ``zmq://[/realm]``, or ``zmq+`` before the URL of a registry, with the realm as its path; options of
            ``[oslo_messaging_zmq]``, and the registry's own, in the query.
        default_exchange: the exchange of targets that name none.
        allowed_remote_exmods: modules whose exceptions are rebuilt as themselves.

    Raises:
        oslo_messaging.InvalidTransportURL: the URL, or an option, cannot be; says what would be right.
    """

    def __init__(
        self, conf: Any, url: TransportURL, default_exchange: str | None = None, allowed_remote_exmods: Any = None
    ) -> None:
        super().__init__(conf, url, default_exchange, allowed_remote_exmods)
        options.read(conf, url)  # so that what is wrong is told now
        self._core: Core | None = None
        self._life: object = None
        self._cleaned_up = False

    def require_features(self, requeue: bool = False) -> None:
        """All of them are there."""

    @property
    def core(self) -> Core:
        """This process's core for our settings, made at the first use.

        Raises:
            SendFailed: the transport was cleaned up.
        """
        core = self._core  # read once: cleanup() may come at any time
        if core is None or self._life is not CORES.life:
            with CORES.lock:  # of threads that come first together one takes it, as it is given back once
                core = self._core
                if core is None or self._life is not CORES.life:
                    if self._cleaned_up:
                        raise SendFailed("this transport was cleaned up; make a new one with get_rpc_transport()")
                    core = self._core = CORES.acquire(options.read(self.conf, self._url))
                    self._life = CORES.life
        return core

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
        mandatory = transport_options is not None and bool(getattr(transport_options, "at_least_once", False))
        service = service_name("", target.exchange or self._default_exchange, target.topic)
        server = "" if target.fanout else target.server or ""
        core, sending = self._sending(service, server, ctxt, message, None if mandatory else retry, mandatory)
        if timeout is not None and timeout < SHORTEST:
            timeout = SHORTEST
        try:
            if target.fanout:
                return core.fanout(sending)
            if not wait_for_reply:
                return core.cast(sending, timeout)
            reply = core.call(sending, timeout or CALL_TIMEOUT, call_monitor_timeout)
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
        service = service_name(NOTIFY, target.exchange or self._default_exchange, target.topic)
        core, sending = self._sending(service, "", ctxt, message, retry, everybody=True)
        try:
            core.cast(sending)
        except errors.OnehopError as error:
            raise translated(error, sending) from error

    def _sending(
        self,
        service: str,
        server: str,
        ctxt: Any,
        message: Any,
        retry: int | None,
        mandatory: bool = False,
        everybody: bool = False,
    ) -> tuple[Core, Sending]:
        method = str(message.get("method", "notify"))
        try:
            core = self.core
            body = payload.encode([ctxt if isinstance(ctxt, dict) else ctxt.to_dict(), message])
        except (errors.OnehopError, *payload.UNENCODABLE) as error:
            raise SendFailed(f"{method!r} to {service} cannot be sent: {error}") from error
        until = time.monotonic() + core.options["notification_ttl" if everybody else "cast_ttl"]
        attempts = None if retry is None or retry < 0 else retry + 1
        return core, Sending(service, server, method, body, until, attempts, mandatory, everybody)

    def listen(self, target: Target, batch_size: int, batch_timeout: float | None, **_: Any) -> base.Listener:
        """See the base class. Other processes see the server when this returns."""
        service = service_name("", target.exchange or self._default_exchange, target.topic)
        listener = self._listener(service, server=target.server, ahead=AHEAD)
        # Half of what may be ahead comes at once; a batch that waits for more would wait for itself.
        most = min(batch_size, AHEAD // 2)
        return base.PollStyleListenerAdapter(PollListener(listener, Request), most, batch_timeout)

    def listen_for_notifications(
        self, targets_and_priorities: Any, pool: str | None, batch_size: int | None, batch_timeout: Any, **_: Any
    ) -> base.Listener:
        """See the base class. The listeners of one ``pool``, or of none, share its messages."""
        services = {
            service_name(NOTIFY, target.exchange or self._default_exchange, f"{target.topic}.{priority}")
            for target, priority in targets_and_priorities
        }
        listener = self._listener(sorted(services), server=f"pool:{pool or ''}")
        return base.PollStyleListenerAdapter(PollListener(listener, Notification), batch_size or 1, batch_timeout)

    def _listener(self, services: str | list[str], **details: Any) -> Listener:
        try:
            return self.core.node.listen(services, **details)
        except (SendFailed, errors.OnehopError) as error:
            raise ListenFailed(f"cannot listen for {services}: {error}") from error

    def cleanup(self) -> None:
        """Give the shared core back; the last transport that does so closes it. Twice is fine."""
        core, self._core, self._cleaned_up = self._core, None, True
        if core is not None and self._life is CORES.life:
            CORES.release(core)


@lru_cache(4096)
def service_name(prefix: str, exchange: str | None, topic: str) -> str:
    """The service that stands for a topic of an exchange."""
    return f"{prefix}{quote(exchange or '', safe='')}/{quote(topic, safe='')}"


def translated(error: errors.OnehopError, sending: Sending) -> Any:
    """The exception that oslo.messaging's users expect in the place of ``error``."""
    what = f"{sending}: {error}"
    if isinstance(error, errors.RemoteError):
        return RemoteError(error.type, error.detail, error.trace)
    if not isinstance(error, errors.CallError):
        return SendFailed(what)
    if isinstance(error, errors.NoRoute) and sending.mandatory:
        return NobodyServes(error, "", sending.service, what)
    if error.executed == "unknown" and not isinstance(error, errors.CallTimeout):
        return OutcomeUnknown(what)
    if error.executed == "no" and sending.attempts is not None:
        return MessageDeliveryFailure(f"{what} (after {sending.attempts} attempts)")
    return MessagingTimeout(what)
