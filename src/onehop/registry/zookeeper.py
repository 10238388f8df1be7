"""The registry on ZooKeeper, from 3.6 on: a session is the lease, and a record is an ephemeral node.

``/<prefix>/<realm>/services/<service>/<node id>``. One persistent recursive watch on each followed service names what
changed, and that alone is read. Whoever takes its own record away creates and deletes, in the same transaction, a node
of the record's name with a mark before it: nobody ever finds that node, but who watches is told of it.

kazoo carries the session, on one connection only: with the first trouble the connection ends, and
:meth:`ZooKeeperStore.connect` goes on with the same session on another. So when to try again is not decided here.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from kazoo import exceptions as refusals
from kazoo.client import KazooClient
from kazoo.handlers.threading import KazooTimeoutError, SequentialThreadingHandler
from kazoo.protocol import serialization as jute
from kazoo.protocol.connection import CREATED_EVENT, ConnectionHandler
from kazoo.retry import KazooRetry
from kazoo.security import CREATOR_ALL_ACL, OPEN_ACL_UNSAFE, READ_ACL_UNSAFE

from onehop.errors import RegistryError, SettingsError
from onehop.registry.leased import LeasedRegistry, LeaseLost, StoreAway, Tell, quoted, unquoted
from onehop.registry.urls import Place, parse
from onehop.settings import Settings

PORT = 2181
PATIENCE = 10.0  # seconds until an answer is given up; a server that hangs is noticed before, by its session
CONNECT_PATIENCE = 4.0  # seconds for which all servers together are waited for
_SESSION_PATIENCE = 0.5  # seconds until a session that was there before is asked for once more
CLOSE_PATIENCE = 1.0  # seconds until the server has confirmed the end of the session
MARK = "!"  # before a node id: its own withdrawal; no quoted name has it
LIMIT = 1_000_000  # bytes of one value: ZooKeeper hangs up on a request of more than a mebibyte
_AT_ONCE = 128  # reads in one request, and requests under way: with more than some 250 kazoo waits for itself
_ATTEMPTS = 10  # at putting keys, while parents vanish or an old session ends

_HUNG_UP = (
    "it hangs up: it is starting, or speaks TLS only, or has maxClientCnxns connections from here (60, if not set)"
)

_log = logging.getLogger(__name__)
# kazoo tells of each attempt that fails; that the registry is away is said by the registry, once.
_kazoo_log = logging.getLogger(f"{__name__}.kazoo")
_kazoo_log.setLevel(logging.ERROR)


def open_registry(settings: Settings, url: str) -> LeasedRegistry:
    """The registry at ``zookeeper://[user:password@]host[:2181][,host...]/[?prefix=...&tls=1&ca=...&cert=...&key=...]``.

    With a user, everything is written so that only that user may change it.

    Raises:
        SettingsError: the URL is wrong; says what would be right.
    """
    place = parse(url, PORT, ("prefix", "tls", "ca", "cert", "key"))
    if bool(place.user) != bool(place.password):
        raise SettingsError(f"registry is {place.shown!r}: ZooKeeper's digest login is user:password, with both")
    if place.options.get("tls", "1") not in ("0", "1"):
        raise SettingsError(f"registry is {place.shown!r}: tls is {place.options['tls']!r}; it must be 0 or 1")
    return LeasedRegistry(settings, place, lambda: ZooKeeperStore(settings, place))


class ZooKeeperStore:
    """One node's session; a :class:`onehop.registry.leased.Store`."""

    def __init__(self, settings: Settings, place: Place) -> None:
        self._place, self._lease = place, settings.lease
        prefix = [quoted(each) for each in place.options.get("prefix", "onehop").split("/") if each]
        self._top = "/".join(["", *prefix, quoted(settings.realm or "default"), "services"])
        self._connection: _Connection | None = None
        self._session: tuple[int, bytes] | None = None
        self._sessions: set[int] = set()  # that we ever had
        self._ours: set[str] = set()  # what we may have put and not taken back, in whichever of them
        self._warned = False

    def connect(self, tell: Tell) -> None:
        self._drop()
        connection = _Connection(self._place, self._lease, self._session, _Feed(self._top, tell))
        self._connection = connection
        connection.open()
        self._session = connection.session
        self._sessions.add(connection.session[0])
        if connection.lease > 1.5 * self._lease and not self._warned:
            self._warned = True
            _log.warning(
                "ZooKeeper at %s keeps a dead node's records for %g s, not for the %g s of the setting lease: "
                "see its minSessionTimeout and tickTime",
                connection.server,
                connection.lease,
                self._lease,
            )

    def follow(self, service: str) -> Mapping[tuple[str, str], bytes]:
        connection = self._connected()
        top = f"{self._top}/{quoted(service)}" if service else self._top
        with self._explained():
            # Synchronized, since another server of the ensemble may have told us what this one does not know yet.
            watched, synced = connection.ask(_Watch(top)), connection.ask(jute.Sync(top))
            watched.get(timeout=PATIENCE)
            synced.get(timeout=PATIENCE)
            tops = [top] if service else [f"{top}/{each}" for each in connection.children([top])[0]]
            lists = zip(tops, connection.children(tops), strict=True)
            return connection.feed.snapshot(top, [f"{above}/{each}" for above, names in lists for each in names])

    def publish(self, node: str, values: Mapping[str, bytes]) -> None:
        wanted = {f"{self._top}/{quoted(service)}/{quoted(node)}": value for service, value in values.items()}
        for path, value in wanted.items():
            if len(value) > LIMIT:
                raise RegistryError(f"the record for {path} has {len(value)} bytes; in ZooKeeper it may have {LIMIT}")
        connection = self._connected()
        self._ours |= wanted.keys()
        above = {path[:at] for path in wanted for at, letter in enumerate(path) if at and letter == "/"}
        parents = sorted(above, key=len)
        with self._explained():
            for _ in range(_ATTEMPTS):
                paths = list(self._ours)
                found = dict(zip([*parents, *paths], connection.read([*parents, *paths]), strict=True))
                changes = [connection.container(each) for each in parents if found[each] is None]
                steps = [self._steps(path, wanted.get(path), found[path]) for path in paths]
                changes += [jute.Transaction(each) for each in steps if each]
                if connection.change(changes):
                    self._ours &= wanted.keys()
                    return
        raise StoreAway(f"somebody else changes our keys below {self._top} of {self._place.shown} at the same time")

    def withdraw(self) -> None:
        if self._ours:
            self.publish("", {})

    def keep(self) -> None:
        connection = self._connected()
        paths = sorted(self._ours)
        with self._explained():
            for path, found in zip(paths, connection.read(paths), strict=True):
                if found is None or found.session != connection.session[0]:
                    raise LeaseLost(f"{path} is no longer ours at {connection.server}")

    def close(self) -> None:
        connection, self._connection, self._session = self._connection, None, None
        if connection is not None:
            connection.end()

    def forget(self) -> None:
        connection, self._connection, self._session = self._connection, None, None
        self._ours.clear()
        if connection is not None:
            connection.handler.abandon()

    def _drop(self) -> None:
        """End the connection, if there is one, but not its session."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.handler.cut()
            connection.end()

    def _connected(self) -> _Connection:
        if self._connection is None or not self._connection.connected:
            raise StoreAway(f"there is no connection to ZooKeeper at {self._place.shown}")
        return self._connection

    def _steps(self, path: str, value: bytes | None, found: _Found | None) -> list[Any]:
        """What makes ``path`` ours with ``value``, or nobody's where that is None.

        A node of another session is replaced: it would go with that session. It is not taken away for nothing, if that
        session was none of ours.
        """
        connection = self._connected()
        above, _, name = path.rpartition("/")
        marker = f"{above}/{MARK}{name}"
        remove, create = jute.Delete(path, -1), connection.creation(path, value)
        if value is None:
            if found is None or found.session not in self._sessions:
                return []
            return [connection.creation(marker, b""), jute.Delete(marker, -1), remove]
        if found is None:
            return [create]
        if found.session != connection.session[0]:
            return [remove, create]
        return [jute.SetData(path, value, -1)] if found.value != value else []

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of kazoo as ours."""
        where = f"ZooKeeper at {self._place.shown}"
        try:
            yield
        except (KazooTimeoutError, *_AWAY) as error:
            raise StoreAway(f"{where} does not answer: {str(error) or type(error).__name__}") from error
        except (refusals.NoAuthError, refusals.AuthFailedError, refusals.InvalidACLError) as error:
            who = f"user {self._place.user!r}" if self._place.user else "a client without a login"
            raise RegistryError(
                f"{where} refuses {who} what is needed below {self._top}: name a user that may, as in "
                "zookeeper://user:password@host/, or another place, as in ?prefix=..."
            ) from error
        except (refusals.UnimplementedError, refusals.MarshallingError) as error:
            raise RegistryError(
                f"{where} has no persistent recursive watches: it must be 3.6 or later, with its usual WatchManager"
            ) from error
        except refusals.KazooException as error:
            raise RegistryError(f"{where} refuses what it is asked: {type(error).__name__} {error}") from error


