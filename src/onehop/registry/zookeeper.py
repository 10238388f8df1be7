"""The registry on ZooKeeper, from 3.6 on: a session is the lease, and a record is an ephemeral node.

``/<prefix>/<realm>/services/<service>/<node id>``. One persistent recursive watch on each followed service names what
changed, and that alone is read. Whoever takes its own record away creates and deletes, in the same transaction, a node
of the record's name with a mark before it: nobody ever finds that node, but who watches is told of it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kazoo import exceptions as refusals
from kazoo.handlers.threading import KazooTimeoutError
from kazoo.protocol import serialization as jute

from onehop.errors import RegistryError, SettingsError
from onehop.registry.leased import LeasedRegistry, LeaseLost, Store, StoreAway, Tell, quoted, unquoted
from onehop.registry.urls import Place, parse
from onehop.registry.zookeeper_connection import AT_ONCE, PATIENCE, Connection, Found, Reads, Watch
from onehop.settings import Settings

PORT = 2181
MARK = "!"  # before a node id: its own withdrawal; no quoted name has it
LIMIT = 1_000_000  # bytes of one value: ZooKeeper hangs up on a request of more than a mebibyte
_ATTEMPTS = 10  # at putting keys, while parents vanish or an old session ends

_log = logging.getLogger(__name__)


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


class ZooKeeperStore(Store):
    """One node's session, as :class:`Store` promises it."""

    def __init__(self, settings: Settings, place: Place) -> None:
        self._place, self._lease = place, settings.lease
        prefix = [quoted(each) for each in place.options.get("prefix", "onehop").split("/") if each]
        self._top = "/".join(["", *prefix, quoted(settings.realm or "default"), "services"])
        self._connection: Connection | None = None
        self._feed: _Feed  # of that connection
        self._session: tuple[int, bytes] | None = None
        self._sessions: set[int] = set()  # that we ever had
        self._ours: set[str] = set()  # what we may have put and not taken back, in whichever of them
        self._kept: dict[str, bytes] = {}  # what we have put over this connection
        self._warned = False

    def connect(self, tell: Tell) -> None:
        self._drop(leave_session=True)
        self._kept = {}
        self._feed = _Feed(self._top, tell)
        connection = Connection(self._place, self._lease, self._session, self._feed.heard, self._feed.end)
        self._connection = self._feed.connection = connection
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
            watched, synced = connection.ask(Watch(top)), connection.ask(jute.Sync(top))
            watched.get(timeout=PATIENCE)
            synced.get(timeout=PATIENCE)
            tops = [top] if service else [f"{top}/{each}" for each in connection.children([top])[0]]
            lists = zip(tops, connection.children(tops), strict=True)
            return self._feed.snapshot(top, [f"{above}/{each}" for above, names in lists for each in names])

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
                    self._kept = wanted
                    return
        raise StoreAway(f"somebody else changes our keys below {self._top} of {self._place.shown} at the same time")

    def withdraw(self) -> None:
        if self._ours:
            self.publish("", {})

    def keep(self) -> None:
        connection = self._connected()
        with self._explained():
            for (path, value), found in zip(self._kept.items(), connection.read(list(self._kept)), strict=True):
                if found is None or found.session != connection.session[0] or found.value != value:
                    raise LeaseLost(f"{path} is no longer ours, or not as we put it, at {connection.server}")

    def close(self) -> None:
        self._drop(leave_session=False)
        self._session = None

    def forget(self) -> None:
        connection, self._connection, self._session = self._connection, None, None
        self._ours.clear()
        if connection is not None:
            connection.handler.abandon()

    def _drop(self, *, leave_session: bool) -> None:
        """End the connection, if there is one; nothing that it brings is told any more."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        self._feed.silence()
        if leave_session:
            connection.handler.cut()
        connection.end()

    def _connected(self) -> Connection:
        if self._connection is None or not self._connection.connected:
            raise StoreAway(f"there is no connection to ZooKeeper at {self._place.shown}")
        return self._connection

    def _steps(self, path: str, value: bytes | None, found: Found | None) -> list[Any]:
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
        self.connection: Connection
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
            if self._tell is not None:
                self._tell.broke(why)
            self._tell = None

    def silence(self) -> None:
        with self._lock:
            self._tell = None

    def _key(self, path: str) -> tuple[str, str] | None:
        parts = path.removeprefix(f"{self._top}/").split("/")
        return (unquoted(parts[0]), unquoted(parts[1])) if len(parts) == 2 else None

    def _read(self) -> None:
        with self._lock:
            if self._reading or not self._changed:
                return
            self._reading = True
            paths = list(self._changed)[:AT_ONCE]
            for each in paths:
                del self._changed[each]
        reads = Reads([jute.GetData(each, None) for each in paths])
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

    def _take(self, path: str, found: Found | None) -> None:
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
