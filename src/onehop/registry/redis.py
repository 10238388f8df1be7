"""The registry on Redis or Valkey (5 or later), alone, with replicas, or behind Sentinels; not on a cluster.

Its keys stand in ``redis_commands.py``. Subscriptions lose messages in silence. So each message carries the count of
its service's changes, who follows compares the count now and then, and reads a service anew where one is missing: in
the ordinary case that costs a small question a service, however many offer it. Redis does not tell of keys that expire
either: whoever renews or asks also removes those whose time has come, and that is a change like others.
"""

from __future__ import annotations

import logging
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from onehop.errors import OnehopError, RegistryError, SettingsError
from onehop.registry.leased import LeasedRegistry, LeaseLost, Store, StoreAway, Tell
from onehop.registry.redis_commands import SCRIPTS, Command, Keys, Value, service_named
from onehop.registry.threads import start_thread
from onehop.registry.urls import Place, parse
from onehop.settings import Settings

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as error:
    raise ImportError(f"the Python package redis is missing ({error}): pip install 'onehop[redis]'") from error

PORT, SENTINEL_PORT = 6379, 26379
OPTIONS = ("db", "sentinel", "tls", "ca", "cert", "key")
_SOON, _LATE, _MANY = 0.1, 0.33, 100  # leases between two questions: with few nodes, at most; nodes that double it

_log = logging.getLogger(__name__)

_T = TypeVar("_T")


def open_registry(settings: Settings, url: str) -> LeasedRegistry:
    """The registry at ``redis://[user:password@]host[:6379][,host...]/?db=0&sentinel=NAME&tls=1&ca=...&cert=...&key=...``.

    Without ``sentinel`` several hosts are tried in turn until one is no replica. With it they are Sentinels (port
    26379), which know where the primary called NAME is.

    Raises:
        SettingsError: the URL is wrong; says what is wrong and what would be right.
    """
    place = parse(url, PORT, OPTIONS)
    if "sentinel" in place.options:
        place = parse(url, SENTINEL_PORT, OPTIONS)
    _check(place)
    return LeasedRegistry(settings, place, lambda: RedisStore(settings, place))


def _check(place: Place) -> None:
    options = place.options
    if not re.fullmatch("[0-9]{1,9}", options.get("db", "0")):
        raise SettingsError(f"registry is {place.shown!r}: db is {options['db']!r}; it must be a database's number")
    if options.get("tls", "0") not in ("0", "1"):
        raise SettingsError(f"registry is {place.shown!r}: tls is {options['tls']!r}; it must be 0 or 1")
    without = [name for name in ("ca", "cert", "key") if name in options and options.get("tls") != "1"]
    if without:
        raise SettingsError(f"registry is {place.shown!r}: {without[0]} has a meaning with tls=1 only; add that")
    if options.get("sentinel") == "":
        raise SettingsError(f"registry is {place.shown!r}: sentinel is empty; it must be the name of a primary")


# --- connections ---

# What the words of an error mean: whether waiting may mend it, and what to do. The first that fits.
_MEANINGS: Sequence[tuple[str, type[Exception], str]] = (
    (r"AuthenticationError|WRONGPASS|NOAUTH", RegistryError, "refuses the user or the password of the registry's URL"),
    (
        r"NoPermission|NOPERM",
        RegistryError,
        "does not permit what a registry needs (keys onehop:*, channels onehop:*, +@read +@write +@pubsub +@scripting)",
    ),
    (
        r"MovedError|AskError|ClusterDown|ClusterCrossSlot|MOVED|CLUSTERDOWN",
        RegistryError,
        "belongs to a Redis cluster, which cannot be a registry: name a single server, or Sentinels (?sentinel=NAME)",
    ),
    (r"WRONGTYPE", RegistryError, "holds something else under a key onehop:*, which has to be removed"),
    (r"unknown command|invalid DB index|DB index is out", RegistryError, "cannot be a registry"),
    (r"ReadOnly|READONLY", StoreAway, "is a read-only replica, and no primary"),
    (r"OutOfMemory|OOM", StoreAway, "has no memory left for a record (its setting maxmemory)"),
    (r"NoScript|NOSCRIPT", StoreAway, "has forgotten our scripts"),
    (r"", StoreAway, "does not answer as it should"),
)