_AWAY = (
    refusals.ConnectionLoss,
    refusals.ConnectionClosedError,
    refusals.SessionExpiredError,
    refusals.SessionMovedError,
    refusals.OperationTimeoutError,
)  # fmt: skip


def _is_made(change: Any) -> bool:
    """Wait until a change is made; False where what it goes by is not so any more. Raises what else was refused."""
    try:
        results = change.get(timeout=PATIENCE)
    except _OUTRUN:
        return False
    undone = [each for each in results if isinstance(each, refusals.KazooException)]
    for each in undone:
        if not isinstance(each, (*_OUTRUN, *_BYSTANDERS)):
            raise each
    return not undone


_OUTRUN = (refusals.NoNodeError, refusals.NodeExistsError)
# Operations of a transaction that had to stay undone for another's sake.
_BYSTANDERS = (refusals.RolledBackError, refusals.RuntimeInconsistency)


@dataclass(frozen=True, slots=True)
class _Found:
    """What a read found: the content of a node, and the session that it goes with."""

    value: bytes
    session: int


@dataclass(frozen=True)
class _Watch:
    """The request for a persistent recursive watch, which kazoo does not know."""

    path: str
    type: ClassVar[int] = 106

    def serialize(self) -> bytes:
        recursive = 1
        return bytes(jute.write_string(self.path) + jute.int_struct.pack(recursive))

    def deserialize(self, answer: bytes, offset: int) -> bool:
        return True


