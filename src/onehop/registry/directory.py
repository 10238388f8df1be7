"""The directory of a host: whoever holds its well-known port tells of the nodes of this host, and of those that ask.

One process of a host holds the port. The others each keep a connection to it, which ends when it does, however that
happens; then one of them takes the port.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import resource
import selectors
import socket
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import msgspec

from onehop.addresses import listening_address, resolve
from onehop.errors import OnehopError
from onehop.interfaces import Record
from onehop.registry.directory_messages import (
    VERSION,
    Announce,
    Hello,
    Refusal,
    Told,
    Want,
    Withdraw,
    from_client,
    from_directory,
    line_of,
    trimmed,
    understood,
)
from onehop.registry.lines import ALIVE, Broken, Fault, Line, Loop
from onehop.registry.local import RECORD_LIMIT, LocalRegistry, run_directory
from onehop.settings import Settings, revise

HELLO_LIMIT = 64 * 1024  # bytes of a line from somebody unknown
HANDSHAKE = 5.0  # seconds in which a connection has to be greeted
SHORTEST_LEASE, LONGEST_LEASE = 0.1, 3600.0  # seconds
WANTS_LIMIT = 4096  # services that one client may want; who wants more wants all
CONNECTIONS = 32_768  # at most; and half of the descriptors that this process may have
_RETRY = 5.0  # seconds between two attempts to take a port that nobody of ours holds; at most, and fewer until
_IN_VAIN = 8  # so many were in vain
_SWEEP = 0.5  # seconds between two looks for the silent
_LOOK_FOR_REALM = 0.2  # seconds until another look whether this host has nodes of a realm by now
_OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)
_LAST = 16  # descriptors left to others, who need few to get out of want; a new one's number is the lowest that is free
_ADVICE = "choose another port (the first of the setting ports, or in the registry's URL) on all hosts"

_log = logging.getLogger(__name__)


class _Client:
    """One who is connected to the directory."""

    def __init__(self, since: float) -> None:
        self.line: Line
        self.lease = HANDSHAKE
        self.heard = since
        self.greeted = False
        self.realm: _Realm | None = None
        self.wants: frozenset[str] = frozenset()
        self.node: str | None = None  # that it announced


class _Realm:
    """What the directory knows of one realm, and who wants to hear of it."""

    def __init__(self, settings: Settings, wake: Callable[[], None]) -> None:
        self.groups: dict[frozenset[str], set[_Client]] = {}  # by what they want
        self._registry = LocalRegistry(settings)
        self._wake = wake
        self._watched = False
        self._seen: deque[Sequence[Record]] = deque()
        self._here: dict[str, Record] = {}
        self._announced: dict[str, tuple[Record, _Client]] = {}
        self._entries: dict[str, tuple[Record, bool]] = {}  # what is told: the record, and whether the node is here
        self._offering: defaultdict[str, set[str]] = defaultdict(set)  # nodes, by service
        self._before: dict[str, tuple[Record, bool] | None] = {}  # what was told of nodes that changed since
        self._lost: set[str] = set()
        self._snapshots: dict[frozenset[str], bytes] = {}

    def look(self) -> None:
        """Learn what happened to the nodes of this host. Raises OnehopError where their records cannot be read."""
        if not self._watched and self._registry.directory.is_dir():  # none is made for a stranger's asking
            self._registry.watch(self._see)
            self._watched = True
        records = None
        while self._seen:
            records = self._seen.popleft()
        if records is not None:
            before, self._here = self._here, {record.node: record for record in records}
            for node in before.keys() | self._here.keys():
                self._put(node)

    @property
    def is_watched(self) -> bool:
        """Whether this host has nodes of the realm, or had."""
        return self._watched

    @property
    def has_news(self) -> bool:
        """Whether :meth:`changes` has something to tell."""
        return bool(self._before)

    def refresh(self) -> None:
        self._registry.refresh()
        self.look()

    def announce(self, record: Record, client: _Client) -> None:
        self._announced[record.node] = record, client
        self._put(record.node)

    def announcer(self, node: str) -> _Client | None:
        return self._announced[node][1] if node in self._announced else None

    def retract(self, node: str, client: _Client, *, lost: bool) -> None:
        """The record of ``node`` is gone, if it is still ``client`` that stands for it."""
        if node in self._announced and self._announced[node][1] is client:
            del self._announced[node]
            self._put(node)
            if lost:
                self._lost.add(node)

    def snapshot(self, wants: frozenset[str]) -> bytes:
        """All that somebody with these wants has to know."""
        if wants not in self._snapshots:
            told = self._told(self._who_offers(wants), wants)
            self._snapshots[wants] = line_of(msgspec.structs.replace(told, place=self._place()))
        return self._snapshots[wants]

    def answer(self, service: str, wants: frozenset[str]) -> bytes:
        """All that somebody with these wants has to know of ``service``."""
        return line_of(msgspec.structs.replace(self._told(self._who_offers({service}), wants), service=service))

    def changes(self) -> list[tuple[set[_Client], bytes]]:
        """Who has to hear what of the changes since this was asked before."""
        before, self._before = self._before, {}
        lost, self._lost = self._lost, set()
        news = []
        for wants, clients in self.groups.items() if before else ():
            nodes, gone = [], []
            for node, was in before.items():
                now = self._entries.get(node)
                old, new = (trimmed(each and each[0], wants) for each in (was, now))
                if new is None and old is not None:
                    gone.append(node)
                elif new is not None and (was is None or now is None or old != new or was[1] != now[1]):
                    nodes.append(node)
            if nodes or gone:
                told = self._told(nodes, wants)
                told.withdrawn = tuple(node for node in gone if node not in lost)
                told.lost = tuple(node for node in gone if node in lost)
                news.append((clients.copy(), line_of(told)))
        return news

    def close(self) -> None:
        self._registry.close()

    def _place(self) -> str:
        try:
            found = self._registry.directory.stat()
        except OSError:  # nobody is here
            return ""
        return f"{found.st_dev:x}-{found.st_ino:x}"  # its path may mean another one in another container

    def _see(self, records: Sequence[Record]) -> None:
        self._seen.append(records)
        self._wake()

    def _put(self, node: str) -> None:
        """Let be told of ``node`` what is known at first hand, or else what it announced."""
        before, now = self._entries.get(node), None
        if node in self._here:
            now = self._here[node], True
        elif node in self._announced:
            now = self._announced[node][0], False
        if now == before:
            return
        self._before.setdefault(node, before)
        self._lost.discard(node)
        self._snapshots.clear()
        for service in before[0].services if before else ():
            self._offering[service].discard(node)
            if not self._offering[service]:
                del self._offering[service]
        for service in now[0].services if now else ():
            self._offering[service].add(node)
        if now is None:
            del self._entries[node]
        else:
            self._entries[node] = now

    def _who_offers(self, services: set[str] | frozenset[str]) -> Iterable[str]:
        if "" in services:
            return self._entries
        return {node for service in services for node in self._offering.get(service, ())}

    def _told(self, nodes: Iterable[str], wants: frozenset[str]) -> Told:
        records: dict[bool, list[Record]] = {True: [], False: []}
        for record, here in map(self._entries.__getitem__, nodes):
            part = trimmed(record, wants)
            if part is not None:
                records[here].append(part)
        return Told(here=tuple(records[True]), announced=tuple(records[False]))


class Directory(Loop):
    """Holds the port, or waits for it. One in a process, for all of its nodes that share a port and a run directory.

    Args:
        settings: of the first of them.
        towards: gives the listed hosts; on them depends where to listen.

    Attributes:
        address: at which this host's directory listens, once that is known.
        refused: how many connections were ended, by reason.
    """

    def __init__(self, settings: Settings, towards: Callable[[], Sequence[tuple[str, int]]]) -> None:
        super().__init__("onehop-directory")
        self.address: str | None = None
        self.refused: Counter[str] = Counter()
        self.users = 0
        self._settings, self._towards, self._port = settings, towards, 0
        self._listeners: dict[socket.socket, bool] = {}  # whether the selector knows of it
        self._holder: Line | None = None  # to the process that holds the port
        self._in_vain = 0  # attempts since a holder was heard
        self._take_at = 0.0
        self._problem = ""
        self._clients: set[_Client] = set()
        self._realms: dict[str, _Realm] = {}
        self._most = 0
        self._push_at = self._sweep_at = 0.0

    def is_meant_by(self, address: IPv4Address | IPv6Address) -> bool:
        """Whether that address of a listed host is ours: the name of a host often means one of loopback there."""
        if self.address is None:
            return False
        own = ip_address(self.address)
        return address == own or (address.is_loopback and not (self._settings.address and own.is_loopback))

    @property
    def is_held(self) -> bool:
        """Whether this process holds the port."""
        return bool(self._listeners)

    def turn(self, ready: list[tuple[Any, int]], now: float) -> float:
        if not self._listeners:
            self._await(ready, now)
        else:
            self._serve(ready, now)
        return self._due(now) - time.monotonic()

    def _due(self, now: float) -> float:
        if not self._listeners:
            return self._take_at
        due = [self._sweep_at]
        if any(realm.has_news for realm in self._realms.values()):
            due.append(self._push_at)
        if not all(realm.is_watched for realm in self._realms.values()):
            due.append(now + _LOOK_FOR_REALM)
        return min(due)

    def end(self) -> None:
        for listener in self._listeners:
            listener.close()
        for realm in self._realms.values():
            with suppress(OnehopError):  # who cannot be read was never told of
                realm.refresh()
        self._push()
        for client in list(self._clients):
            client.line.close()
        for realm in self._realms.values():
            realm.close()
        if self._holder is not None:
            self._holder.close()

    def forget(self) -> None:
        super().forget()
        for listener in self._listeners:
            listener.close()
        for line in [client.line for client in self._clients] + ([self._holder] if self._holder else []):
            line.forget()

    # --- while another process holds the port ---

    def _await(self, ready: list[tuple[Any, int]], now: float) -> None:
        try:
            if ready and self._holder is not None:
                self._hear_holder(self._holder)
            if now < self._take_at:
                return
            self._take_at = now + _RETRY
            if self._holder is None:
                self._take()
            elif not self._in_vain:
                self._holder.send(ALIVE)
            else:
                self._in_vain = _IN_VAIN
                raise Broken("it does not answer")
        except Broken as broken:
            if self._holder is not None:
                self._holder.close()
                self._holder = None
            # Milliseconds at first, lest all of this host come at the same time.
            self._take_at = now + random.uniform(0.0, min(0.01 * 2.0**self._in_vain, _RETRY))
            if self._in_vain >= _IN_VAIN:
                self._warn(
                    f"port {self._port} at {self.address} is held by something that is no directory of onehop: "
                    f"{broken}; {_ADVICE}, or end what holds it"
                )

    def _hear_holder(self, holder: Line) -> None:
        for line in holder.read():
            if line and not isinstance(understood(from_directory, line), Told):
                raise Broken(f"it refuses: {line[:200]!r}")
            self._in_vain = 0
        holder.flush()

    def _take(self) -> None:
        """Take the port, or connect to its holder."""
        try:
            servers = self._towards()
            self.address = listening_address(self._settings, servers)
            self._port = self._own_port(servers)
        except OnehopError as error:
            self._warn(f"this process does not keep the directory of its host: {error}")
            return
        try:
            first = _listener(self.address, self._port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                self._warn(f"cannot listen at {self.address}, port {self._port}: {error.strerror}; set address")
                return
            self._follow(self.address)
            return
        self._listeners = {first: False}
        for loopback in () if ip_address(self.address).is_loopback else ("127.0.0.1", "::1"):
            try:
                self._listeners[_listener(loopback, self._port)] = False
            except OSError as error:
                _log.info("the directory does not listen at %s, port %d: %s", loopback, self._port, error)
        self._most = min(CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._problem = ""
        _log.info("this process holds the directory of its host, at %s, port %d", self.address, self._port)

    def _own_port(self, servers: Sequence[tuple[str, int]]) -> int:
        """Where to listen: the port that the list has for this host; for one that is not listed the first of all."""
        for host, port in servers:
            with suppress(OSError):  # a name that means nothing now is not ours
                if any(map(self.is_meant_by, resolve(host, port))):
                    return port
        return servers[0][1]

    def _follow(self, address: str) -> None:
        self._in_vain += 1
        try:
            connection = socket.create_connection((address, self._port), timeout=1.0)
        except ConnectionRefusedError:  # it ended meanwhile
            self._take_at = time.monotonic() + random.uniform(0.001, 0.01)
            return
        except OSError as error:
            raise Broken(error.strerror or str(error)) from error
        self._holder = Line(connection, self.selector, self, RECORD_LIMIT)
        self._holder.send(line_of(Hello(VERSION, self._settings.host_name, LONGEST_LEASE)))

    def _warn(self, problem: str) -> None:
        if problem != self._problem:
            _log.warning("%s", problem)
        self._problem = problem

    # --- while this process holds it ---

    def _serve(self, ready: list[tuple[Any, int]], now: float) -> None:
        for owner, events in ready:
            if isinstance(owner, _Client):
                if owner in self._clients:
                    self._attend(owner, events, now)
            elif isinstance(owner, socket.socket):
                self._accept(owner, now)
        if now >= self._sweep_at:
            self._sweep(now)
        for name, realm in list(self._realms.items()):
            try:
                realm.look()
            except (OnehopError, OSError) as error:
                self._give_up(name, realm, error)
        if now >= self._push_at:
            self._push()
            # After a while that depends on what it took, so that many who come at once are told together.
            self._push_at = now + min(2 * (time.monotonic() - now), 0.2)

    def _accept(self, listener: socket.socket, now: float) -> None:
        for _ in range(64):
            try:
                connection, _from = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _OUT_OF_DESCRIPTORS:  # they wait at the door until the next sweep
                    self._shut_the_door(listener, error.strerror)
                    return
                continue  # it ended before it was taken
            if connection.fileno() >= resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _LAST:
                connection.close()
                self._shut_the_door(listener, "only its last descriptors are left")
                return
            if len(self._clients) >= self._most:
                self._refuse(f"there are {self._most} connections already")
                connection.close()
                continue
            client = _Client(now)
            try:
                client.line = Line(connection, self.selector, client, HELLO_LIMIT)
            except OSError:  # it ended meanwhile
                connection.close()
                continue
            self._clients.add(client)

    def _shut_the_door(self, listener: socket.socket, why: str | None) -> None:
        """Whoever comes waits until the next sweep."""
        self._refuse(f"this process has no room for a connection: {why}")
        self.selector.unregister(listener)
        self._listeners[listener] = False

    def _attend(self, client: _Client, events: int, now: float) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                client.line.flush()
            if events & selectors.EVENT_READ:
                lines = client.line.read()
                if client.greeted:
                    client.heard = now
                for line in lines:
                    if line or not client.greeted:
                        self._obey(client, understood(from_client, line))
                if b"" in lines:
                    client.line.send(ALIVE)
        except Broken as broken:
            self._cut(client, broken)

    def _obey(self, client: _Client, message: Hello | Want | Announce | Withdraw) -> None:
        realm = client.realm
        if isinstance(message, Hello) and not client.greeted:
            self._greet(client, message)
        elif realm is None:
            raise Fault(f"it says {type(message).__name__} where that has no place")
        elif isinstance(message, Want):
            self._tell_too(client, realm, message.service)
        elif isinstance(message, Announce):
            node = message.record.node
            if len(node) != 32 or node.strip("0123456789abcdef"):
                raise Fault(f"it announces what is no node: {node[:40]!r}; it must be 32 lower-case hexadecimal digits")
            if client.node not in (None, node):
                realm.retract(str(client.node), client, lost=False)
            client.node = node
            before = realm.announcer(node)
            if before is not None and before is not client:  # who lives comes back at once, whoever took its name
                self._cut(before, Fault("another connection announces its node"))
            realm.announce(message.record, client)
        elif isinstance(message, Withdraw):
            if client.node is not None:
                realm.retract(client.node, client, lost=False)
            client.node = None
        else:
            raise Fault("it says Hello twice")

    def _tell_too(self, client: _Client, realm: _Realm, service: str) -> None:
        """From now on tell of ``service`` as well."""
        if not client.wants.isdisjoint(("", service)):
            client.line.send(line_of(Told(service=service)))  # all of it was told before
        elif len(client.wants) < WANTS_LIMIT:
            self._regroup(client, realm, client.wants | {service})
            client.line.send(realm.answer(service, client.wants))
        else:
            fault = _too_many()
            client.line.send(line_of(Refusal(str(fault))))
            raise fault

    def _greet(self, client: _Client, hello: Hello) -> None:
        try:
            if hello.version != VERSION:
                raise Fault(f"it speaks another version of the directory's protocol: {hello.version}, not {VERSION}")
            if not SHORTEST_LEASE <= hello.lease <= LONGEST_LEASE:
                bounds = f"{SHORTEST_LEASE:g} to {LONGEST_LEASE:g}"
                raise Fault(f"its lease is none: {hello.lease} s; it must be {bounds}")
            if len(hello.services) > WANTS_LIMIT:
                raise _too_many()
            realm = None if hello.realm is None else self._realm(hello.realm or "default")
        except Fault as fault:
            client.line.send(line_of(Refusal(str(fault))))
            raise
        client.lease, client.greeted, client.realm = hello.lease, True, realm
        client.line.limit = RECORD_LIMIT + HELLO_LIMIT
        if realm is not None:
            self._regroup(client, realm, frozenset(hello.services))
        client.line.send(realm.snapshot(client.wants) if realm is not None else line_of(Told()))
        client.line.send(line_of(Told(crowd=len(self._clients))))  # apart: the snapshot is the same for many

    def _realm(self, name: str) -> _Realm:
        if name not in self._realms:
            try:
                realm = _Realm(revise(self._settings, realm=name), self.wake)
            except OnehopError as error:
                raise Fault(f"its realm is none: {error}") from error
            try:
                realm.look()
            except (OnehopError, OSError) as error:
                realm.close()
                raise Fault(f"its realm cannot be told of: {error}") from error
            self._realms[name] = realm
        return self._realms[name]

    def _regroup(self, client: _Client, realm: _Realm, wants: frozenset[str]) -> None:
        self._ungroup(client, realm)
        client.wants = wants
        realm.groups.setdefault(wants, set()).add(client)

    def _ungroup(self, client: _Client, realm: _Realm) -> None:
        group = realm.groups.get(client.wants, set())
        group.discard(client)
        if not group:
            realm.groups.pop(client.wants, None)

    def _push(self) -> None:
        for realm in list(self._realms.values()):
            for clients, data in realm.changes():
                for client in clients:
                    try:
                        client.line.send(data)
                    except Broken as broken:
                        self._cut(client, broken)

    def _sweep(self, now: float) -> None:
        self._sweep_at = now + _SWEEP
        for listener, known in self._listeners.items():
            if not known:
                self.selector.register(listener, selectors.EVENT_READ, listener)
                self._listeners[listener] = True
        for client in list(self._clients):
            if now - client.heard > client.lease:
                self._cut(client, Broken(f"it was silent for {client.lease} s"))
        for name, realm in list(self._realms.items()):
            if not realm.groups:
                del self._realms[name]
                realm.close()

    def _give_up(self, name: str, realm: _Realm, error: Exception) -> None:
        """The nodes of this host cannot be read: nothing is told, rather than that there are none."""
        for client in [client for client in self._clients if client.realm is realm]:
            self._cut(client, Fault(f"its realm cannot be told of: {error}"))
        self._realms.pop(name, None)
        realm.close()

    def _cut(self, client: _Client, why: Broken) -> None:
        if client not in self._clients:
            return
        self._clients.discard(client)
        client.line.close()
        if client.realm is not None:
            self._ungroup(client, client.realm)
            if client.node is not None:
                client.realm.retract(client.node, client, lost=True)
        if client.greeted and not isinstance(why, Fault):
            _log.debug("a connection to the directory ended: %s", why)
        else:
            self._refuse(str(why))

    def _refuse(self, why: str) -> None:
        kind = why.partition(":")[0]
        level = logging.DEBUG if self.refused[kind] else logging.WARNING
        _log.log(level, "the directory refused a connection: %s", why)
        self.refused[kind] += 1


def _too_many() -> Fault:
    return Fault(f"it wants more services than one may: {WANTS_LIMIT}; it must want all of them")


def _listener(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # whoever held it left ended connections behind
        listener.setblocking(False)
        listener.bind((address, port))
        listener.listen(4096)
    except OSError:
        listener.close()
        raise
    return listener


# --- one for the nodes of a process ---

_directories: dict[tuple[object, ...], Directory] = {}
_shared: dict[str, threading.Lock] = {}


def _sharing() -> threading.Lock:
    return _shared.setdefault("lock", threading.Lock())  # made at first use, to be a green one where threads are


def join(settings: Settings, towards: Callable[[], Sequence[tuple[str, int]]]) -> Directory:
    """This process's directory among the listed hosts, until as many :func:`part` from it."""
    key = (settings.address, settings.ports, tuple(towards()), run_directory(settings))
    with _sharing():
        directory = _directories.get(key)
        if directory is None:
            directory = _directories[key] = Directory(settings, towards)
            directory.start()
        directory.users += 1
        return directory


def part(directory: Directory) -> None:
    """One of its nodes needs it no more; the port goes with the last."""
    with _sharing():
        directory.users -= 1
        last = not directory.users
        if last:
            for key in [key for key, each in _directories.items() if each is directory]:
                del _directories[key]
    if last:
        directory.stop()


def _forget_all() -> None:
    _shared.clear()  # the parent's thread that held it does not exist here
    for directory in _directories.values():
        directory.forget()
    _directories.clear()


os.register_at_fork(after_in_child=_forget_all)
