"""The registry on etcd, through the JSON gateway of its v3 API: ``etcd://[user:password@]host[:2379][,host...]/``.

One connection carries requests, another the one stream of changes of all services that are followed. Both go to the
same server, so that a server which hangs is noticed by the request that it does not answer. A key is
``<prefix>/<realm>/services/<service>/<node id>``; an empty value is a node's own farewell, which the end of a lease
never leaves.
"""

from __future__ import annotations

import math
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from http.client import HTTPException
from typing import Any, TypeVar

import msgspec
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError
from urllib3.response import HTTPResponse

from onehop.errors import RegistryError, SettingsError
from onehop.registry.leased import LeasedRegistry, LeaseLost, Store, StoreAway, Tell, quoted, unquoted
from onehop.registry.threads import start_thread
from onehop.registry.urls import Place, parse
from onehop.settings import Settings

PORT = 2379
OPTIONS = ("prefix", "tls", "ca", "cert", "key")
CONNECT_TIMEOUT, ANSWER_TIMEOUT = 1.0, 2.0  # seconds until the next server is tried
PAGE = 500  # keys of one answer: the gateway of older releases passes none on above 4 MiB
OPERATIONS = 100  # of one transaction; etcd allows 128

# When an answer begins, Go's HTTP server throws away what it has not read yet of the question, unless it is at least
# this much. The answer to the first of several watches begins early; that many spaces after the last keep them all.
PADDING = 256 * 1024

# What etcd says, with the code of gRPC that comes with it: what no waiting would mend, and what is so at every server.
_UNKNOWN, _NOT_FOUND = 2, 5
_LASTING = (3, 7, 12, 16)  # invalid argument, permission denied, unimplemented, unauthenticated
_SAME_EVERYWHERE = (8, 11)  # resource exhausted, out of range
_TOKEN_ENDED = ("invalid auth token", "revision of auth store is old")
_ADVICE = {
    "invalid user ID or password": "correct the user and the password in the registry's URL",
    "user name is empty": "write a user into the registry's URL: etcd://user:password@...",
    "authentication is not enabled": "take the user out of the registry's URL, or run: etcdctl auth enable",
    "permission denied": "grant the user's role readwrite on all keys that begin with {root} (etcdctl role "
    "grant-permission --prefix)",
    "database space exceeded": "compact and defragment it, then run: etcdctl alarm disarm",
}


def open_registry(settings: Settings, url: str) -> LeasedRegistry:
    """The registry at ``url``; nothing is touched before its first use.

    Options of the URL: ``prefix`` of all keys (``/onehop``); ``tls=1``, and with it ``ca``, ``cert`` and ``key``
    (paths of PEM files; without ``ca`` the system's authorities are trusted).

    Raises:
        SettingsError: the URL is wrong.
    """
    place = parse(url, PORT, OPTIONS)
    _check(place)
    return LeasedRegistry(settings, place, lambda: EtcdStore(settings, place))


def _check(place: Place) -> None:
    options = place.options
    if options.get("tls", "0") not in ("0", "1"):
        raise SettingsError(f"registry is {place.shown!r}: tls is {options['tls']!r}; it must be 0 or 1")
    for each, other in (("ca", "tls"), ("cert", "tls"), ("key", "cert")):
        if each in options and options.get(other, "0") == "0":
            raise SettingsError(f"registry is {place.shown!r}: {each} has no meaning without {other}")


class _ServerAway(StoreAway):
    """This server cannot serve us now; another may."""


class _ServerUnfit(RegistryError):
    """This server will never serve us as it is; another may."""


class _TokenEnded(RegistryError):
    """The token was forgotten or is outdated; a new one can be had."""


class _Header(msgspec.Struct):
    cluster_id: str = ""
    revision: int = 0


class _KeyValue(msgspec.Struct):
    key: bytes
    value: bytes = b""
    mod_revision: int = 0


class _Event(msgspec.Struct):
    kv: _KeyValue
    type: str = "PUT"


class _Answer(msgspec.Struct):
    """What the gateway answers: each kind has some of these. What has its default is left out; bytes are base64."""

    header: _Header = msgspec.field(default_factory=_Header)
    kvs: list[_KeyValue] = []
    more: bool = False
    succeeded: bool = False
    lease: int = msgspec.field(default=0, name="ID")
    ttl: int = msgspec.field(default=0, name="TTL")
    token: str = ""
    watch_id: int = 0
    events: list[_Event] = []
    created: bool = False
    canceled: bool = False
    cancel_reason: str = ""
    fragment: bool = False
    result: _Answer | None = None  # one of several answers to one request
    error: Any = None  # instead of a result


