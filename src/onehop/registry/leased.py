"""Registries on a database with leases (ZooKeeper, etcd, Redis): what they have in common, and what each has to do.

A node has one lease, and under it one key for each service that it offers: ``<realm>/services/<service>/<node id>``.
The value is the node's record with that service alone. So who uses a service follows that service and nothing else.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol
from urllib.parse import quote, unquote

import msgspec

from onehop.errors import RegistryError
from onehop.interfaces import Deliver, Record, Registry
from onehop.registry.threads import start_thread
from onehop.registry.urls import Place
from onehop.registry.view import CACHE_PERIOD, RECORD_LIMIT, Cache, View, node_problem
from onehop.settings import Settings

FIRST_DELAY, LONGEST_DELAY = 0.1, 5.0  # seconds before a registry that is away is tried again, at most; full jitter
RETURN_DELAY = 1.0  # seconds, at least, over which those come back who lost their connections together
PATIENCE = 2.0  # seconds for which announce and withdraw wait for a registry that does not answer
CLOSE_PATIENCE = 1.0  # seconds for which close waits
_CACHE_PATIENCE = 0.5  # seconds without an answer until the disk is asked
_FIRST_SAVE = 0.5  # seconds from the first answer until it is written to the disk
_REST, _LONGEST_REST = 4.0, 1.0  # after a delivery: times as long as it took, seconds; many who come are seen together

_log = logging.getLogger(__name__)


def quoted(text: str) -> str:
    """``text`` as one part of a key: without ``/`` and ``:``, and never beginning with a dot. Not for empty text."""
    part = quote(text, safe="", errors="surrogatepass")
    return "%2E" + part[1:] if part.startswith(".") else part


def unquoted(part: str) -> str:
    """The text that :func:`quoted` made ``part`` of; what stands for no text, and so is none of ours, as it is."""
    try:
        return unquote(part, errors="surrogatepass") if "%" in part else part
    except UnicodeDecodeError:
        return part


class StoreAway(OSError):
    """The database does not answer, or not in time. It may be back later; the sentence says what happened where."""


class LeaseLost(Exception):
    """The database does not know our lease any more: it expired, or the data was lost. Everything is to be put anew."""


class Tell(Protocol):
    """What a store tells of changes, from a thread of its own; both return at once and never raise."""

    def changed(self, service: str, node: str, value: bytes | None, *, withdrawn: bool = False) -> None:
        """One key's latest state, in the order in which the database made the changes.

        Args:
            value: its content; None where the key is gone.
            withdrawn: whether the node itself took it away, and not the end of its lease or somebody else.
        """

    def broke(self, why: str) -> None:
        """Nothing more is told: the connection is gone, or changes were missed. :meth:`Store.connect` follows."""


class Store(Protocol):
    """One node's connection to one database. Each method may wait for ``patience`` seconds; one thread calls them all.

    The realm is a part of each key. Service and realm may hold any character: they are quoted. A key or a value that
    is none of ours is told as it is; who reads it says what is wrong.

    Raises of all methods:
        StoreAway: the database cannot be reached at this moment.
        RegistryError: it can never work like this (a wrong password, no permission); says what to change.
    """

    def connect(self, tell: Tell) -> None:
        """Begin anew, whatever was before: connect to any of the servers. A lease is taken when it is first needed.

        ``tell`` hears of what happens from now on, and nothing of what an earlier connection still brings.
        """

    def follow(self, service: str) -> Mapping[tuple[str, str], bytes]:
        """All values of ``service`` now, by (service, node id); their later changes are told.

        Without a gap: what happens after the moment of this answer is told, and nothing from before it. ``""`` stands
        for all services. Following what is followed already reads it once more.

        Telling may begin as late as with :meth:`followed`, so that many services cost no more than one.
        """

    def followed(self) -> None:
        """All that is to be followed now is, and has to be told of; called again and again, mostly for nothing."""
        return

    def publish(self, node: str, values: Mapping[str, bytes]) -> None:
        """Put our keys, under our lease: the value of each service that ``node`` offers.

        All other keys of ours are withdrawn: of services that are not named, and of the node id that we had before.

        What another session of ours left (an earlier lease, not yet expired) must not take them away again.

        Raises:
            LeaseLost: it ended meanwhile; :meth:`keep` makes another.
        """

    def withdraw(self) -> None:
        """Take our keys away; those who follow hear that we did it ourselves."""

    def keep(self) -> None:
        """Renew our lease, and see that our keys are there. Called three times in the length of a lease.

        Called too where there is no lease; a store may then see whether the connection still lives, or do nothing.

        Raises:
            LeaseLost: it is gone, or a key is; a new lease is taken at the next :meth:`publish`.
        """

    def close(self) -> None:
        """End the lease, if the database can be reached, and give everything back. Never raises."""

    def forget(self) -> None:
        """In a forked child: let go of everything without a message to anybody."""


class LeasedRegistry(Registry):
    """The registry that a store makes: :class:`Store` says what a database has to do for it.

    One thread (``onehop-registry``) speaks to the database, from the first announcement or wish on. Changes are
    delivered at once, and many that come together are delivered together. Who is missing is held for a while, as
    :class:`onehop.registry.view.View` says; what was known last is on the disk for a start without the database.

    Args:
        settings: ``lease``, ``realm`` and ``cache_directory``.
        place: where the database is.
        open_store: makes the store; called once, when it is first needed, in the thread that uses it.
    """

    def __init__(self, settings: Settings, place: Place, open_store: Callable[[], Store]) -> None:
        self.addresses: Sequence[tuple[str, int]] = place.servers
        self._settings, self._place, self._open_store = settings, place, open_store
        self._closed = False

    @property
    def skipped(self) -> dict[str, str]:
        """Keys whose values are not records, as ``service/node id``, with what is wrong with each."""
        keeper = self._kept()
        return {} if keeper is None else keeper.skipped()

    def announce(self, record: Record) -> None:
        if problem := node_problem(record.node):
            raise RegistryError(f"a record's {problem}")
        values = {service: _value(record, service) for service in record.services}
        self._keeper().offer(_Offer(record.node, values))

    def withdraw(self) -> None:
        keeper = self._kept()
        if keeper is not None:
            keeper.offer(None)

    def watch(self, deliver: Deliver) -> None:
        self._keeper().deliver_to(deliver)

    def want(self, service: str, timeout: float) -> bool:
        return not self._closed and self._keeper().want(service, timeout)

    def refresh(self) -> None:
        """Nothing: every change is told at once."""

    def close(self) -> None:
        self._closed = True
        keeper = self._kept()
        if keeper is not None:
            keeper.close()

    def forget(self) -> None:
        self._closed = True
        keeper = self.__dict__.pop("_the_keeper", None)
        if keeper is not None:
            keeper.forget()

    def _kept(self) -> _Keeper | None:
        keeper: _Keeper | None = self.__dict__.get("_the_keeper")
        return keeper

    def _keeper(self) -> _Keeper:
        if self._closed:
            raise RegistryError("this registry was closed, or belongs to the parent of this process; open another")
        _in_use.add(self)
        keeper = self._kept()
        if keeper is None:
            # Made at first use, so that its locks are green ones where threads are; one of two threads wins.
            keeper = _Keeper(self._settings, self._place, self._open_store)
            keeper = self.__dict__.setdefault("_the_keeper", keeper)
        return keeper


class _Offer(NamedTuple):
    node: str
    values: Mapping[str, bytes]


class _Change(NamedTuple):
    service: str
    node: str
    value: bytes | None
    withdrawn: bool


class _Told(Tell):
    """What one connection tells. Once another has taken its place nobody listens to it any more."""

    def __init__(self, keeper: _Keeper) -> None:
        self._keeper = keeper
        self.changes: deque[_Change] = deque()
        self.broken = ""

    def changed(self, service: str, node: str, value: bytes | None, *, withdrawn: bool = False) -> None:
        self.changes.append(_Change(service, node, value, withdrawn))
        if len(self.changes) == 1:  # otherwise it was woken for the first, and takes all
            self._keeper.wake()

    def broke(self, why: str) -> None:
        self.broken = self.broken or why or "the connection ended"
        self._keeper.wake()


class _Keeper:
    """The thread of one registry, and what it shares with those who ask: all under the lock of ``_state``.

    The thread alone uses the store. A view is delivered by the thread, or by whoever cannot wait for it.
    """

    def __init__(self, settings: Settings, place: Place, open_store: Callable[[], Store]) -> None:
        self.view = View(settings.lease)
        self._lease, self._name, self._open_store = settings.lease, place.shown, open_store
        self._cache = Cache(settings, place.shown)
        self._process = os.getpid()
        self._state = threading.Condition(threading.Lock())
        self._thread: threading.Thread | None = None
        self._closing = self._forgotten = False

        self._store: Store | None = None
        self._told: _Told | None = None  # of the connection that holds; None: there is none
        self._connected_at = self._connect_at = 0.0
        self._delay = FIRST_DELAY
        self._away_since: float | None = None
        self._away_why = ""
        self._refusal: RegistryError | None = None  # why the last attempt failed, where no waiting mends it
        self._keep_at = 0.0

        self._offer: _Offer | None = None
        self._asked = self._done = 0  # how many announcements and withdrawals were asked for, and are done
        self._to_publish = False
        self._warned_of_offer = False

        self._wanted: set[str] = set()
        self._followed: set[str] = set()  # over this connection
        self._answered: set[str] = set()  # over any
        self._recalled: dict[str, bool] = {}  # services looked for on the disk: whether anything was there
        self._delivered: set[str] = set()  # of those answered or found on the disk

        self._deliver: Deliver | None = None
        self._delivering = threading.Lock()
        self._deliverer: int | None = None
        self._view: Sequence[Record] | None = None
        self._rest_until = 0.0
        self._saved: dict[str, int] = {}
        self._save_at: float | None = None

    # --- for those who ask ---

    def offer(self, offer: _Offer | None) -> None:
        """Publish this, or take away what was published."""
        with self._state:
            if offer is None and self._offer is None:
                return
            before, self._offer = self._offer, offer
            self._asked += 1
            asked, self._to_publish = self._asked, True
            patience = PATIENCE
            if self._refusal is not None:
                self._refusal, self._connect_at = None, 0.0  # it may have been mended: ask again
            elif self._away_since is not None:
                patience -= time.monotonic() - self._away_since
            self._start()
            if self._is_own_thread():
                return
            self._state.wait_for(lambda: self._done >= asked or self._refused() or self._closing, patience)
            if self._done >= asked or self._closing or offer is None:
                return
            if (refusal := self._refused()) is not None:
                if self._asked == asked:
                    self._offer, self._to_publish = before, before is not None
                raise RegistryError(str(refusal)) from refusal
            if not self._warned_of_offer:
                self._warned_of_offer = True
                why = f"is away ({self._away_why})" if self._away_why else f"has not answered in {PATIENCE:g} s"
                _log.warning("node %s is not announced yet, the registry %s %s", offer.node, self._name, why)

    def want(self, service: str, timeout: float) -> bool:
        """See :meth:`onehop.interfaces.Registry.want`."""
        deadline = time.monotonic() + timeout
        with self._state:
            self._wanted.add(service)
            self._start()
            if self._is_own_thread():
                return self._is_delivered(service)
            patience = min(timeout / 2, _CACHE_PATIENCE)
            self._state.wait_for(lambda: self._is_delivered(service) or self._away_since or self._closing, patience)
            if patience > 0 or self._away_since is not None:  # who does not wait at all may have his answer in a moment
                self._recall(service)
            found = self._recalled.get(service) and not self._is_delivered(service)
        if found:  # by ourselves: the thread may be waiting for the registry
            self.deliver(patience=max(0.0, deadline - time.monotonic()))
        with self._state:
            patience = max(0.0, deadline - time.monotonic())
            self._state.wait_for(lambda: self._is_delivered(service) or self._closing, patience)
            return self._is_delivered(service)

    def skipped(self) -> dict[str, str]:
        with self._state:
            return self.view.skipped

    def deliver_to(self, deliver: Deliver) -> None:
        """Deliver to this from now on: first what is known at this moment."""
        if self._deliverer == threading.get_ident():  # called by deliver: the delivery under way goes on with it
            self._deliver, self._view = deliver, None
            return
        with self._delivering:
            self._deliver, self._view = deliver, None
        self.deliver()

    def close(self) -> None:
        """End the thread, which takes away what was published; not waited for without end."""
        with self._state:
            if self._closing:
                return
            self._closing, self._deliver = True, None
            self._state.notify_all()
        deadline = time.monotonic() + CLOSE_PATIENCE
        if self._is_own_thread():
            return
        if self._thread is not None:
            self._thread.join(CLOSE_PATIENCE)
        # A delivery by another thread may be under way; not waited for without end: it may wait for whoever closes.
        if self._delivering.acquire(timeout=max(0.01, deadline - time.monotonic())):
            self._delivering.release()

    def forget(self) -> None:
        """Let go of everything without a message to anybody."""
        self._forgotten, self._deliver = True, None
        if self._process == os.getpid():
            self.wake()
        elif self._store is not None:  # no lock is taken: the thread that held it does not exist here
            self._store.forget()

    def wake(self) -> None:
        with self._state:
            self._state.notify_all()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = start_thread("onehop-registry", self._run)
        self._state.notify_all()

    def _refused(self) -> RegistryError | None:
        return self._refusal

    def _is_own_thread(self) -> bool:
        """Whether whoever asks must not wait: the thread itself, or a deliver on whose end the thread waits."""
        me = threading.current_thread()
        return me is self._thread or self._deliverer == threading.get_ident()

    # --- the thread ---

    def _run(self) -> None:
        while not (self._closing or self._forgotten):
            try:
                self._work()
                with self._state:
                    self._apply()
                self.deliver(rested=True)
                self._save()
            except LeaseLost:
                self._to_publish = self._to_publish or self._offer is not None
            except StoreAway as error:
                self._lost(str(error))
            except RegistryError as error:
                self._lost(str(error), error)
            except Exception as error:
                _log.exception("the registry %s is begun anew after a defect", self._name)
                self._lost(f"{type(error).__name__}: {error}")
            self._wait()
        self._end()

    def _work(self) -> None:
        """Whatever there is to do with the database now."""
        if self._told is None:
            if time.monotonic() < self._connect_at:
                return
            self._connect()
        if self._told is not None and self._told.broken:
            raise StoreAway(self._told.broken)
        try:
            self._publish()
        finally:
            self._follow()  # others can be read even where we cannot write: no memory left, or no permission
        self._keep()
        self._is_well()

    def _connect(self) -> None:
        if self._store is None:
            self._store = self._open_store()
        told = _Told(self)
        self._store.connect(told)
        now = time.monotonic()
        with self._state:
            self._told = told
            self._followed.clear()
            self._to_publish = self._to_publish or self._offer is not None
            self._connected_at, self._keep_at = now, now + self._third()
            self.view.connected(now)

    def _publish(self) -> None:
        with self._state:
            offer, asked, wanted = self._offer, self._asked, self._to_publish
            self._to_publish = False
        if not wanted or self._store is None:
            return
        try:
            if offer is None:
                self._store.withdraw()
            else:
                self._put(self._store, offer)
        except BaseException:
            self._to_publish = True
            raise
        with self._state:
            self._done, self._warned_of_offer = asked, False
            self._state.notify_all()

    def _put(self, store: Store, offer: _Offer) -> None:
        try:
            store.publish(*offer)
        except LeaseLost:  # known to be so, it takes another at once; twice in turn, and it would go on for ever
            try:
                store.publish(*offer)
            except LeaseLost as error:
                raise StoreAway(f"our lease is lost as soon as it is taken ({error})") from error

    def _follow(self) -> None:
        while self._store is not None and (service := self._next_to_follow()) is not None:
            values = self._store.follow(service)
            now = time.monotonic()
            with self._state:
                self.view.answered(service, values, now)
                self._followed.add(service)
                self._answered.add(service)
            self._keep()
        if self._store is not None:
            self._store.followed()

    def _next_to_follow(self) -> str | None:
        wanted = {""} if "" in self._wanted else self._wanted
        return min(wanted - self._followed, default=None)

    def _keep(self) -> None:
        now = time.monotonic()
        if self._store is not None and now >= self._keep_at:
            self._keep_at = now + self._third()
            self._store.keep()

    def _third(self) -> float:
        return self._lease / 3 * random.uniform(0.8, 1.0)

    def _is_well(self) -> None:
        with self._state:
            since, self._away_since = self._away_since, None
            self._away_why, self._refusal = "", None
            if time.monotonic() - self._connected_at > LONGEST_DELAY:  # not where it breaks again and again
                self._delay = FIRST_DELAY
        if since is not None:
            _log.info("the registry %s is back after %.1f s", self._name, time.monotonic() - since)

    def _lost(self, why: str, refusal: RegistryError | None = None) -> None:
        """The connection does not hold, or there was none to be had: keep what is known, and try again later."""
        now = time.monotonic()
        with self._state:
            spread = min(RETURN_DELAY, self._lease) if self._told is not None else 0.0
            new = self._away_since is None or (refusal is not None and str(refusal) != self._away_why)
            self._rest_until = 0.0
            self._apply()  # what was told before the end counts: else nobody would go where each try ends early
            self._told = None
            self.view.away(now)
            self._away_since = self._away_since or now
            self._away_why, self._refusal = why, refusal
            self._connect_at = now + random.uniform(0.0, max(spread, self._delay))
            # Not longer than a lease: others hold us for no more than a few of them.
            self._delay = min(2 * self._delay, LONGEST_DELAY, self._lease)
            if new:
                _log.warning("the registry %s is away, what is known is kept: %s", self._name, why)
            for service in self._wanted:
                self._recall(service)
            self._state.notify_all()

    def _apply(self) -> None:
        """Take in what was told, unless a delivery was just now."""
        now = time.monotonic()
        told = self._told
        if told is not None and now >= self._rest_until:
            for _ in range(len(told.changes)):
                service, node, value, withdrawn = told.changes.popleft()
                if value is None:
                    self.view.gone(service, node, now, withdrawn=withdrawn)
                else:
                    self.view.put(service, node, value, now)
        self.view.settle(now)

    def _wait(self) -> None:
        """Until there is something to do."""
        with self._state:
            if self._closing or self._forgotten:
                return
            now, told = time.monotonic(), self._told
            if told is None:
                times = [self._connect_at]
            elif self._to_publish or told.broken or self._next_to_follow() is not None:
                return
            else:
                times = [self._keep_at]
                if told.changes:
                    times.append(self._rest_until)
            if self.view.records() is not self._view:
                times.append(self._rest_until)
            times += [each for each in (self.view.due(), self._save_at) if each is not None]
            if (timeout := min(times) - now) > 0:
                self._state.wait(timeout)

    def _end(self) -> None:
        store = self._store
        if store is None:
            return
        if self._forgotten:
            if self._process == os.getpid():
                store.forget()
            return
        if self._told is not None and (self._offer is not None or self._to_publish):
            try:
                store.withdraw()
            except Exception as error:
                _log.info("the registry %s keeps our record until the lease ends: %s", self._name, error)
        store.close()

    # --- deliveries and the disk ---

    def _is_delivered(self, service: str) -> bool:
        return not self._delivered.isdisjoint(("", service))

    def deliver(self, *, rested: bool = False, patience: float = -1) -> None:
        """Deliver the view if it is another than the last one.

        Args:
            rested: whether it may wait until the last delivery is long enough ago; what is waited for never does.
            patience: seconds to wait for the end of another delivery, which may wait for a lock of ours; -1: for ever.
        """
        if self._deliverer == threading.get_ident():  # called by deliver: the delivery under way goes on with it
            return
        if not self._delivering.acquire(timeout=patience):
            return
        try:
            self._deliverer = threading.get_ident()
            while self._deliver_once(rested):
                pass
        finally:
            self._deliverer = None
            self._delivering.release()

    def _deliver_once(self, rested: bool) -> bool:
        began = time.monotonic()
        with self._state:
            known = self._answered | {service for service, found in self._recalled.items() if found}
            if rested and began < self._rest_until and known <= self._delivered:
                return False
            view, deliver = self.view.records(), self._deliver
        new, self._view = view != self._view, view
        if new:
            if deliver is not None:
                try:
                    deliver(view)
                except Exception:
                    _log.exception("a delivery of the registry's records failed; the next change brings another")
            ended = time.monotonic()
            self._rest_until = ended + min(_REST * (ended - began), _LONGEST_REST)
        with self._state:
            if not known <= self._delivered:
                self._delivered |= known
                self._state.notify_all()
        return new

    def _recall(self, service: str) -> None:
        """Know from the disk what the registry has not said yet."""
        if service in self._recalled or not self._answered.isdisjoint(("", service)):
            return
        records = self._cache.load(service)
        self._recalled[service] = bool(records)
        self.view.remember(records)

    def _save(self) -> None:
        """Write what has changed to the disk, now and then."""
        now = time.monotonic()
        with self._state:
            versions = self.view.versions
            changed = [each for each in self._answered if versions.get(each, 0) != self._saved.get(each, 0)]
            if self._save_at is None:
                self._save_at = now + _FIRST_SAVE if changed else None
            elif now >= self._save_at and not changed:
                self._save_at = None
            if not changed or self._save_at is None or now < self._save_at:
                return
            # Not all processes of a host at once: who comes later finds that it was written already.
            self._save_at = now + CACHE_PERIOD * random.uniform(1.0, 1.5)
            contents = {each: self.view.single(each) for each in changed}
            self._saved |= {each: versions[each] for each in changed}
        for service, records in contents.items():
            self._cache.save(service, records)


def _value(record: Record, service: str) -> bytes:
    """``record`` as the value of one key: with one service alone."""
    idempotent = {service: record.idempotent[service]} if service in record.idempotent else {}
    alone = msgspec.structs.replace(record, services={service: record.services[service]}, idempotent=idempotent)
    value = msgspec.json.encode(alone)
    if len(value) > RECORD_LIMIT:
        raise RegistryError(f"the record of node {record.node} has {len(value)} bytes; it may have {RECORD_LIMIT}")
    return value


# A forked child that never touches onehop must not speak on its parent's connection.
_in_use: weakref.WeakSet[LeasedRegistry] = weakref.WeakSet()


def _forget_all() -> None:
    for registry in list(_in_use):
        registry.forget()
    _in_use.clear()


os.register_at_fork(after_in_child=_forget_all)
