"""One connection to ZooKeeper: what kazoo does for it, and what kazoo does not know.

kazoo carries a session over one connection only: with the first trouble the connection ends, and another, made with the
same session, goes on. So when to try again is decided in one place, which is not here.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kazoo import exceptions as refusals
from kazoo.client import KazooClient
from kazoo.handlers.threading import KazooTimeoutError, SequentialThreadingHandler
from kazoo.protocol import serialization as jute
from kazoo.protocol.connection import CREATED_EVENT, ConnectionHandler
from kazoo.retry import KazooRetry
from kazoo.security import CREATOR_ALL_ACL, OPEN_ACL_UNSAFE, READ_ACL_UNSAFE

from onehop.errors import RegistryError
from onehop.registry.leased import StoreAway
from onehop.registry.threads import start
from onehop.registry.urls import Place

PATIENCE = 10.0  # seconds until an answer is given up; a server that hangs is noticed before, by its session
CONNECT_PATIENCE = 4.0  # seconds for which all servers together are waited for
CLOSE_PATIENCE = 1.0  # seconds until the server has confirmed the end of the session
AT_ONCE = 128  # reads in one request, and requests under way: with more than some 250 kazoo waits for itself
_SESSION_PATIENCE = 0.5  # seconds until a session that was there before is asked for once more
_HUNG_UP = (
    "it hangs up: it is starting, or speaks TLS only, or has maxClientCnxns connections from here (60, if not set)"
)

# kazoo tells of each attempt that fails; that the registry is away is said by the registry, once.
_log = logging.getLogger("onehop.registry.zookeeper.kazoo")
_log.setLevel(logging.ERROR)


@dataclass(frozen=True, slots=True)
class Found:
    """What a read found: the content of a node, and the session that it goes with."""

    value: bytes
    session: int


@dataclass(frozen=True)
class Watch:
    """The request for a persistent recursive watch, which kazoo does not know."""

    path: str
    type: ClassVar[int] = 106

    def serialize(self) -> bytes:
        recursive = 1
        return bytes(jute.write_string(self.path) + jute.int_struct.pack(recursive))

    def deserialize(self, answer: bytes, offset: int) -> bool:
        return True


class Container(jute.Create):  # type: ignore[misc]
    """The request for a node that vanishes when it has been empty for a while, which kazoo does not know."""

    type = 19
    FLAG = 4


@dataclass(frozen=True)
class Reads:
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
                found.append(Found(value or b"", stat.ephemeralOwner))
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
                unread = Found(b"", 0) if each.type == jute.GetData.type else refusal
                found.append(None if isinstance(refusal, refusals.NoNodeError) else unread)
        return found


class _Handler(SequentialThreadingHandler):  # type: ignore[misc]
    """Gives kazoo one thread in the place of three, and us its sockets.

    It never runs, in kazoo's sense: so kazoo calls back from the thread that receives, where nothing of ours waits.
    """

    def __init__(self, tls: ssl.SSLContext | None, patience: float) -> None:
        super().__init__()
        self.host = ""  # of the server that is next
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
        start(self._thread)
        return self._thread

    def create_socket_pair(self) -> Sequence[socket.socket]:
        self._pair = super().create_socket_pair()
        return self._pair

    def create_connection(self, address: tuple[str, int], **_: Any) -> socket.socket:
        plain = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        connecting = self._tls.wrap_socket(plain, server_hostname=self.host) if self._tls else plain
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
            self.problems[f"{self.host}:{address[1]}"] = _HUNG_UP if hung_up else error.strerror or str(error)
            connecting.close()
            raise
        return connecting

    def select(
        self, reads: Sequence[Any], writes: Sequence[Any], _: Sequence[Any], timeout: float | None = None
    ) -> Any:
        """Wait until some of these are ready. kazoo's own way opens an epoll each time, and does not see what TLS has
        read already."""
        if self._tls and (read := [each for each in reads if isinstance(each, ssl.SSLSocket) and each.pending()]):
            return read, [], []
        new = getattr(select, "poll", None)
        if new is None:  # a patch for green threads took it away
            return select.select(reads, writes, [], timeout)
        poll = new()
        for sockets, event in ((reads, select.POLLIN), (writes, select.POLLOUT)):
            for each in sockets:
                poll.register(each, event)
        ready = {descriptor for descriptor, _ in poll.poll(None if timeout is None else timeout * 1000)}
        return *([each for each in sockets if each.fileno() in ready] for sockets in (reads, writes)), []

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

    def __init__(self, client: Connection) -> None:
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
        self.handler.host, self.client.server = host, f"{host}:{port}"
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
        self.client.heard(event.path, event.type == CREATED_EVENT)


class Connection(KazooClient):  # type: ignore[misc]
    """One connection, with a session that was there before or with a new one.

    Args:
        lease: the length of the session to ask for, in seconds.
        session: its id and password; None for a new one.
        heard: told, in the thread that receives, the path of each node that changed below what is watched, and whether
            it was created. It returns at once.
        broke: told so when a connection that was established ends, in whichever way, and why.

    Attributes:
        server: ``host:port`` of the server that it is with.
        lease: the length that the server gave the session, in seconds; 0 until it is established.
        session: as the argument; the new one's, once it is established.
    """

    def __init__(
        self,
        place: Place,
        lease: float,
        session: tuple[int, bytes] | None,
        heard: Callable[[str, bool], None],
        broke: Callable[[str], None],
    ) -> None:
        self.place, self.heard, self._broke = place, heard, broke
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
            logger=_log,
        )
        self._acl = [*CREATOR_ALL_ACL, *READ_ACL_UNSAFE] if place.user else OPEN_ACL_UNSAFE
        self._connection = _Receiver(self)

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
        if self.lease:
            self._broke(f"the connection to ZooKeeper at {self.server} broke, or it did not answer in time")

    def end(self) -> None:
        """End the session, unless the connection is cut; in bounded time."""
        self.stop()
        if self.handler.join(0):
            self.close()

    def _safe_close(self) -> None:
        if not self.handler.join(CLOSE_PATIENCE):
            self.handler.cut()
            self.handler.join(0.1)

    def ask(self, request: Any) -> Any:
        """Send ``request``; its answer comes later, in what this returns.

        All methods from here on raise what kazoo raises.
        """
        answer = self.handler.async_result()
        self._call(request, answer)
        return answer

    def read(self, paths: Sequence[str]) -> list[Found | None]:
        """What stands at each of ``paths``."""
        return self._read([jute.GetData(each, None) for each in paths])

    def children(self, paths: Sequence[str]) -> list[list[str]]:
        """The names of what stands right below each of ``paths``; none where there is no such node."""
        found = self._read([jute.GetChildren(each, None) for each in paths])
        for each in found:
            if isinstance(each, refusals.KazooException):
                raise each
        return [each or [] for each in found]

    def change(self, changes: Sequence[Any]) -> bool:
        """Make the changes, in this order; False where some were not made, since somebody was faster."""
        made = True
        for at in range(0, len(changes), AT_ONCE):
            for each in [self.ask(each) for each in changes[at : at + AT_ONCE]]:
                made = _is_made(each) and made
        return made

    def creation(self, path: str, value: bytes | None) -> Any:
        """The change that makes an ephemeral node."""
        ephemeral = 1
        return jute.Create(path, value, self._acl, ephemeral)

    def container(self, path: str) -> Any:
        """The change that makes a container."""
        return Container(path, b"", self._acl, Container.FLAG)

    def _read(self, reads: Sequence[Any]) -> list[Any]:
        found = []
        for at in range(0, len(reads), AT_ONCE):
            found += self.ask(Reads(reads[at : at + AT_ONCE])).get(timeout=PATIENCE)
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