_decode = msgspec.json.Decoder(_Answer, strict=False).decode  # etcd writes 64-bit numbers as strings
_encode = msgspec.json.encode


class EtcdStore(Store):
    """One node's connection to one etcd cluster, as :class:`Store` promises it.

    Args:
        settings: ``realm`` is a part of each key; ``lease`` is rounded up to whole seconds.
        place: the servers and the options that :func:`open_registry` names.
    """

    def __init__(self, settings: Settings, place: Place) -> None:
        self._place = place
        self._lease_length = settings.lease
        prefix = place.options.get("prefix", "/onehop").rstrip("/")
        self._root = f"{prefix}/{quoted(settings.realm or 'default')}/services/"
        self._server = random.randrange(len(place.servers))  # many nodes spread over them
        # Where there is no other server, one that is overloaded is not asked anew all the time.
        alone = len(place.servers) == 1
        self._answer_timeout = max(ANSWER_TIMEOUT, settings.lease * 2 / 3) if alone else ANSWER_TIMEOUT
        self._context: ssl.SSLContext | None = None
        self._connection: HTTPConnection | None = None  # for requests
        self._stream: _Stream | None = None
        self._tell: Tell | None = None
        self._token = self._cluster = ""
        self._next: dict[str, int] = {}  # by service followed: the revision from which changes are still to be told
        self._farewells: set[bytes] = set()  # keys that were told as withdrawn, and are not deleted yet
        self._lease = 0
        self._seen = 0  # the last revision at which all our keys were seen
        self._keys: dict[bytes, bytes | None] = {}  # that may be ours, with what was put there; None: not known

    # --- what a store promises ---

    def connect(self, tell: Tell) -> None:
        self._end_stream()
        self._tell, self._cluster = tell, ""
        self._next.clear()
        self._farewells.clear()
        # A server without a majority does not answer this, nor does any to a user who may not read.
        self._ask("kv/range", {"key": self._root.encode(), "range_end": _end(self._root), "count_only": True})

    def follow(self, service: str) -> Mapping[tuple[str, str], bytes]:
        self._end_stream()  # before: what it told after this answer's moment would not be told again
        found, revision = self._read(self._prefix(service))
        if revision + 1 < max(self._next.values(), default=0):
            raise StoreAway(f"{self._where} went back to revision {revision}: it lost its data")
        self._next[service] = revision + 1
        return {self._owner(each.key): each.value for each in found if each.value}

    def followed(self) -> None:
        if self._next and self._stream is None:
            self._open_stream()

    def publish(self, node: str, values: Mapping[str, bytes]) -> None:
        ours = {f"{self._prefix(service)}{quoted(node)}".encode(): value for service, value in values.items()}
        gone = sorted(self._keys.keys() - ours.keys())
        new = {key: value for key, value in ours.items() if self._keys.get(key) != value}
        if not new and not gone:
            self.keep()  # after a mere change of servers nobody writes, and nobody is told of it
            return
        if not self._lease:
            self._lease = self._ask("lease/grant", {"TTL": math.ceil(self._lease_length)}).lease
        self._keys.update(dict.fromkeys(new))  # before: where the answer is lost, they may be there
        self._put({**dict.fromkeys(gone, b""), **new})
        self._write([{"request_delete_range": {"key": each}} for each in gone])
        self._keys = dict(ours)

    def withdraw(self) -> None:
        if self._lease:
            try:
                self._put(dict.fromkeys(sorted(self._keys), b""))
                self._ask("lease/revoke", {"ID": self._lease})  # which deletes the keys
            except LeaseLost:
                pass  # and so are the keys
        self._lease, self._keys = 0, {}

    def keep(self) -> None:
        revision = 0
        if self._lease:
            answer = self._ask("lease/keepalive", {"ID": self._lease})
            if not answer.ttl:  # so it is said of a lease that is not known
                raise self._lost(f"{self._where} does not know our lease any more")
            revision = answer.header.revision
            if revision == self._seen:
                return  # nobody wrote anything since our keys were seen
        # Without keys too: a server that hangs is noticed by this while we only follow.
        for some in _slices(sorted(self._keys)) or [[]]:
            compare = [{"key": each, "target": "LEASE", "lease": self._lease} for each in some]
            if not self._ask("kv/txn", {"compare": compare}).succeeded:
                raise self._lost(f"a key of ours is gone from {self._where}")
        self._seen = revision

    def close(self) -> None:
        self._end_stream()
        try:
            if self._lease and self._connection is not None:  # it answered last time
                self._ask("lease/revoke", {"ID": self._lease})
        except (StoreAway, LeaseLost, RegistryError):
            pass  # it ends by itself soon
        self._lease, self._keys = 0, {}
        self._disconnect()

    def forget(self) -> None:
        if self._stream is not None:
            self._stream.forget()
        if self._connection is not None and self._connection.sock is not None:
            _let_go(self._connection.sock)
        self._lease, self._keys = 0, {}
        self._connection = self._stream = None

    # --- keys ---

    def _prefix(self, service: str) -> str:
        return f"{self._root}{quoted(service)}/" if service else self._root

    def _owner(self, key: bytes) -> tuple[str, str]:
        service, _, node = key[len(self._root) :].decode(errors="replace").partition("/")
        return unquoted(service), unquoted(node)

    def _read(self, prefix: str) -> tuple[list[_KeyValue], int]:
        """Everything under ``prefix`` at one revision, and that revision."""
        found: list[_KeyValue] = []
        start, revision, more = prefix.encode(), 0, True
        while more:
            asked = {"key": start, "range_end": _end(prefix), "limit": PAGE, "revision": revision}
            answer = self._ask("kv/range", asked)
            found += answer.kvs
            revision, more = revision or answer.header.revision, answer.more
            start = found[-1].key + b"\0" if found else start
        return found, revision

    def _put(self, values: Mapping[bytes, bytes]) -> None:
        self._write(
            [{"request_put": {"key": key, "value": value, "lease": self._lease}} for key, value in values.items()]
        )

    def _write(self, operations: Sequence[Mapping[str, object]]) -> None:
        for some in _slices(operations):
            self._ask("kv/txn", {"success": some})

    def _lost(self, why: str) -> LeaseLost:
        self._lease, self._keys = 0, dict.fromkeys(self._keys)
        return LeaseLost(why)

    # --- requests ---

    @property
    def _where(self) -> str:
        host, port = self._place.servers[self._server]
        return f"etcd at {host}:{port}"

    def _ask(self, path: str, request: Mapping[str, object]) -> _Answer:
        """The answer of the first server that can serve us, beginning with the one that did."""
        errors: list[_ServerAway | _ServerUnfit] = []
        for _ in self._place.servers:
            try:
                return self._ask_server(path, request)
            except (_ServerAway, _ServerUnfit) as error:
                errors.append(error)
                self._leave(str(error))
        if isinstance(errors[0], RegistryError) and all(isinstance(each, RegistryError) for each in errors):
            raise errors[0]
        raise StoreAway("; ".join(map(str, errors)))

    def _leave(self, why: str) -> None:
        """Speak to the next server from now on."""
        self._disconnect()
        if self._stream is not None:
            self._stream.cut(why)
        self._server = (self._server + 1) % len(self._place.servers)

    def _ask_server(self, path: str, request: Mapping[str, object]) -> _Answer:
        try:
            if self._place.user and not self._token:
                self._authenticate()
            return self._send(path, request)
        except _TokenEnded:
            self._authenticate()
            return self._send(path, request)

    def _authenticate(self) -> None:
        self._token = ""
        self._token = self._send(
            "auth/authenticate", {"name": self._place.user, "password": self._place.password}
        ).token

    def _send(self, path: str, request: Mapping[str, object]) -> _Answer:
        if self._connection is None or not self._connection.is_connected:
            self._disconnect()
            self._connection = self._dial()
        answer = self._understood(self._post(self._connection, path, _encode(request)).data)
        self._check_cluster(answer)
        return answer

    def _dial(self) -> HTTPConnection:
        host, port = self._place.servers[self._server]
        connection = HTTPConnection(host, port, timeout=CONNECT_TIMEOUT)
        if self._place.options.get("tls") == "1":
            self._context = self._context or self._tls()
            connection = HTTPSConnection(host, port, timeout=CONNECT_TIMEOUT, ssl_context=self._context)
        try:
            connection.connect()
        except (OSError, HTTPError) as error:
            connection.close()
            raise self._failure(error) from error
        connection.timeout = self._answer_timeout
        return connection

    def _tls(self) -> ssl.SSLContext:
        options = self._place.options
        try:
            context = ssl.create_default_context(cafile=options.get("ca"))
            if "cert" in options:
                context.load_cert_chain(options["cert"], options.get("key"))
        except OSError as error:
            files = ", ".join(options[each] for each in ("ca", "cert", "key") if each in options)
            raise RegistryError(f"{files} cannot be used for TLS with {self._where}: {error}") from error
        return context

    def _post(self, connection: HTTPConnection, path: str, body: bytes, *, streamed: bool = False) -> HTTPResponse:
        # A server that lost sight of its cluster's leader says so at once.
        headers = {"Content-Type": "application/json", "Grpc-Metadata-Hasleader": "true"}
        if self._token:
            headers["Authorization"] = self._token
        try:
            connection.request("POST", f"/v3/{path}", body, headers, preload_content=not streamed)
            response = connection.getresponse()
            if response.status == 200:
                return response
            said = response.data
        except (OSError, HTTPError, HTTPException) as error:
            connection.close()
            raise self._failure(error) from error
        if streamed:
            connection.close()
        raise self._refusal(response.status, said)

    def _understood(self, data: bytes) -> _Answer:
        try:
            answer = _decode(data)
        except msgspec.MsgspecError as error:
            raise _ServerUnfit(f"{self._where} answers {data[:80]!r}: this is not etcd 3.4 or later") from error
        if answer.error is not None:
            raise self._refusal(200, data)
        return answer.result or answer

    def _check_cluster(self, answer: _Answer) -> None:
        self._cluster = self._cluster or answer.header.cluster_id
        if answer.header.cluster_id != self._cluster:
            raise _ServerAway(f"{self._where} belongs to another cluster than before")

    def _failure(self, error: BaseException) -> Exception:
        """What it means that a connection failed."""
        error = error.__cause__ or error  # of urllib3's own: what the system said
        if isinstance(error, TimeoutError):
            return _ServerAway(f"{self._where} does not answer in time")
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            return _ServerUnfit(f"{self._where} and we do not agree on TLS: {error}; see tls, ca, cert, key in its URL")
        hung_up = isinstance(error, ConnectionResetError | BrokenPipeError | ssl.SSLEOFError)
        hint = "; are tls, cert and key in the registry's URL as it wants them?" if hung_up else ""
        return _ServerAway(f"{self._where}: {error}{hint}")

    def _refusal(self, status: int, data: bytes) -> Exception:
        """What it means that a server answered with an error."""
        try:
            said = msgspec.json.decode(data, type=dict[str, Any])
        except msgspec.MsgspecError:
            text = f"{self._where} answers {status} {data[:80].decode(errors='replace').strip()!r}"
            if status >= 500:
                return _ServerAway(text)
            return _ServerUnfit(f"{text}; it must be etcd 3.4 or later with its JSON gateway, and tls=1 if it has TLS")
        said = said["error"] if isinstance(said.get("error"), dict) else said
        code, text = said.get("grpc_code", said.get("code", _UNKNOWN)), str(said.get("message"))
        advice = next((f"; {_ADVICE[each]}" for each in _ADVICE if each in text), "").format(root=self._root)
        sentence = f"{self._where}: {text.removeprefix('etcdserver: ')}{advice}"
        if code == _NOT_FOUND:
            return self._lost(sentence)
        if any(each in text for each in _TOKEN_ENDED):
            return _TokenEnded(sentence)
        if code in _LASTING or "not enabled" in text:
            return RegistryError(sentence)
        return StoreAway(sentence) if code in _SAME_EVERYWHERE else _ServerAway(sentence)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # --- the stream of changes ---

    def _open_stream(self) -> None:
        """Let the server tell all that is followed, each from where it was told last."""
        watched = [""] if "" in self._next else sorted(self._next)
        requests = [
            {
                "key": self._prefix(each).encode(),
                "range_end": _end(self._prefix(each)),
                "start_revision": self._next[each],
                "watch_id": number,
                "progress_notify": True,  # so that a quiet service's next revision is not compacted away
                "fragment": True,
            }
            for number, each in enumerate(watched, 1)
        ]
        body = b"\n".join(_encode({"create_request": each}) for each in requests)
        if len(requests) > 1:
            body += b" " * PADDING
        assert self._tell is not None
        take, stream = partial(self._take, self._tell, watched), None
        try:
            connection = self._dial()
            wire: socket.socket = connection.sock  # the connection lets go of it when an answer without end begins
            response = self._post(connection, "watch", body, streamed=True)
            stream = _Stream(self._where, wire, response, take, self._tell.broke)
            stream.begin(len(watched), self._answer_timeout, self._lease_length)
        except Exception as error:
            if stream is not None:
                stream.end()
            self._leave(str(error))
            if isinstance(error, StoreAway | RegistryError):
                raise
            raise self._failure(error) from error
        self._stream = stream

    def _end_stream(self) -> None:
        if self._stream is not None:
            self._stream.end()
            self._stream = None

    def _take(self, tell: Tell, watched: Sequence[str], line: bytes) -> bool:
        """Tell what a line says; returns whether it says that a watch has begun."""
        answer = self._understood(line)
        self._check_cluster(answer)
        if answer.canceled:
            raise StoreAway(f"{self._where} does not tell of changes any more: {answer.cancel_reason or 'compacted'}")
        service = watched[answer.watch_id - 1]
        if answer.header.revision + 1 < self._next[service]:
            raise StoreAway(f"{self._where} went back to revision {answer.header.revision}: it lost its data")
        for each in answer.events:
            self._tell_event(tell, each)
        if not answer.created and not answer.fragment:
            last = answer.events[-1].kv.mod_revision if answer.events else answer.header.revision
            self._next[service] = max(self._next[service], last + 1)
        return answer.created

    def _tell_event(self, tell: Tell, event: _Event) -> None:
        key, value = event.kv.key, event.kv.value
        service, node = self._owner(key)
        if event.kv.mod_revision < self._next.get(service, 0):
            return  # read since, by itself, while all services are followed
        told, farewell = key in self._farewells, event.type == "PUT" and not value
        self._farewells.discard(key)
        if farewell:
            self._farewells.add(key)
        if value or not told:
            tell.changed(service, node, value or None, withdrawn=farewell)


