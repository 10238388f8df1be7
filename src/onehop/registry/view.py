"""What is known from a registry on a database: whose word is believed, for how long, and what is left on the disk.

A held record of a dead node costs a refused connection; a living node's record that is wrongly dropped is an outage.
So what a node says itself is believed at once, and what a database merely no longer has is doubted first.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import msgspec

from onehop.interfaces import Record
from onehop.settings import Settings

RECORD_LIMIT = 1024 * 1024  # bytes of one value
HOLD = 2.5  # leases for which a doubted record is held: time for everybody to put himself back
SETTLE = 0.05  # leases until a doubt is decided: those who vanish together are told of one by one
CACHE_PERIOD = 5.0  # seconds between two writings of one service's cache, at least

_log = logging.getLogger(__name__)

Key = tuple[str, str]  # service, node id


class _Doubt(NamedTuple):
    since: float
    held: bool  # decided: it is held; otherwise it is to be decided yet


class View:
    """Records by service and node, merged to one record a node. Decides from its arguments alone: ``now`` is a time
    in seconds of any steady clock.

    Who withdrew is gone at once. Who is merely missing (his lease expired, or an answer lacks him) is gone

    - at once, or rather ``SETTLE`` leases later, if the connection has been continuous for ``HOLD`` leases, and those
      doubted within a lease are fewer than half of all: a single death;
    - otherwise ``HOLD`` leases later, if he has not come back by then: the database was restarted, or wiped, or cut
      off, and the living need time to return. While it is away nobody goes. The time begins anew when it comes back,
      unless it was away for less than a lease: then a connection that breaks again and again would keep the dead.

    Args:
        lease: the length of a lease, in seconds.

    Attributes:
        versions: how often what is known of a service has changed; the empty name stands for all services.
    """

    def __init__(self, lease: float) -> None:
        self.versions: dict[str, int] = {}
        self._lease = lease
        self._skipped: dict[Key, str] = {}
        self._continuous_since: float | None = None
        self._away_at: float | None = None  # since when nothing was heard of it
        self._hold_since = 0.0
        # By node: a record for each of its services, the newest last. A tuple, since most nodes have one.
        self._nodes: dict[str, tuple[Record, ...]] = {}
        self._merged: dict[str, Record] = {}  # of nodes with several services
        self._doubts: dict[Key, _Doubt] = {}
        self._doubted_lately: dict[Key, float] = {}
        self._sorted: tuple[Record, ...] | None = ()

    # --- what is told ---

    def connected(self, now: float) -> None:
        """From now on the registry tells of all changes, but what happened before may have been missed."""
        if self._away_at is None or now - self._away_at >= self._lease:
            self._hold_since = now  # everybody gets his time anew
        self._continuous_since = now

    def away(self, now: float) -> None:
        """The registry tells nothing any more: who is missing now may have been put back unseen."""
        self._away_at = now if self._away_at is None else self._away_at
        self._continuous_since = None
        self._doubts = {key: doubt._replace(held=True) for key, doubt in self._doubts.items()}

    def put(self, service: str, node: str, value: bytes, now: float) -> None:
        """This is the key's value. What is no record is skipped, with one warning, as if the key were missing."""
        found = _decoded(service, node, value)
        key = service, node
        if isinstance(found, Record):
            self._skipped.pop(key, None)
            self._keep(service, node, found)
            return
        if key not in self._skipped:
            _log.warning(
                "the registry's value of %s/%s is not a node's record and is skipped: %s", service, node, found
            )
        self._skipped[key] = found
        self._doubt(key, now)

    def gone(self, service: str, node: str, now: float, *, withdrawn: bool = False) -> None:
        """The key is no more; ``withdrawn``: its node took it away."""
        self._skipped.pop((service, node), None)
        if withdrawn:
            self._drop((service, node))
        else:
            self._doubt((service, node), now)

    def answered(self, service: str, values: Mapping[Key, bytes], now: float) -> None:
        """These are all values of ``service`` (of all services where it is empty)."""
        self._away_at = None  # and not before: who connects and hears nothing is away still
        for key, value in values.items():
            self.put(*key, value, now)
        missing = [key for key in self._keys(service) if key not in values]
        missing += [key for key in self._skipped if service in ("", key[0]) and key not in values]
        for key in missing:
            self.gone(*key, now)

    def remember(self, records: Iterable[Record]) -> None:
        """Take these, known from before, as long as the registry has said nothing else; each has one service."""
        for record in records:
            for service in record.services:
                if self._known(service, record.node) is None:
                    self._keep(service, record.node, _shared(record, record.node))

    # --- what is known ---

    @property
    def skipped(self) -> dict[str, str]:
        """Keys whose values are not records, as ``service/node id``, with what is wrong with each."""
        return {f"{service}/{node}": problem for (service, node), problem in self._skipped.items()}

    def records(self) -> tuple[Record, ...]:
        """All known nodes, by node id. What has not changed is the same object as before; so is the whole."""
        if self._sorted is None:
            self._sorted = tuple(self._record(node) for node in sorted(self._nodes))
        return self._sorted

    def single(self, service: str) -> list[Record]:
        """The records as they were told, of one service each; of all services where it is empty."""
        known = [self._known(name, node) for name, node in sorted(self._keys(service))]
        return [record for record in known if record is not None]

    def settle(self, now: float) -> None:
        """Decide what is doubted. To be called after every change, and again when :meth:`due` says."""
        since = self._continuous_since
        if since is None:
            return
        open_ = [key for key, doubt in self._doubts.items() if not doubt.held]
        # Reckoned from the doubts, not from now: this may be called late, and they belong together all the same.
        lately = min((self._doubts[key].since for key in open_), default=now) - self._lease
        self._doubted_lately = {key: at for key, at in self._doubted_lately.items() if at > lately}
        if any(now >= self._deadline(self._doubts[key], since) for key in open_):
            mass = self._is_mass()
            for key in open_:
                doubt = self._doubts[key]
                if mass or doubt.since - since < HOLD * self._lease:
                    self._doubts[key] = doubt._replace(held=True)
                else:
                    self._drop(key)
        for key, doubt in list(self._doubts.items()):
            if doubt.held and now >= self._deadline(doubt, since):
                self._drop(key)

    def due(self) -> float | None:
        """When :meth:`settle` has something to do next, if nothing else is told; None for never."""
        if self._continuous_since is None:
            return None
        return min((self._deadline(each, self._continuous_since) for each in self._doubts.values()), default=None)

    # --- inside ---

    def _deadline(self, doubt: _Doubt, since: float) -> float:
        if not doubt.held:
            return doubt.since + SETTLE * self._lease
        return max(doubt.since, self._hold_since) + HOLD * self._lease

    def _is_mass(self) -> bool:
        known = sum(map(len, self._nodes.values()))
        known += sum(self._known(*key) is None for key in self._doubted_lately)
        return 2 * len(self._doubted_lately) >= known

    def _keys(self, service: str) -> Iterator[Key]:
        for node, records in self._nodes.items():
            for record in records:
                for each in record.services:
                    if service in ("", each):
                        yield each, node

    def _known(self, service: str, node: str) -> Record | None:
        return next((record for record in self._nodes.get(node, ()) if service in record.services), None)

    def _others(self, service: str, node: str) -> tuple[Record, ...]:
        return tuple(record for record in self._nodes.get(node, ()) if service not in record.services)

    def _keep(self, service: str, node: str, record: Record) -> None:
        self._doubts.pop((service, node), None)
        if self._known(service, node) != record:
            self._nodes[record.node] = (*self._others(service, node), record)
            self._changed(service, node)

    def _doubt(self, key: Key, now: float) -> None:
        service, node = key
        if self._known(service, node) is not None and key not in self._doubts:
            self._doubts[key] = _Doubt(now, held=self._continuous_since is None)
            self._doubted_lately[key] = now

    def _drop(self, key: Key) -> None:
        service, node = key
        self._doubts.pop(key, None)
        if self._known(service, node) is not None:
            others = self._others(service, node)
            if others:
                self._nodes[node] = others
            else:
                del self._nodes[node]
            self._changed(service, node)

    def _changed(self, service: str, node: str) -> None:
        self._merged.pop(node, None)
        self._sorted = None
        for each in (service, ""):
            self.versions[each] = self.versions.get(each, 0) + 1

    def _record(self, node: str) -> Record:
        *_, newest = services = self._nodes[node]
        if len(services) == 1:
            return newest
        if node not in self._merged:
            offered = {name: names for each in services for name, names in each.services.items()}
            idempotent = {name: names for each in services for name, names in each.idempotent.items()}
            self._merged[node] = msgspec.structs.replace(newest, services=offered, idempotent=idempotent)
        return self._merged[node]