def _meaning(error: Exception, server: str) -> Exception:
    """``error`` as the protocol of stores wants it."""
    if isinstance(error, OnehopError | StoreAway):
        return error
    text = f"{type(error).__name__}: {error}"
    kind, sentence = next((kind, sentence) for words, kind, sentence in _MEANINGS if re.search(words, text))
    return kind(f"the Redis server {server} {sentence}: {error}")


class _Connection:
    """One connection; used by one thread after another. Errors are those of stores.

    Args:
        patience: seconds to wait for one answer.
    """

    def __init__(self, place: Place, server: tuple[str, int], patience: float, *, sentinel: bool = False) -> None:
        host, port = self.address = server
        self.server = f"{host}:{port}" if ":" not in host else f"[{host}]:{port}"
        self.patience = patience
        self._asking = threading.Lock()
        self._closed = False
        options = place.options
        probe = max(1, int(patience * 2 / 3))  # seconds: with two of them in vain a subscription is known to be cut
        arguments: dict[str, Any] = {
            "host": host,
            "port": port,
            "socket_timeout": patience,
            "socket_connect_timeout": patience,
            "socket_keepalive": True,
            "socket_keepalive_options": {
                socket.TCP_KEEPIDLE: probe,
                socket.TCP_KEEPINTVL: probe,
                socket.TCP_KEEPCNT: 2,
            },
            "retry": Retry(NoBackoff(), 0),  # whoever calls has a way of his own
            "protocol": 2,
            "db": 0 if sentinel else int(options.get("db", "0")),
            "username": place.user or None,
            "password": place.password or None,
        }
        if options.get("tls") == "1":
            arguments |= {"ssl_ca_certs": options.get("ca"), "ssl_certfile": options.get("cert")}
            arguments |= {"ssl_keyfile": options.get("key"), "ssl_check_hostname": True}
            self._connection: Any = redis.SSLConnection(**arguments)
        else:
            self._connection = redis.Connection(**arguments)  # type: ignore[no-untyped-call]
        self._guarded(self._connection.connect)

    def ask(self, *commands: Command) -> list[Any]:
        """The answers to these commands, in one round trip."""
        try:
            with self._asking:
                return self._guarded(lambda: self._ask(commands))
        finally:
            if self._closed:  # whoever closed it found it in use, and left that to us
                self.close()

    def _ask(self, commands: Sequence[Command]) -> list[Any]:
        self._connection.send_packed_command(self._connection.pack_commands(commands))
        answers = [self._answer() for _ in commands]
        for each in answers:
            if isinstance(each, redis.ResponseError):
                raise each
        return answers

    def _answer(self) -> Any:
        try:
            return self._connection.read_response()
        except redis.ResponseError as error:
            return error  # the answers behind it are still to be read

    def send(self, *command: Value) -> None:
        """Without waiting for an answer: another thread hears it, and closes the connection."""
        with self._asking:
            if self._closed:
                raise StoreAway(f"the connection to the Redis server {self.server} was given up")
            try:
                self._connection.send_command(*command)
            except (redis.RedisError, OSError) as error:
                raise _meaning(error, self.server) from error
            except AttributeError as error:  # redis-py, when that thread finds the end of the connection just now
                raise StoreAway(f"the connection to the Redis server {self.server} ended") from error

    def hear(self, patience: float) -> list[Any] | None:
        """The next message; None where none came in so many seconds."""

        def hear() -> list[Any] | None:
            return self._connection.read_response() if self._connection.can_read(timeout=patience) else None

        return self._guarded(hear)

    def close(self) -> None:
        """End it; a question under way in another thread ends it when it has its answer."""
        self._closed = True
        if self._asking.acquire(blocking=False):
            try:
                self._connection.disconnect()
            finally:
                self._asking.release()

    def forget(self) -> None:
        """In a forked child: redis-py closes the descriptor without shutting the connection down there."""
        self._closed = True
        self._connection.disconnect()

    def _guarded(self, action: Callable[[], _T]) -> _T:
        if self._closed:
            raise StoreAway(f"the connection to the Redis server {self.server} was given up")
        try:
            return action()
        except (redis.RedisError, OSError) as error:
            if not isinstance(error, redis.ResponseError):
                self._closed = True  # an answer that comes later would be taken for another's
            raise _meaning(error, self.server) from error
        finally:
            if self._closed:
                self._connection.disconnect()


