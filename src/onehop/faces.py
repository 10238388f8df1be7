"""What the blocking and the asyncio face have in common: a node's parts, what its verbs ask, and what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from onehop import handlers, payload
from onehop.addresses import bracketed, listening_address, listening_ports
from onehop.errors import EncodeError, Rejected, SettingsError, WireError
from onehop.interfaces import Record, Registry
from onehop.protocol import wire
from onehop.protocol.calls import FAILED, Call
from onehop.protocol.tree import SERVICE as RELAYS
from onehop.registry import open_registry
from onehop.registry.local import LocalRegistry, remove_dead_sockets
from onehop.settings import Settings
from onehop.transport.carrier import Carrier
from onehop.transport.engine import Engine
from onehop.transport.requests import Attempt, Terms, describe
from onehop.transport.sockets import ZmqCarrier

MANY, TOGETHER = 256, 8192
"""Casts that travel together at most, and about how many bytes they take: so few that both ends work in their cache."""


class Receipt(NamedTuple):
    """What became of one receiver's copy."""

    server: str
    node: str
    host: str
    outcome: str
    """``"taken"``, ``"unreachable"`` or ``"refused"``."""
    reason: str = ""
    seconds: float = 0.0
    """Until that was known. Somebody silent beside it may add as much again (at least 20 ms), or, where the client has
    a ``monitor``, all of its silence."""


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


class AnyClient:
    """What a client of one service is in either face. Immutable but for whose turn it is; made by ``Node.client``.

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
        settings: Settings,
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
        self.service = service
        self.server = server
        self._options: dict[str, Any] = {
            "server": server, "timeout": timeout, "ready_timeout": ready_timeout, "monitor": monitor,
            "idempotent": idempotent, "returns": returns, "errors": errors,
        }  # fmt: skip
        self._returns = returns
        self._errors = tuple(errors)
        self._terms = terms_of(settings, service, self._options)

    def _changed(self, options: dict[str, Any]) -> dict[str, Any]:
        unknown = options.keys() - self._options.keys()
        if unknown:
            raise SettingsError(f"no option is called {unknown.pop()!r}; there are: {', '.join(self._options)}")
        return {**self._options, **options}

    def _value(self, method: str, call: Call) -> Any:
        if call.outcome is FAILED:
            raise handlers.rebuild(call.body, self._errors, describe(method, self._terms, call.route))
        value = payload.decode(call.body)
        return value if self._returns is None else payload.restore(value, self._returns)

    def __repr__(self) -> str:
        return f"<Client of {self._terms}>"


def bodies_of(many: Iterable[Sequence[Any] | Mapping[str, Any]]) -> Iterator[bytes]:
    """The bodies of casts in which many travel together: so many in each as stay below the size of a large one.

    Args:
        many: for each run of the method its positional arguments, or its keywords.
    """
    pairs: list[Any] = []
    room = 1
    for number, each in enumerate(many):
        if type(each) is tuple or type(each) is list:  # as most are; to ask for the others takes longer
            pairs.append((each, {}))
        elif isinstance(each, Mapping):
            pairs.append(((), each))
        elif isinstance(each, Sequence) and not isinstance(each, str | bytes | bytearray):
            pairs.append((each, {}))
        else:
            raise EncodeError(
                f"run {number} of cast_many is given a {type(each).__name__}; it would be its positional arguments, as "
                "a tuple or a list, or its keywords, as a dict"
            )
        if len(pairs) >= room:
            body = payload.encode(pairs)
            room = max(1, min(MANY, len(pairs) * TOGETHER // len(body)))
            pairs.clear()
            yield body
    if pairs:
        yield payload.encode(pairs)


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


# A node's parts -----------------------------------------------------------------------------------


def parts_of(settings: Settings, network: Network | None) -> tuple[Carrier, Registry, Callable[[bytes], Sequence[str]]]:
    """What carries a node's messages, who knows the others, and where the node of a given id listens."""
    if network is not None:
        return network.carrier, network.registry(), lambda node: (network.endpoint(node),)
    registry = open_registry(settings.registry, settings)
    local = registry if isinstance(registry, LocalRegistry) else LocalRegistry(settings)

    def listen(node: bytes) -> list[str]:
        # Half of the id: a socket's path has 107 bytes at most, and 64 random bits do not meet by chance.
        directory = local.prepare()
        places = [f"ipc://{directory}/{node.hex()[:16]}.sock"]
        if local is not registry:
            remove_dead_sockets(directory)
        if registry.addresses:
            ports = listening_ports(settings.ports)
            # The first is for the directory of a host (registry/hosts.py), unless the registry's URL names others.
            taken = {ports[0], *(port for _host, port in registry.addresses)} if len(ports) > 1 else set()
            if taken.issuperset(ports):
                raise SettingsError(
                    f"ports is {settings.ports!r}, and each of them is one of the registry's servers: give more"
                )
            address = listening_address(settings, registry.addresses)
            places.append(f"tcp://{bracketed(address)}:{','.join(str(port) for port in ports if port not in taken)}")
        return places

    return ZmqCarrier(0o660 if settings.group else 0o600, str(local.directory)), registry, listen


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
    if service == RELAYS:
        raise SettingsError(f"{service!r} is where nodes ask relays to pass fan-outs on; take another name")
    try:
        wire.names(service, server, "")
    except WireError as error:
        raise SettingsError(str(error)) from None
    return service
