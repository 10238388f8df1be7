"""A database with leases in the memory of a test, which can be away, slow, wiped, or refuse; and its store."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Mapping

from onehop.errors import RegistryError
from onehop.registry.leased import LeaseLost, Store, StoreAway, Tell

Key = tuple[str, str]


class Database:
    """What all stores of a test share. Leases end when :meth:`expire` says so, and not by a clock.

    Attributes:
        away: nobody reaches it: every method raises at once.
        hung: every method waits until it is False.
        full: nobody can publish anything.
        refusal: what it says to everybody, as to one with a wrong password.
        connects, follows, publishes: how often each was asked for.
        connected_at: when each connection was asked for.
    """

    def __init__(self) -> None:
        self.away = self.hung = self.full = False
        self.refusal = ""
        self.loses_leases = False
        self.connects = self.follows = self.publishes = self.keeps = 0
        self.connected_at: list[float] = []
        self.values: dict[Key, bytes] = {}
        self.leases: dict[Key, int] = {}
        self.lock = threading.RLock()
        self.stores: list[MemoryStore] = []
        self.ended: list[MemoryStore] = []
        self._numbers = itertools.count(1)

    def store(self) -> MemoryStore:
        self.stores.append(MemoryStore(self))
        return self.stores[-1]

    def check(self) -> None:
        while self.hung:
            time.sleep(0.005)
        if self.away:
            raise StoreAway("the database in memory is away")
        if self.refusal:
            raise RegistryError(self.refusal)

    def lease(self) -> int:
        return next(self._numbers)

    def put(self, key: Key, value: bytes | None, lease: int = 0, *, withdrawn: bool = False) -> None:
        with self.lock:
            if value is None:
                if self.values.pop(key, None) is None:
                    return
                self.leases.pop(key, None)
            else:
                self.values[key], self.leases[key] = value, lease
            for store in self.stores:
                if not store.following.isdisjoint(("", key[0])):
                    store.late.append((key, value, withdrawn))
                if not store.is_late:
                    store.catch_up()

    def expire(self, *nodes: str) -> None:
        """The leases of these nodes end."""
        for key in [key for key in self.values if key[1] in nodes]:
            self.put(key, None)

    def go(self) -> None:
        """Be away, and break all connections."""
        self.away = True
        self.cut()

    def cut(self) -> None:
        for store in self.stores:
            if store.tell is not None:
                tell, store.tell = store.tell, None
                tell.broke("the database in memory went away")

    def wipe(self) -> None:
        with self.lock:
            self.values.clear()
            self.leases.clear()


class MemoryStore(Store):
    def __init__(self, database: Database) -> None:
        self.database = database
        self.tell: Tell | None = None
        self.following: set[str] = set()
        self.late: list[tuple[Key, bytes | None, bool]] = []  # changes that are still to be told
        self.is_late = False  # until all is followed
        self.mine: dict[Key, int] = {}
        self.has_lease = False
        self.threads: set[str] = set()

    def _check(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.database.check()

    def connect(self, tell: Tell) -> None:
        self.database.connects += 1
        self.database.connected_at.append(time.monotonic())
        self._check()
        self.tell = tell
        self.following.clear()
        self.late.clear()
        self.has_lease = False

    def follow(self, service: str) -> Mapping[Key, bytes]:
        self._check()
        self.database.follows += 1
        with self.database.lock:
            self.following.add(service)
            self.is_late = True
            return {key: value for key, value in self.database.values.items() if service in ("", key[0])}

    def followed(self) -> None:
        with self.database.lock:
            self.is_late = False
            self.catch_up()

    def catch_up(self) -> None:
        for key, value, withdrawn in self.late:
            if self.tell is not None:
                self.tell.changed(*key, value, withdrawn=withdrawn)
        self.late.clear()

    def publish(self, node: str, values: Mapping[str, bytes]) -> None:
        self._check()
        self.database.publishes += 1
        if self.database.full:
            raise StoreAway("the database in memory has no room left")
        if self.database.loses_leases:
            raise LeaseLost("no lease lives here")
        lease = self.database.lease()
        wanted = {(service, node): value for service, value in values.items()}
        for key in self.mine.keys() - wanted.keys():
            self.database.put(key, None, withdrawn=True)
        for key, value in wanted.items():
            self.database.put(key, value, lease)
        self.mine = dict.fromkeys(wanted, lease)
        self.has_lease = True

    def withdraw(self) -> None:
        self._check()
        for key in self.mine:
            self.database.put(key, None, withdrawn=True)
        self.mine = {}

    def keep(self) -> None:
        self._check()
        self.database.keeps += 1
        if self.has_lease and any(self.database.leases.get(key) != lease for key, lease in self.mine.items()):
            raise LeaseLost("the database in memory does not know our keys")

    def close(self) -> None:
        self.tell = None
        self.database.ended.append(self)

    def forget(self) -> None:
        self.tell = None