class _Container(jute.Create):  # type: ignore[misc]
    """The request for a node that vanishes when it has been empty for a while, which kazoo does not know."""

    type = 19
    FLAG = 4


@dataclass(frozen=True)
class _Reads:
    """Many reads in one request, which kazoo does not know: ``jute.GetData`` and ``jute.GetChildren``.

    The answer has for each what it found; None where there is no such node. A node that may not be read is empty,
    and in the place of its children stands the error.
    """

    reads: Sequence[Any]
    type: ClassVar[int] = 22

    def serialize(self) -> bytes:
        parts = (jute.MultiHeader(each.type, False, -1).serialize() + each.serialize() for each in self.reads)
        return b"".join(parts) + bytes(jute.MultiHeader(-1, True, -1).serialize())

    def deserialize(self, answer: bytes, offset: int) -> list[Any]:
        found: list[Any] = []
        for each in self.reads:
            header, offset = jute.MultiHeader.deserialize(answer, offset)
            if header.type == jute.GetData.type:
                value, offset = jute.read_buffer(answer, offset)
                stat = jute.ZnodeStat._make(jute.stat_struct.unpack_from(answer, offset))
                offset += jute.stat_struct.size
                found.append(_Found(value or b"", stat.ephemeralOwner))
            elif header.type == jute.GetChildren.type:
                (count,) = jute.int_struct.unpack_from(answer, offset)
                offset += jute.int_struct.size
                names = []
                for _ in range(count):
                    name, offset = jute.read_string(answer, offset)
                    names.append(name)
                found.append(names)
            else:
                (error,) = jute.int_struct.unpack_from(answer, offset)
                offset += jute.int_struct.size
                refusal = refusals.EXCEPTIONS[error]()
                unread = _Found(b"", 0) if each.type == jute.GetData.type else refusal
                found.append(None if isinstance(refusal, refusals.NoNodeError) else unread)
        return found