# --- following ---


class _Listener:
    """The thread that hears of changes over a connection of its own, and finds out what it did not hear.

    Args:
        questions: the connection for commands, shared with the store.
        subscription: the connection for messages.
        period: seconds between two questions, by the number of known nodes.
    """

    def __init__(
        self, keys: Keys, tell: Tell, questions: _Connection, subscription: _Connection, period: Callable[[int], float]
    ) -> None:
        self._keys, self._tell, self._period = keys, tell, period
        self._questions, self._subscription = questions, subscription
        self._ended = False
        self._changed = threading.Condition()
        self._subscribed: set[str] = set()
        self._everything = False
        self._counts: dict[str, int] = {}  # of each followed service: the last change that was told
        self._behind: dict[str, int] = {}  # what the count should be by the next question: messages may be under way
        self._nodes: dict[str, set[str]] = {}
        self._thread = start_thread("onehop-redis", self._run)

    def follow(self, service: str) -> dict[tuple[str, str], bytes]:
        """Subscribe, and read what is there. For the store's thread."""
        command, channel = self._keys.subscription(service)
        self._subscription.send(command, channel)
        with self._changed:
            confirmed = lambda: channel in self._subscribed or self._ended  # noqa: E731
            if not self._changed.wait_for(confirmed, self._subscription.patience) or self._ended:
                raise StoreAway(f"the Redis server {self._subscription.server} does not confirm a subscription")
        if not service:
            self._everything = True
        services = [service] if service else self._services()
        found: dict[tuple[str, str], bytes] = {}
        for each in services:
            with self._changed:  # the thread tells nothing between the reading and the note of how far it went
                found |= self._read(each)
        return found

    def end(self) -> None:
        self._ended = True
        try:
            self._subscription.send("UNSUBSCRIBE")  # its confirmation wakes the thread
        except (StoreAway, RegistryError):
            pass

    def forget(self) -> None:
        self._ended = True
        self._subscription.forget()

    def _services(self) -> list[str]:
        (parts,) = self._questions.ask(("ZRANGE", self._keys.services, 0, -1))
        return [service for each in parts if (service := service_named(each)) is not None]

    def _read(self, service: str) -> dict[tuple[str, str], bytes]:
        ((count, *flat),) = self._questions.ask(self._keys.read(service))
        if len(flat) == 1:
            self._warn(flat.pop().decode(errors="replace"))
        nodes = [each.decode("utf-8", "replace") for each in flat[::2]]
        self._counts[service] = int(count)
        self._behind.pop(service, None)
        self._nodes[service] = set(nodes)
        return {(service, node): _record(value) for node, value in zip(nodes, flat[1::2], strict=True)}

    def _warn(self, key: str) -> None:
        if key not in self._keys.strange:
            self._keys.strange.add(key)
            _log.warning(
                "the Redis server %s holds something else under the key %s, which has to be removed: "
                "until then nobody is seen to offer that service",
                self._questions.server,
                key,
            )

    def _run(self) -> None:
        ask_at = 0.0
        try:
            while not self._ended:
                message = self._subscription.hear(max(0.0, ask_at - time.monotonic()))
                if message is not None:
                    self._hear(message)
                if time.monotonic() >= ask_at and not self._ended:
                    self._ask()
                    known = sum(map(len, self._nodes.values()))
                    ask_at = time.monotonic() + self._period(known) * random.uniform(0.8, 1.0)
        except (StoreAway, RegistryError) as error:
            self._fail(str(error))
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")
        finally:
            self._subscription.close()

    def _fail(self, why: str) -> None:
        if not self._ended:
            self._ended = True
            self._tell.broke(why)
        with self._changed:
            self._changed.notify_all()

    def _hear(self, message: list[Any]) -> None:
        kind, *_, channel, data = message
        if kind in (b"subscribe", b"psubscribe"):
            with self._changed:
                self._subscribed.add(channel.decode("utf-8", "replace"))
                self._changed.notify_all()
        elif kind in (b"message", b"pmessage"):
            service = self._keys.service(channel)
            if service is not None:
                self._take(service, data)

    def _take(self, service: str, data: bytes) -> None:
        """One change; where it is not the next one, or none of ours, something was missed."""
        count, _, rest = data.partition(b" ")
        what, _, rest = rest.partition(b" ")
        node, _, value = rest.partition(b" ")
        with self._changed:
            last = self._counts.get(service)
            if last is None and not self._everything:
                return  # the reading that begins it is still to come, and will have it
            if not count.isdigit() or what not in (b"put", b"withdrawn", b"expired") or int(count) > (last or 0) + 1:
                self._read_again(service)
                return
            if last is not None and int(count) <= last:
                return
            self._counts[service] = int(count)
            name = node.decode("utf-8", "replace")
            known = self._nodes.setdefault(service, set())
            if what == b"put":
                known.add(name)
                self._tell.changed(service, name, value)
            else:
                known.discard(name)
                self._tell.changed(service, name, None, withdrawn=what == b"withdrawn")

    def _ask(self) -> None:
        """Whether everything was heard; and in passing let the server see who has expired."""
        services = set(self._services()) | set(self._counts) if self._everything else set(self._counts)
        asked = sorted(services)
        answers = self._questions.ask(*map(self._keys.ask, asked)) if asked else []
        for service, answer in zip(asked, answers, strict=True):
            with self._changed:
                last, count = self._counts.get(service), int(answer)
                if last is None or count < last or last < self._behind.get(service, 0):
                    self._read_again(service)
                elif count > last:
                    self._behind[service] = count

    def _read_again(self, service: str) -> None:
        before = self._nodes.get(service, set())
        found = self._read(service)
        for node in before - self._nodes[service]:
            self._tell.changed(service, node, None)
        for key, value in found.items():
            self._tell.changed(*key, value)