class _Stream:
    """One answer that does not end, taken line by line.

    Args:
        where: it comes from, for people.
        wire: the socket under it.
        take: takes a line; returns whether it is the first of those that answer one question.
        broke: told why it came to an end, unless by :meth:`end`.
    """

    def __init__(
        self,
        where: str,
        wire: socket.socket,
        response: HTTPResponse,
        take: Callable[[bytes], bool],
        broke: Callable[[str], None],
    ) -> None:
        self.wire = wire
        self._where, self._response, self._take, self._broke = where, response, take, broke
        self._lines = _lines(response)
        self._why = ""
        self._wanted = True
        self._thread: threading.Thread | None = None

    def begin(self, questions: int, within: float, patience: float) -> None:
        """Wait until all questions are being answered, and go on in a thread.

        Args:
            questions: how many there are.
            within: seconds for all their first answers.
            patience: seconds after which a dead network has broken it.

        Raises:
            OSError, urllib3.exceptions.HTTPError: not all are answered.
        """
        deadline = time.monotonic() + within
        while questions:
            if time.monotonic() > deadline:
                raise TimeoutError
            questions -= self._take(next(self._lines))
        probe = max(1, int(patience / 3))
        for option, value in ((socket.TCP_KEEPIDLE, probe), (socket.TCP_KEEPINTVL, probe), (socket.TCP_KEEPCNT, 2)):
            self.wire.setsockopt(socket.IPPROTO_TCP, option, value)
        self.wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.wire.settimeout(None)
        self._thread = start_thread("onehop-etcd", self._run)

    def cut(self, why: str) -> None:
        """Break it."""
        self._why = self._why or why
        try:
            # Not the method of a TLS socket, which would take its state away under the reading thread.
            socket.socket.shutdown(self.wire, socket.SHUT_RDWR)
        except OSError:
            pass  # the other side was quicker

    def end(self) -> None:
        """End it: when this returns nothing more is taken, and nobody hears why."""
        self._wanted = False
        self.cut("ended")
        if self._thread is not None:
            self._thread.join()
        self._close()

    def forget(self) -> None:
        """In a forked child, where its thread does not exist."""
        self._wanted = False
        _let_go(self.wire)

    def _run(self) -> None:
        try:
            while self._wanted:
                self._take(next(self._lines))
        except Exception as error:
            self._why = self._why or str(error)
        self._close()
        if self._wanted:
            self._broke(f"no more changes come from {self._where}: {self._why}")

    def _close(self) -> None:
        self._response.close()
        self.wire.close()


def _lines(response: HTTPResponse) -> Iterator[bytes]:
    """The lines of an answer; their end is an error."""
    parts: list[bytes] = []
    for chunk in response.stream():
        first, *others = chunk.split(b"\n")
        parts.append(first)
        for each in others:
            if line := b"".join(parts):
                yield line
            parts = [each]
    raise ConnectionResetError("it ended the stream")


def _let_go(wire: socket.socket) -> None:
    """Close it as a bare descriptor: TLS says no goodbye, and no lock is taken that a thread of the parent held."""
    socket.close(wire.detach())


def _end(prefix: str) -> bytes:
    """The first key behind all that begin with ``prefix``."""
    last = prefix.encode()
    return last[:-1] + bytes([last[-1] + 1])  # its last character is a slash


_Item = TypeVar("_Item")


def _slices(items: Sequence[_Item]) -> list[Sequence[_Item]]:
    return [items[start : start + OPERATIONS] for start in range(0, len(items), OPERATIONS)]