class _Handler(SequentialThreadingHandler):  # type: ignore[misc]
    """Gives kazoo one thread in the place of three, and us its sockets.

    It never runs, in kazoo's sense: so kazoo calls back from the thread that receives, where nothing of ours waits.
    """

    def __init__(self, tls: ssl.SSLContext | None, patience: float) -> None:
        super().__init__()
        self.problems: dict[str, str] = {}  # by server: why it was left
        self.untrusted = False  # one of them for its certificate, which no waiting mends
        self.patience, self._tls = patience, tls
        self._thread: threading.Thread | None = None
        self._pair: Sequence[socket.socket] = ()
        self._socket: socket.socket | None = None
        self.is_cut = False

    def start(self) -> None:
        """Nothing: the threads that kazoo would start here are not needed."""

    stop = start

    def spawn(self, func: Any, *args: Any, **kwargs: Any) -> threading.Thread:
        self._thread = threading.Thread(target=func, args=args, kwargs=kwargs, name="onehop-zookeeper", daemon=True)
        self._thread.start()
        return self._thread

    def create_socket_pair(self) -> Sequence[socket.socket]:
        self._pair = super().create_socket_pair()
        return self._pair

    def create_connection(self, address: tuple[str, int], hostname: str, **_: Any) -> socket.socket:
        plain = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        connecting = self._tls.wrap_socket(plain, server_hostname=hostname) if self._tls else plain
        self._socket = connecting
        try:
            if self.is_cut:
                raise ConnectionAbortedError("closed")
            connecting.settimeout(self.patience)
            connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connecting.connect(address)
        except OSError as error:
            hung_up = isinstance(error, ConnectionResetError | BrokenPipeError)
            self.untrusted |= isinstance(error, ssl.SSLCertVerificationError)
            self.problems[f"{hostname}:{address[1]}"] = _HUNG_UP if hung_up else error.strerror or str(error)
            connecting.close()
            raise
        return connecting

    def select(
        self, reads: Sequence[Any], writes: Sequence[Any], _errors: Sequence[Any], timeout: float | None = None
    ) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
        """Wait until some of these are ready; kazoo's own way opens an epoll each time."""
        new = getattr(select, "poll", None)
        if new is None:  # a patch for green threads took it away
            return select.select(reads, writes, [], timeout)
        poll = new()
        for each in reads:
            poll.register(each, select.POLLIN)
        for each in writes:
            poll.register(each, select.POLLOUT)
        ready = {descriptor for descriptor, _ in poll.poll(None if timeout is None else timeout * 1000)}
        return (
            [each for each in reads if each.fileno() in ready],
            [each for each in writes if each.fileno() in ready],
            [],
        )

    def join(self, patience: float) -> bool:
        """Wait for the end of the thread, and say whether it came."""
        if self._thread is not None:
            self._thread.join(patience)
        return self._thread is None or not self._thread.is_alive()

    def cut(self) -> None:
        """End the connection without a word to the server: whoever reads or writes there is told so, and no other is
        made."""
        self.is_cut = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it may be gone already
                self._socket.shutdown(socket.SHUT_RDWR)

    def abandon(self) -> None:
        """In a forked child: close what it inherited, which says nothing to anybody."""
        for each in (self._socket, *self._pair):
            if each is not None:
                each.close()


class _Receiver(ConnectionHandler):  # type: ignore[misc]
    """kazoo's thread, for one connection, which hands over the events that kazoo does not know."""

    def __init__(self, client: _Connection) -> None:
        super().__init__(client, client._conn_retry.copy(), logger=client.logger)
        self._limit = min(_SESSION_PATIENCE, client.handler.patience) if client._session_id else client.handler.patience

    def zk_loop(self) -> None:
        try:
            super().zk_loop()
        finally:
            self.client.ended()

    def _expand_client_hosts(self) -> Any:
        found = super()._expand_client_hosts()
        for host, port in self.client.hosts:
            if host not in [each[0] for each in found]:
                self.handler.problems[f"{host}:{port}"] = "there is no address of that name"
        return found

    def _connect(self, host: str, hostip: str, port: int) -> Any:
        if self.client.settled.is_set():
            raise refusals.ConnectionDropped("one connection only")
        self.client.server = f"{host}:{port}"
        try:
            times = super()._connect(host, hostip, port)
        except (refusals.SessionExpiredError, KazooTimeoutError) as error:
            if not self.client._session_id:
                raise
            # A server that starts may take a connection and never answer: so the session is asked for twice.
            self._socket.close()
            if isinstance(error, refusals.SessionExpiredError):
                self.client._reset_session()
            self._limit = self.handler.patience
            times = super()._connect(host, hostip, port)
        self.client.established(times[0] * 1.5 / 1000)  # kazoo reads for two thirds of the session's length
        return times

    def _invoke(self, timeout: float, request: Any, xid: int | None = None) -> Any:
        try:
            return super()._invoke(min(timeout, self._limit), request, xid)
        except (refusals.ConnectionDropped, KazooTimeoutError) as error:
            if isinstance(error, refusals.ConnectionDropped) and not self.handler.is_cut:
                self.handler.problems[self.client.server] = _HUNG_UP
            raise

    def _read_watch_event(self, answer: bytes, offset: int) -> None:
        event, _ = jute.Watch.deserialize(answer, offset)
        self.client.feed.heard(event.path, event.type == CREATED_EVENT)


