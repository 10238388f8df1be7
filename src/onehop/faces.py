"""What the blocking and the asyncio face have in common: what their verbs return, and what they make of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, NamedTuple, Protocol

from onehop import handlers, payload
from onehop.errors import Rejected, SettingsError, TooLarge, WireError
from onehop.interfaces import Record, Registry
from onehop.protocol import wire
from onehop.protocol.inbox import Request
from onehop.registry import open_registry
from onehop.registry.local import LocalRegistry
from onehop.settings import Settings
from onehop.transport.carrier import Carrier
from onehop.transport.engine import Engine
from onehop.transport.requests import Attempt, Terms, serving
from onehop.transport.sockets import ZmqCarrier


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


class Network(Protocol):
    """What carries messages in the place of ZeroMQ, with a registry of its own: ``onehop.testing.memory.Network``."""

    @property
    def carrier(self) -> Carrier: ...
    def registry(self) -> Registry: ...
    def endpoint(self, node: bytes) -> str: ...


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


# Asking -------------------------------------------------------------------------------------------


def terms_of(settings: Settings, service: str, options: dict[str, Any]) -> Terms:
    """The terms of a client's requests, from its options.

    Raises:
        SettingsError: an option does not fit.
    """
    timeout, ready_timeout, monitor = options["timeout"], options["ready_timeout"], options["monitor"]
    for name, value in (("timeout", timeout), ("monitor", monitor)):
        if value is not None and not value > 0:
            raise SettingsError(f"{name} is {value!r}; it must be a number of seconds above 0")
    if ready_timeout is not None and not ready_timeout >= 0:
        raise SettingsError(f"ready_timeout is {ready_timeout!r}; it must be 0 or more seconds")
    return Terms(
        service,
        options["server"],
        settings.timeout if timeout is None else timeout,
        settings.ready_timeout if ready_timeout is None else ready_timeout,
        monitor,
        options["idempotent"],
    )


def receipt(attempt: Attempt) -> Receipt:
    """What became of one copy of a fan-out."""
    peer, error = attempt.route.peer, attempt.error
    host = peer.record.host if peer.record is not None else ""
    if error is None:
        return Receipt(attempt.route.server, peer.id.hex(), host, "taken", "", attempt.seconds)
    outcome = "refused" if isinstance(error, Rejected) else "unreachable"
    return Receipt(attempt.route.server, peer.id.hex(), host, outcome, str(error), attempt.seconds)


def gathered(attempts: Sequence[Attempt], value: Callable[[Attempt], Any]) -> Gathered:
    """Replies by server, and an error for each that gave none."""
    replies: dict[tuple[str, str], Any] = {}
    errors: dict[tuple[str, str], Exception] = {}
    for attempt in attempts:
        key = (attempt.route.server, attempt.route.peer.id.hex())
        try:
            if attempt.error is not None:
                raise attempt.error
            replies[key] = value(attempt)
        except Exception as error:
            errors[key] = error
    return Gathered(replies, errors)


# Serving ------------------------------------------------------------------------------------------


def arguments_of(body: bytes | memoryview) -> tuple[list[Any], dict[str, Any]]:
    """Arguments and keywords of a request's body.

    Raises:
        BadArguments: it is something else.
    """
    value = payload.decode(body)
    if type(value) is list and len(value) == 2 and type(value[0]) is list and type(value[1]) is dict:
        return value[0], value[1]
    raise handlers.Misfit("the body is not a pair of arguments and keywords")


def fitting(value: Any, settings: Settings) -> bytes:
    """The bytes of a handler's result.

    Raises:
        EncodeError, TooLarge: it has no form on the wire, or is beyond ``max_message``.
    """
    body = payload.encode(value)
    if len(body) > settings.max_message:
        raise TooLarge(f"the result has {len(body)} bytes; max_message allows {settings.max_message}")
    return body


# A node's parts -----------------------------------------------------------------------------------


def parts_of(settings: Settings, network: Network | None) -> tuple[Carrier, Registry, Callable[[bytes], str]]:
    """What carries a node's messages, who knows the others, and where the node of a given id listens."""
    if network is not None:
        return network.carrier, network.registry(), network.endpoint
    registry = open_registry(settings.registry, settings)
    local = registry if isinstance(registry, LocalRegistry) else LocalRegistry(settings)

    def endpoint(node: bytes) -> str:
        # Half of the id: a socket's path has 107 bytes at most, and 64 random bits do not meet by chance.
        return f"ipc://{local.prepare()}/{node.hex()[:16]}.sock"

    return ZmqCarrier(0o660 if settings.group else 0o600), registry, endpoint


def servers_of(records: Sequence[Record], service: str | None, own: str) -> list[ServerView]:
    """The servers that ``records`` tell of, of one service or of all; ``own`` is this node's id."""
    return [
        ServerView(name, server, record.node, record.host, record.pid, record.state, record.node == own)
        for record in records
        for name, servers in sorted(record.services.items())
        if service is None or name == service
        for server in servers
    ]


def told(engine: Engine) -> str:
    """A node at work, for people."""
    now = engine.statistics()
    ready = sum(peer.state == "ready" for peer in now.peers)
    flight = sum(peer.in_flight for peer in now.peers)
    return (
        f"{now.node[:8]} on {now.host}: {len(now.peers)} peers ({ready} ready) | "
        f"{flight} requests under way, {now.taken} taken"
    )


def checked_name(service: str, server: str = "") -> str:
    """``service``, if it can be the name of one.

    Raises:
        SettingsError: it cannot; says why.
    """
    if not isinstance(service, str) or not service:
        raise SettingsError(f"service is {service!r}; it must be a name, such as 'clock'")
    try:
        wire.names(service, server, "")
    except WireError as error:
        raise SettingsError(str(error)) from None
    return service