def node_problem(node: str) -> str:
    """What is wrong with a node id, or nothing."""
    if len(node) == 32 and not node.strip("0123456789abcdef"):
        return ""
    return f"node is {node!r}; it must be 32 lower-case hexadecimal digits"


def _decoded(service: str, node: str, value: bytes) -> Record | str:
    """The record that ``value`` holds, or what is wrong with it."""
    if len(value) > RECORD_LIMIT:
        return f"it has {len(value)} bytes, and a record has at most {RECORD_LIMIT}"
    try:
        record = msgspec.json.decode(value, type=Record)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        return f"it does not hold a record: {error}"
    if record.node != node:
        return f"it holds the record of node {record.node!r}"
    if problem := node_problem(node):
        return f"its {problem}"
    if list(record.services) != [service]:
        return f"it holds the services {sorted(record.services)}, and must hold {service!r} alone"
    return _shared(record, node)


_NONE: dict[str, tuple[str, ...]] = {}  # held by all who have nothing; nobody changes a record


def _shared(record: Record, node: str) -> Record:
    """``record`` with what thousands have in common held once, and its node id as the key that is held anyway."""
    intern = sys.intern
    return msgspec.structs.replace(
        record,
        node=node,
        host=intern(record.host),
        version=intern(record.version),
        zone=intern(record.zone),
        state=intern(record.state),
        services={intern(name): tuple(map(intern, each)) for name, each in record.services.items()},
        idempotent={intern(name): tuple(map(intern, each)) for name, each in record.idempotent.items()} or _NONE,
    )