class _Connection(KazooClient):  # type: ignore[misc]
    """One connection, with a session that was there before or with a new one."""

    def __init__(self, place: Place, lease: float, session: tuple[int, bytes] | None, feed: _Feed) -> None:
        self.place, self.feed = place, feed
        self.server, self.lease = "", 0.0
        self.session: tuple[int, bytes] = session or (0, b"")
        self.settled = threading.Event()
        servers = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in place.servers]
        super().__init__(
            hosts=servers,
            timeout=lease,
            client_id=session,
            handler=_Handler(_tls(place), CONNECT_PATIENCE / len(servers)),
            auth_data=[("digest", f"{place.user}:{place.password}")] if place.user else None,
            connection_retry=KazooRetry(max_tries=1),
            logger=_kazoo_log,
        )
        self._acl = [*CREATOR_ALL_ACL, *READ_ACL_UNSAFE] if place.user else OPEN_ACL_UNSAFE
        self._connection = _Receiver(self)
        feed.connection = self

    def open(self) -> None:
        """Connect to one of the servers.

        Raises:
            StoreAway: none of them answers.
            RegistryError: one is not to be trusted.
        """
        self.start_async()
        self.settled.wait(CONNECT_PATIENCE)
        if not self.lease:
            self.handler.cut()
            self.end()
            servers = [f"{host}:{port}" for host, port in self.place.servers]
            tried = [f"{each} ({self.handler.problems.get(each.lower(), 'does not answer')})" for each in servers]
            if self.handler.untrusted:
                trusted = self.place.options.get("ca", "the system's certificates")
                raise RegistryError(f"no ZooKeeper that {trusted} vouches for answers at {', '.join(tried)}")
            raise StoreAway(f"no ZooKeeper answers at {', '.join(tried)}")

    def established(self, lease: float) -> None:
        self.lease, self.session = lease, self.client_id
        self.settled.set()

    def ended(self) -> None:
        """The thread is at its end."""
        self.settled.set()
        self.feed.end(f"the connection to ZooKeeper at {self.server} broke, or it did not answer in time")

    def end(self) -> None:
        """End the session, unless the connection is cut; in bounded time, and nothing is told any more."""
        self.feed.silence()
        self.stop()
        if self.handler.join(0):
            self.close()

    def _safe_close(self) -> None:
        if not self.handler.join(CLOSE_PATIENCE):
            self.handler.cut()
            self.handler.join(0.1)

    def ask(self, request: Any) -> Any:
        """Send ``request``; its answer comes later, in what this returns."""
        answer = self.handler.async_result()
        self._call(request, answer)
        return answer

    def read(self, paths: Sequence[str]) -> list[_Found | None]:
        return self._read([jute.GetData(each, None) for each in paths])

    def children(self, paths: Sequence[str]) -> list[list[str]]:
        found = self._read([jute.GetChildren(each, None) for each in paths])
        for each in found:
            if isinstance(each, refusals.KazooException):
                raise each
        return [each or [] for each in found]

    def change(self, changes: Sequence[Any]) -> bool:
        """Make the changes, in this order; False where some were not made, since somebody was faster."""
        made = True
        for at in range(0, len(changes), _AT_ONCE):
            for each in [self.ask(each) for each in changes[at : at + _AT_ONCE]]:
                made = _is_made(each) and made
        return made

    def creation(self, path: str, value: bytes | None) -> Any:
        ephemeral = 1
        return jute.Create(path, value, self._acl, ephemeral)

    def container(self, path: str) -> Any:
        return _Container(path, b"", self._acl, _Container.FLAG)

    def _read(self, reads: Sequence[Any]) -> list[Any]:
        found = []
        for at in range(0, len(reads), _AT_ONCE):
            found += self.ask(_Reads(reads[at : at + _AT_ONCE])).get(timeout=PATIENCE)
        return found


