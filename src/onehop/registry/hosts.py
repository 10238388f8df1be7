"""The registry that needs no service: a list of hosts, each with a directory that its own nodes keep.

A node puts its record into its host's local registry, and tells it to the listed directories (``directory.py``), which
tell it to all who want to know. So the nodes of hosts that are not listed are found too, and each stands in as many
directories as there are: one that is away takes nobody's record with it.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, NamedTuple

import msgspec

from onehop.addresses import listening_ports, resolve
from onehop.errors import NoThread, RegistryError, SettingsError
from onehop.interfaces import Deliver, Record, Registry
from onehop.registry import urls
from onehop.registry.directory import HANDSHAKE, LONGEST_LEASE, SHORTEST_LEASE, Directory, join, part
from onehop.registry.directory_messages import (
    VERSION,
    Announce,
    Hello,
    Refusal,
    Told,
    Want,
    Withdraw,
    from_directory,
    line_of,
    trimmed,
    understood,
)
from onehop.registry.hosts_file import HostsFile, HostsList, Server
from onehop.registry.lines import ALIVE, Broken, Line, Loop
from onehop.registry.local import LocalRegistry
from onehop.registry.threads import start_thread
from onehop.registry.view import Cache
from onehop.settings import Settings

ANSWER_LIMIT = 64 * 1024 * 1024  # bytes of one line from a directory
FIRST_RETRIES, LONGEST_RETRY = 5, 5.0  # so many in the second of a takeover; then after up to so many seconds
PATIENCE = 0.5  # seconds for an answer from all, where some have answered
RETURNS_A_SECOND = 150  # nodes that come back to a directory after it ended; servers that it tells of come on top
UNHURRIED_RETURNS = 30  # the same, where another directory tells of those servers meanwhile, and they go there at once
REFUSED = 0.7  # seconds after which a host that still refuses has nobody left to take its port over
GRACE = 2.0  # seconds, at least, for those who told a directory of themselves to tell its successor
TOGETHER = 1.0  # seconds within which all directories hear of one event
FIRST_SAVE, SAVE_PERIOD = 1.0, 5.0  # seconds until the cache is written, and between two writings, at least
_SOON = 0.2  # seconds between two turns while something is not settled

_log = logging.getLogger(__name__)


class HostsRegistry(Registry):
    """Records of all hosts, told by the directories of those that are listed.

    Each process of a host holds its directory or stands by to; see :class:`onehop.registry.directory.Directory`.

    What a directory told of stays for a lease when its connection breaks, and is dropped if it has not come back by
    then; where all are away, this host is taken for the isolated one, and everything stays. What a node says of itself,
    and a directory of the nodes of its own host, is believed at once.

    Args:
        settings: ``realm``, ``address``, ``ports``, ``lease`` and what the local registry needs.
        url: ``hosts://ctl1,ctl2:9501,[2001:db8::7]/``, or ``file:///etc/onehop/peers.toml``: a table ``[[hosts]]`` for
            each host, with its ``name`` and, where they are others, ``address`` and ``port``. The file is read again
            when it changes.

    Raises:
        SettingsError: the URL or the lease is wrong; says what would be right.
    """

    def __init__(self, settings: Settings, url: str) -> None:
        if not SHORTEST_LEASE <= settings.lease <= LONGEST_LEASE:
            bounds = f"{SHORTEST_LEASE:g} to {LONGEST_LEASE:g} seconds"
            raise SettingsError(f"lease is {settings.lease:g}; with the registry {url!r} it must be {bounds}")
        port = listening_ports(settings.ports)[0]
        self._settings, self._url = settings, url
        if url.lower().startswith("file:"):
            self._list: HostsList = HostsFile(url, port)
        else:
            self._list = HostsList(urls.parse(url, port, login=False).servers)
        self._local = LocalRegistry(settings)
        self._watcher: _Watcher | None = None
        self._wanted: set[str] = set()
        self._closed = False

    @property
    def addresses(self) -> Sequence[Server]:  # type: ignore[override]
        """The listed hosts. Raises SettingsError where they stand in a file that cannot be read."""
        return self._list.servers

    def announce(self, record: Record) -> None:
        watcher = self._open()
        self._local.announce(record)
        watcher.announce(record)

    def withdraw(self) -> None:
        self._local.withdraw()
        if self._watcher is not None:
            self._watcher.announce(None)

    def watch(self, deliver: Deliver) -> None:
        watcher = self._open()
        watcher.deliver_to(deliver)
        self._local.watch(watcher.see_local)
        watcher.publish(first=True)
        watcher.wait_until_delivered()

    def want(self, service: str, timeout: float) -> bool:
        self._wanted.add(service)
        return self._watcher is not None and self._watcher.want(service, timeout)

    def refresh(self) -> None:
        watcher = self._watcher
        if watcher is not None and not watcher.is_delivering:
            if not self._local.is_fresh():
                self._local.refresh()
            watcher.publish()
            watcher.wait_until_delivered()

    def close(self) -> None:
        with self._lock():
            self._closed = True
            watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.deliver_to(None)
        self._local.close()
        if watcher is not None:
            watcher.announce(None)
            watcher.stop()
            part(watcher.directory)

    def forget(self) -> None:
        self._closed = True
        watcher, self._watcher = self._watcher, None
        self._local.forget()
        if watcher is not None:
            watcher.forget()
        self.__dict__.pop("_opening", None)  # a thread of the parent may have held it

    def _open(self) -> _Watcher:
        with self._lock():
            if self._closed:
                raise RegistryError("this registry was closed, or belongs to the parent of this process; open another")
            if self._watcher is None:
                directory = join(self._settings, lambda: self.addresses)
                self._watcher = _Watcher(self._settings, self._list, directory, Cache(self._settings, self._url))
                self._watcher.wants |= self._wanted
                self._watcher.start()
                _in_use.add(self)
            return self._watcher

    def _lock(self) -> threading.Lock:
        # Made at first use, to be a green one where threads are; setdefault lets one of two threads win.
        lock: threading.Lock = self.__dict__.setdefault("_opening", threading.Lock())
        return lock


# A forked child that never touches onehop would keep its parent's connections open after the parent's death.
_in_use: weakref.WeakSet[HostsRegistry] = weakref.WeakSet()


def _forget_all() -> None:
    for registry in list(_in_use):
        registry.forget()
    _in_use.clear()


os.register_at_fork(after_in_child=_forget_all)


class _Known(NamedTuple):
    """A record as one directory told it: of its own host or not, and when."""

    record: Record
    here: bool
    at: float


class _Link:
    """One listed directory: what it told, and the connection to it, if there is one."""

    def __init__(self, server: Server, now: float) -> None:
        self.server = server
        self.known: dict[str, _Known] = {}
        self.line: Line | None = None
        self.address: IPv4Address | IPv6Address | None = None
        self.is_own = False  # the directory of this host
        self.place = ""  # of whom it says that they are here
        self.crowd = 0  # how many it had connected when we came
        self.live = False  # it has told all that we want to know
        self.answered: set[str] = set()
        self.asked: set[str] = set()
        self.told_record: Record | None = None  # what we told it of ourselves
        self.heard = self.began = self.retry_at = self.broke = self.hold_until = now
        self.tries = 0
        self.refused = False
        self.resolving = False
        self.resolved: deque[list[IPv4Address | IPv6Address] | OSError] = deque()
        self.doubtful: dict[str, float] = {}  # missing after a break; until when they are waited for
        self.problem = ""

    def __str__(self) -> str:
        host, port = self.server
        at = "" if self.address is None or str(self.address) == host else f" ({self.address})"
        return f"the directory of {host}{at}, port {port},"

    def knows(self, service: str) -> bool:
        """Whether all who offer ``service`` have been told by it."""
        return self.live and (service in self.answered or "" in self.answered)

    def is_awaited(self, now: float, others: bool) -> bool:
        """Whether an answer from it may come soon; with ``others`` that have answered, less patiently."""
        if others and not self.live:
            return not self.refused and now - self.broke <= PATIENCE
        return self.tries <= FIRST_RETRIES


class _Watcher(Loop):
    """The connections of one node to all listed directories, and the view that comes of what they tell."""

    def __init__(self, settings: Settings, hosts: HostsList, directory: Directory, cache: Cache) -> None:
        super().__init__("onehop-hosts")
        self.directory = directory
        self.wants: set[str] = set()
        self._settings, self._list, self._cache = settings, hosts, cache
        self._lease = settings.lease
        self._record: Record | None = None
        self._links: dict[Server, _Link] = {}
        self._remembered = _Link(("", 0), 0.0)  # what the disk told
        self._recalled: list[Record] = []  # what it tells just now
        self._beat_at = self._list_at = self._publish_at = 0.0
        self._save_at = time.monotonic() + FIRST_SAVE
        # The view. Under this lock, which is never held while something is delivered.
        self._changed = threading.Condition(threading.Lock())
        self._deliver: Deliver | None = None
        self._delivering: int | None = None  # the thread that does
        self._stale = False
        self._view: tuple[Record, ...] | None = None
        self._saved: tuple[Record, ...] | None = None
        self._far: dict[str, Record] = {}
        self._near: Sequence[Record] = ()

    # --- for the node's threads ---

    def announce(self, record: Record | None) -> None:
        self._record = record
        self.wake()

    def deliver_to(self, deliver: Deliver | None) -> None:
        """Deliver to this one from now on; when this returns, nothing more goes to whom it went before."""
        with self._changed:
            self._deliver, self._view = deliver, None
        self.wait_until_delivered()

    def see_local(self, records: Sequence[Record]) -> None:
        with self._changed:
            self._near, self._stale = records, True
        self.publish()

    def want(self, service: str, timeout: float) -> bool:
        answered: list[_Link] = []
        until = time.monotonic() + timeout
        with self._changed:
            if service not in self.wants:
                self.wants = self.wants | {service}
                self._stale = True
        self.publish()
        self.wake()
        if self.is_delivering or threading.current_thread() is self._thread:
            return any(link.knows(service) for link in self._links.values())
        with self._changed:
            while (now := time.monotonic()) < until:
                links = list(self._links.values())
                answered = [link for link in links if link.knows(service)]
                waited = [link for link in links if link not in answered and link.is_awaited(now, bool(answered))]
                if links and not waited:
                    break
                self._changed.wait(min(until - now, 0.05))
        if not answered:
            self._recall(service)
        self.publish()
        self.wait_until_delivered()
        return bool(answered) or any(service in ("", *record.services) for record in self._view or ())

    @property
    def is_delivering(self) -> bool:
        """Whether this very thread is inside ``deliver``."""
        return self._delivering == threading.get_ident()

    def wait_until_delivered(self, timeout: float = 1.0) -> None:
        """Not for ever: whoever delivers may wait for a lock of whoever waits here."""
        if not self.is_delivering:
            with self._changed:
                self._changed.wait_for(lambda: self._delivering is None, timeout)

    def publish(self, *, first: bool = False) -> None:
        """Deliver the view if it is another. Who comes while one delivers leaves it to that one."""
        with self._changed:
            self._stale = self._stale or first
            if self._delivering is not None:
                return
            self._delivering = threading.get_ident()
        while True:
            with self._changed:
                deliver = self._deliver
                if not self._stale or deliver is None:
                    self._delivering = None
                    self._changed.notify_all()
                    return
                self._stale = False
                view = self._merged()
                is_new = view != self._view
                self._view = view
            if is_new:
                try:
                    deliver(view)
                except Exception:
                    _log.exception("what was delivered of the registry was not taken")
                except BaseException:  # a green thread's timeout, or its end: the next one delivers
                    with self._changed:
                        self._delivering, self._view, self._stale = None, None, True
                        self._changed.notify_all()
                    raise

    @property
    def _is_publishable(self) -> bool:
        return self._stale and self._deliver is not None and self._delivering is None

    @property
    def _is_unsaved(self) -> bool:
        return self._view is not None and self._view is not self._saved

    def _merged(self) -> tuple[Record, ...]:
        near = {record.node: part for record in self._near if (part := trimmed(record, self.wants)) is not None}
        return tuple(record for _, record in sorted((self._far | near).items()))

    # --- the thread ---

    def turn(self, ready: list[tuple[Any, int]], now: float) -> float:
        for link, _events in ready:
            if link.line is not None:
                self._hear(link, now)
        if now >= self._list_at:
            self._list_at = now + self._list.period
            self._follow_list(now)
        beats = now >= self._beat_at
        if beats:
            self._beat_at = now + self._lease / 3
        for link in self._links.values():
            self._attend(link, beats, now)
        if self._recalled:
            self._take_recalled(now)
        self._let_go(now)
        if self._is_publishable and now >= self._publish_at:
            self.publish()
            # After a while that depends on what it took, so that many who come at once are delivered together.
            self._publish_at = now + min(3 * (time.monotonic() - now), 0.3)
        if now >= self._save_at and self._is_unsaved:
            self._save_at = now + SAVE_PERIOD
            self._save()
        return self._due(now) - now

    def end(self) -> None:
        for link in self._links.values():
            with suppress(Broken):
                self._tell(link)
            if link.line is not None:
                link.line.close()

    def forget(self) -> None:
        super().forget()
        for link in self._links.values():
            if link.line is not None:
                link.line.forget()

    def _due(self, now: float) -> float:
        due = [self._beat_at, self._list_at]
        if self._is_publishable:
            due.append(self._publish_at)
        for link in self._links.values():
            if link.line is None and not link.resolving:
                due.append(link.retry_at)
            if link.doubtful or (not link.live and (link.line is not None or link.known)):
                due.append(now + _SOON)
        if self._remembered.known:
            due.append(now + _SOON)
        if self._is_unsaved:
            due.append(self._save_at)
        return min(due)

    def _follow_list(self, now: float) -> None:
        self._list.look()
        servers, before = self._list.servers, self._links
        if tuple(before) != servers:  # another object, as other threads read it
            self._links = {server: before.get(server) or _Link(server, now) for server in servers}
        for server in before.keys() - self._links.keys():
            link = before[server]
            if link.line is not None:
                link.line.close()
            self._settle(link.known)

    def _attend(self, link: _Link, beats: bool, now: float) -> None:
        """Whatever is due on one link."""
        try:
            if link.line is None:
                if link.resolved:
                    self._connect(link, now)
                elif not link.resolving and now >= link.retry_at:
                    self._resolve(link)
            elif link.live and now - link.heard > self._lease:
                raise Broken(f"nothing was heard of it for {self._lease} s")
            elif not link.live and now - link.began > HANDSHAKE:
                raise Broken(f"it did not answer within {HANDSHAKE} s")
            else:
                self._tell(link)
                if beats and link.live:
                    link.line.send(ALIVE)
        except Broken as broken:
            self._break(link, broken, now)

    def _resolve(self, link: _Link) -> None:
        host, port = link.server
        with suppress(ValueError):
            link.resolved.append([ip_address(host)])
            return self.wake()

        def look_up() -> None:
            try:
                link.resolved.append(resolve(host, port))
            except OSError as error:
                link.resolved.append(error)
            self.wake()

        link.resolving = True
        try:
            start_thread("onehop-resolver", look_up)
        except NoThread as error:
            link.resolved.append(OSError(str(error)))
            self.wake()
        return None

    def _connect(self, link: _Link, now: float) -> None:
        found = link.resolved.popleft()
        link.resolving, link.began = False, now
        if isinstance(found, OSError):
            raise Broken(f"its name means no address: {found.strerror}")
        address = found[link.tries % len(found)]
        link.is_own = self.directory.is_meant_by(address)
        if link.is_own and self.directory.address:
            address = ip_address(self.directory.address)
        link.address = address
        try:
            connection = socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET)
        except OSError as error:
            raise Broken(f"no connection can be made: {error.strerror}") from error
        link.line = Line(connection, self.selector, link, ANSWER_LIMIT)
        with suppress(OSError):  # told by the first attempt to send
            connection.connect_ex((str(address), link.server[1]))
        link.asked, link.answered, link.told_record = set(self.wants), set(self.wants), None
        hello = Hello(VERSION, self._settings.host_name, self._lease, self._settings.realm, tuple(sorted(link.asked)))
        link.line.send(line_of(hello))
        self._tell(link)

    def _tell(self, link: _Link) -> None:
        """Say what it does not know yet: what we want, and who we are."""
        if link.line is None:
            return
        for service in sorted(self.wants - link.asked):
            link.asked.add(service)
            link.line.send(line_of(Want(service)))
        record = self._record
        if record is not link.told_record:  # our own host's too: its holder may look into another run directory
            link.told_record = record
            link.line.send(line_of(Withdraw() if record is None else Announce(record)))

    def _hear(self, link: _Link, now: float) -> None:
        assert link.line is not None
        try:
            link.line.flush()
            for line in link.line.read():
                message = understood(from_directory, line) if line else None
                if isinstance(message, Refusal):
                    raise Broken(f"it refuses this node: {message.reason}")
                link.heard = now
                if isinstance(message, Told):
                    self._learn(link, message, now)
        except Broken as broken:
            self._break(link, broken, now)

    def _break(self, link: _Link, broken: Broken, now: float) -> None:
        if link.line is not None:
            link.line.close()
            link.line = None
        if link.live:
            link.live, link.tries, link.broke = False, 0, now
            silent = now - link.heard > self._lease
            link.hold_until = (link.heard if silent else now) + self._lease
        link.refused = broken.refused
        link.tries += 1
        if link.tries <= FIRST_RETRIES:
            # Who came late returns late, so that those who lost it together are no storm for its successor; and before
            # they try a server that ended with it (protocol/peers.py), of whose end it tells them. Where another has
            # told them, they are on their way to that server already, and this return would double the attempts.
            told = any(each.live for each in self._links.values())
            turn = link.crowd / (UNHURRIED_RETURNS if told else RETURNS_A_SECOND)
            delay = link.tries * (random.uniform(0.02, 0.1) + random.uniform(0.8, 1.2) * turn)
        else:
            delay = random.uniform(0.1, min(LONGEST_RETRY, 0.3 * 2.0 ** min(link.tries - FIRST_RETRIES, 10)))
        link.retry_at = now + delay
        if link.tries > FIRST_RETRIES and str(broken) != link.problem:
            link.problem = str(broken)
            _log.warning("%s is away, and will be tried again: %s", link, broken)

    # --- what is known ---

    def _learn(self, link: _Link, told: Told, now: float) -> None:
        records = [(record, True) for record in told.here] + [(record, False) for record in told.announced]
        touched = {record.node for record, _ in records}
        if not link.live:
            self._greeted(link, told.place, touched, now)
        link.crowd = told.crowd or link.crowd
        for record, here in records:
            before = self._far.get(record.node)
            each = before if before == record else record  # one object for what several directories tell
            link.known[each.node] = _Known(each, here, now)
            link.doubtful.pop(each.node, None)
        for node in told.withdrawn:
            self._withdrawn(link, node, now)
        for node in told.lost:
            link.known.pop(node, None)
        self._settle(touched | {*told.withdrawn, *told.lost})
        with self._changed:
            if told.service is not None:
                link.answered.add(told.service)
            self._changed.notify_all()

    def _greeted(self, link: _Link, place: str, listed: set[str], now: float) -> None:
        """It told all that it knows: whom it does not list any more is gone, or has yet to come back to it."""
        away, knows_here = now - link.broke, place == link.place
        link.place = place
        link.live, link.tries, link.refused = True, 0, False
        if link.problem:
            _log.info("%s is back", link)
        link.problem = ""
        for node in link.known.keys() - listed:
            if link.known[node].here and knows_here:
                self._withdrawn(link, node, now)
                self._settle([node])
            else:
                link.doubtful.setdefault(node, now + min(GRACE + away, GRACE + LONGEST_RETRY))

    def _withdrawn(self, link: _Link, node: str, now: float) -> None:
        """Believed at once, whoever else still tells of it; unless that is the directory of its own host."""
        for each in (*self._links.values(), self._remembered):
            known = each.known.get(node)
            if each is link or (known and not (each.live and known.here) and known.at < now - TOGETHER):
                each.known.pop(node, None)
                each.doubtful.pop(node, None)

    def _let_go(self, now: float) -> None:
        """Drop what nobody vouches for any longer."""
        # Our own directory says nothing about the way to others, unless there is but one of them.
        others = [link for link in self._links.values() if not link.is_own]
        heard = [link for link in (others if len(others) > 1 else self._links.values())
                 if link.live and now - link.heard < self._lease / 2]  # fmt: skip
        for link in (*self._links.values(), self._remembered):
            if not heard:  # it is we who are away
                link.hold_until = max(link.hold_until, now + self._lease)
                link.doubtful = {node: max(until, now + GRACE) for node, until in link.doubtful.items()}
            elif not link.live and link is not self._remembered:
                if now > link.hold_until:
                    self._drop(link, list(link.known))
                elif link.refused and now - link.broke > REFUSED:
                    self._drop(link, [node for node, known in link.known.items() if known.here])
            if link.live or link is self._remembered:
                self._drop(link, [node for node, until in link.doubtful.items() if now > until])

    def _drop(self, link: _Link, nodes: Iterable[str]) -> None:
        for node in nodes:
            link.known.pop(node, None)
            link.doubtful.pop(node, None)
        self._settle(nodes)

    def _settle(self, nodes: Iterable[str]) -> None:
        """Choose anew whose word on each of these nodes holds."""
        chosen: dict[str, Record | None] = {}
        for node in nodes:
            told = [(link.live, *link.known[node][1:], link.known[node].record)
                    for link in (*self._links.values(), self._remembered) if node in link.known]  # fmt: skip
            chosen[node] = max(told, key=lambda each: each[:3])[3] if told else None
        with self._changed:
            for node, record in chosen.items():
                if record is None:
                    self._stale |= self._far.pop(node, None) is not None
                elif self._far.get(node) != record:
                    self._far[node] = record
                    self._stale = True

    # --- the disk ---

    def _recall(self, service: str) -> None:
        """No directory answers: whoever offered it when one did is taken to do so still."""
        with self._changed:
            self._recalled += self._cache.load(service)
        self.wake()
        with self._changed:
            self._changed.wait_for(lambda: not self._recalled, 1.0)

    def _take_recalled(self, now: float) -> None:
        recalled = list(self._recalled)
        for record in recalled:
            known = self._remembered.known.get(record.node)
            services = {**(known.record.services if known else {}), **record.services}
            idempotent = {**(known.record.idempotent if known else {}), **record.idempotent}
            whole = msgspec.structs.replace(record, services=services, idempotent=idempotent)
            self._remembered.known[record.node] = _Known(whole, False, 0.0)
            self._remembered.doubtful[record.node] = now + GRACE
        self._settle({record.node for record in recalled})
        with self._changed:  # now, and not before: who waits for it publishes what there is
            del self._recalled[: len(recalled)]
            self._changed.notify_all()

    def _save(self) -> None:
        self._saved = view = self._view
        links = self._links.values()
        for service in [each for each in self.wants if any(link.knows(each) for link in links)]:
            parts = (
                trimmed(record, {name}) for record in view or () for name in ([service] if service else record.services)
            )
            self._cache.save(service, [part for part in parts if part is not None])