# --- the disk ---


def cache_directory(settings: Settings) -> Path | None:
    """Where views are kept: the directory that is set, else the first of three that this user can use; None: nowhere.

    They are ``/var/cache/onehop``, ``$XDG_CACHE_HOME/onehop`` and ``~/.cache/onehop``. Nothing is made here.
    """
    if settings.cache_directory == "none":
        return None
    if settings.cache_directory:
        return Path(settings.cache_directory).absolute()
    system = Path("/var/cache/onehop")
    if system.is_dir():
        usable = system.stat().st_uid == os.geteuid()
    else:
        usable = os.access(system.parent, os.W_OK | os.X_OK, effective_ids=True)
    if usable:
        return system
    user = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(user):
        return Path(user, "onehop")
    home = os.path.expanduser("~")
    return Path(home, ".cache", "onehop") if os.path.isabs(home) else None


class Cache:
    """The last view of one registry and realm, a file for each service. What goes wrong is warned of once.

    Args:
        settings: ``cache_directory`` and ``realm``.
        registry: the registry's URL, without its password.
    """

    def __init__(self, settings: Settings, registry: str) -> None:
        self._directory = cache_directory(settings)
        self._place = f"{registry}\n{settings.realm or 'default'}\n"
        self._warned: set[str] = set()

    def path(self, service: str) -> Path | None:
        """The file of one service; the empty name stands for all."""
        if self._directory is None:
            return None
        digest = hashlib.sha256((self._place + service).encode("utf-8", "surrogatepass")).hexdigest()[:24]
        shown = quote(service, safe="", errors="replace")[:80] or "all"
        return self._directory / f"{shown}-{digest}.json"

    def load(self, service: str) -> list[Record]:
        """What was written last; nothing where there is none, or it cannot be used."""
        path = self.path(service)
        if path is None:
            return []
        try:
            self._check_owner(path)
            records = msgspec.json.decode(path.read_bytes(), type=list[Record])
            wrong = next((each for each in records if node_problem(each.node) or len(each.services) != 1), None)
            if wrong is not None:
                raise ValueError(f"it holds what is no record of one service: {wrong}")
        except (FileNotFoundError, NotADirectoryError):
            return []
        except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
            self._warn("read", path, error)
            return []
        return records

    def save(self, service: str, records: list[Record]) -> None:
        """Write these, unless they stand there already: the processes of a host share the files."""
        path = self.path(service)
        if path is None:
            return
        data = msgspec.json.encode(records)
        try:
            self._prepare(path.parent)
            if path.exists() and path.read_bytes() == data:
                return
            _write(path, data)
        except OSError as error:
            self._warn("written", path, error)

    def _prepare(self, directory: Path) -> None:
        if not directory.is_dir():
            directory.parent.mkdir(parents=True, exist_ok=True)
            directory.mkdir(mode=0o700, exist_ok=True)
        self._check_owner(directory)

    def _check_owner(self, path: Path) -> None:
        found = path.stat(follow_symlinks=False)
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(None, "others could have written to it: it must belong to this user alone")

    def _warn(self, done: str, path: Path, error: Exception) -> None:
        if done not in self._warned:
            self._warned.add(done)
            problem = getattr(error, "strerror", None) or error
            _log.warning("the registry's cache %s cannot be %s, it goes on without: %s", path, done, problem)


def _write(path: Path, data: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name[:40]}.", dir=path.parent)  # mode 0600
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        os.rename(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