def _record(value: bytes) -> bytes:
    """The record behind its number; what has none is not ours, and stays as it is."""
    number, _, record = value.partition(b" ")
    return record if number.isdigit() else value


# --- the store ---


class RedisStore(Store):
    """See :class:`onehop.registry.leased.Store`. One connection for commands, one more where it follows something."""

    def __init__(self, settings: Settings, place: Place) -> None:
        self._place, self._lease = place, settings.lease
        self._patience = max(1.0, settings.lease / 2)
        self._keys = Keys(settings, int(place.options.get("db", "0")))
        self._tell: Tell
        self._connection: _Connection | None = None
        self._listener: _Listener | None = None
        self._number = 0
        self._ours: dict[tuple[str, str], int] = {}  # by service and node: the number of what we put

    def connect(self, tell: Tell) -> None:
        self._give_up()
        self._tell = tell
        problems: list[Exception] = []
        for server in self._servers(problems):
            try:
                self._connection = self._primary(server)
                return
            except (StoreAway, RegistryError) as error:
                problems.append(error)
        raise next((each for each in problems if isinstance(each, RegistryError)), None) or StoreAway(
            "; ".join(map(str, problems))
        )

    def _servers(self, problems: list[Exception]) -> Iterable[tuple[str, int]]:
        """Where the primary may be."""
        name = self._place.options.get("sentinel")
        if name is None:
            yield from self._place.servers
            return
        for sentinel in self._place.servers:
            try:
                server = self._named(sentinel, name)
            except (StoreAway, RegistryError) as error:
                problems.append(error)
                continue
            yield server

    def _named(self, sentinel: tuple[str, int], name: str) -> tuple[str, int]:
        try:
            connection = _Connection(self._place, sentinel, self._patience, sentinel=True)
        except RegistryError:  # most Sentinels have no login, though the servers that they watch have one
            nobody = replace(self._place, user="", password="")
            connection = _Connection(nobody, sentinel, self._patience, sentinel=True)
        try:
            (answer,) = connection.ask(("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name))
        finally:
            connection.close()
        if answer is None:
            raise StoreAway(f"the Sentinel {connection.server} knows no primary called {name!r} (?sentinel=NAME)")
        host, port = answer
        return host.decode(), int(port)

    def _primary(self, server: tuple[str, int]) -> _Connection:
        connection = _Connection(self._place, server, self._patience)
        try:
            role, *_ = connection.ask(("ROLE",), *(("SCRIPT", "LOAD", each.source) for each in SCRIPTS))
            if role[0] != b"master":
                raise StoreAway(f"the Redis server {connection.server} is a read-only replica, and no primary")
        except BaseException:
            connection.close()
            raise
        return connection

    def _connected(self) -> _Connection:
        if self._connection is None:
            raise StoreAway("there is no connection to a Redis server")
        return self._connection

    def follow(self, service: str) -> Mapping[tuple[str, str], bytes]:
        connection = self._connected()
        if self._listener is None:
            subscription = _Connection(self._place, connection.address, self._patience)
            self._listener = _Listener(self._keys, self._tell, connection, subscription, self._period)
        return self._listener.follow(service)

    def _period(self, known: int) -> float:
        """The more nodes there are, the more of them ask, and whoever finds one that expired tells all."""
        return self._lease * min(_LATE, _SOON * (1 + known / _MANY))

    def publish(self, node: str, values: Mapping[str, bytes]) -> None:
        connection, number = self._connected(), self._next()
        leaving = [(key, before) for key, before in self._ours.items() if key[1] != node or key[0] not in values]
        # Noted before: whatever of it is done when the connection ends is ours to take away.
        self._ours |= {(service, node): number for service in values}
        connection.ask(
            *(self._keys.remove(*key, number) for key, _ in leaving),
            *(self._keys.put(service, node, number, value) for service, value in values.items()),
        )
        for key, _ in leaving:
            del self._ours[key]

    def withdraw(self) -> None:
        connection, number = self._connected(), self._next()
        if self._ours:
            connection.ask(*(self._keys.remove(*key, number) for key in self._ours))
        self._ours.clear()

    def keep(self) -> None:
        if not self._ours:
            return
        answers = self._connected().ask(*(self._keys.renew(*key, number) for key, number in self._ours.items()))
        if not all(answers):
            raise LeaseLost(f"the Redis server {self._connected().server} does not have our records any more")

    def _next(self) -> int:
        """A number greater than all before, in this process and (as ids are new at every start) of this node."""
        self._number = max(self._number + 1, time.time_ns() // 1000)  # microseconds: Lua counts to 2**53
        return self._number

    def close(self) -> None:
        self._give_up()

    def _give_up(self) -> None:
        listener, self._listener = self._listener, None
        connection, self._connection = self._connection, None
        if listener is not None:
            listener.end()
        if connection is not None:
            connection.close()

    def forget(self) -> None:
        listener, self._listener = self._listener, None
        connection, self._connection = self._connection, None
        if listener is not None:
            listener.forget()
        if connection is not None:
            connection.forget()