def _tls(place: Place) -> ssl.SSLContext | None:
    options = place.options
    if not (options.get("ca") or options.get("cert")) and options.get("tls", "0") == "0":
        return None
    try:
        context = ssl.create_default_context(cafile=options.get("ca") or None)
        if options.get("cert"):
            context.load_cert_chain(options["cert"], options.get("key") or None)
    except OSError as error:
        files = ", ".join(f"{name}={options[name]}" for name in ("ca", "cert", "key") if name in options)
        raise RegistryError(f"registry {place.shown!r}: its {files} cannot be used: {error}") from error
    return context


@dataclass
class _Snapshot:
    """What stands below ``top``, while it is read."""

    top: str
    missing: set[str]
    found: dict[tuple[str, str], bytes] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)


class _Feed:
    """Reads what changed, and tells it.

    There is one read at a time. What changes meanwhile is read after it, all together: so for each node the later is
    told after the earlier, and a storm of changes is met with fewer and larger reads.
    """

    def __init__(self, top: str, tell: Tell) -> None:
        self.connection: _Connection
        self._top = top
        self._tell: Tell | None = tell
        self._lock = threading.Lock()
        self._changed: dict[str, None] = {}  # to be read, in order
        self._reading = False
        self._withdrawn: set[str] = set()
        self._snapshot: _Snapshot | None = None

    def heard(self, path: str, created: bool) -> None:
        """A watch named ``path``."""
        key = self._key(path)
        if key is None:
            return
        if key[1].startswith(MARK):
            if created:
                self._withdrawn.add(path.replace(f"/{MARK}", "/"))
            return
        with self._lock:
            self._changed[path] = None
        self._read()

    def snapshot(self, top: str, paths: Sequence[str]) -> Mapping[tuple[str, str], bytes]:
        """Read ``paths``, which stand below ``top``; and whatever changes there meanwhile."""
        snapshot = _Snapshot(f"{top}/", set(paths))
        with self._lock:
            self._snapshot = snapshot
            self._changed |= dict.fromkeys(paths)
        self._read()
        left = len(paths) + 1
        while snapshot.missing and len(snapshot.missing) < left and not snapshot.done.is_set():
            left = len(snapshot.missing)
            snapshot.done.wait(PATIENCE)
        with self._lock:
            self._snapshot = None
            if snapshot.missing or self._tell is None:
                raise refusals.ConnectionLoss(f"{len(snapshot.missing)} of {len(paths)} records did not come")
            return snapshot.found

    def end(self, why: str) -> None:
        """Nothing more comes."""
        with self._lock:
            if self._snapshot is not None:
                self._snapshot.done.set()
            if self._tell is not None and self.connection.lease:
                self._tell.broke(why)
            self._tell = None

    def silence(self) -> None:
        with self._lock:
            self._tell = None

    def _key(self, path: str) -> tuple[str, str] | None:
        parts = path.removeprefix(f"{self._top}/").split("/")
        return (_name(parts[0]), _name(parts[1])) if len(parts) == 2 else None

    def _read(self) -> None:
        with self._lock:
            if self._reading or not self._changed:
                return
            self._reading = True
            paths = list(self._changed)[:_AT_ONCE]
            for each in paths:
                del self._changed[each]
        reads = _Reads([jute.GetData(each, None) for each in paths])
        self.connection.ask(reads).rawlink(partial(self._answered, paths))

    def _answered(self, paths: Sequence[str], answer: Any) -> None:
        if not answer.successful():
            self.connection.handler.cut()  # what was not told now never would be
            return
        with self._lock:
            for path, found in zip(paths, answer.value, strict=True):
                self._take(path, found)
            self._reading = False
        self._read()

    def _take(self, path: str, found: _Found | None) -> None:
        key = self._key(path)
        withdrawn = path in self._withdrawn
        self._withdrawn.discard(path)
        if key is None:
            return
        snapshot = self._snapshot
        if snapshot is not None and path.startswith(snapshot.top):
            snapshot.found.pop(key, None)
            if found is not None:
                snapshot.found[key] = found.value
            snapshot.missing.discard(path)
            if not snapshot.missing:
                snapshot.done.set()
        elif self._tell is not None:
            self._tell.changed(*key, found.value if found else None, withdrawn=withdrawn and found is None)


def _name(part: str) -> str:
    try:
        return unquoted(part)
    except ValueError:  # none of ours
        return part
