"""A network on a virtual clock whose links behave as ZeroMQ's do, and a registry beside it.

Between two sockets order is kept and a message comes whole or not at all. Queues are bounded: a full one refuses. When
a connection ends, what was under way is lost from some point on, and the connecting side is told; the binding side
finds out when it sends (a ROUTER that refuses what it cannot route). Nothing reconnects by itself.

What goes between two sites can be cut (a partition: the connection is noticed to be dead by missing heartbeats) or
held (it stands still, the connection lives), in both directions or in one.

The names and the meaning of the sockets' methods are those of ``onehop.transport.carrier``; ``tests/conformance`` holds
this model and real ZeroMQ to the same rules.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from onehop.interfaces import Record
from onehop.protocol.wire import Body, Frame
from onehop.testing.clock import Clock

HEARTBEAT_EVERY = 2.0
HEARTBEAT_TIMEOUT = 4.5
"""Seconds; as in the option table of ``onehop.transport.sockets``."""
UP_ROOM = 8_192 + 1_024
DOWN_ROOM = 16_384 + 8_192
"""Messages that wait between a link and an inbound socket, and the other way: both high-water marks together."""
LATENCY = (0.0002, 0.002)
"""Seconds between the sending of a message and its arrival: from, to."""

WITHDRAWN_KEPT = 8
"""Records that a registry may show again after they were withdrawn."""

Message = tuple[bytes, bytes | None]

# What else travels on a connection, in order with its messages.
_OPEN = "open"
_END = "end"
_REFUSED = "refused"


def _whole(frame: Frame) -> Message:
    """What arrives: bytes of its own, whatever the sender does with its memory."""
    head, body = (frame, None) if isinstance(frame, bytes) else (frame[0], bytes(frame[1]))
    if not isinstance(head, bytes):
        raise TypeError(f"a frame is bytes, not {type(head).__name__}")
    return head, body


class _Lane:
    """One direction of a connection: what is under way, in order."""

    __slots__ = (
        "blocked",
        "clock",
        "closed",
        "deliver",
        "drawn",
        "items",
        "key",
        "last",
        "latency",
        "planned",
        "slowness",
        "unread",
    )

    def __init__(
        self, clock: Clock, latency: tuple[float, float], deliver: Callable[[Any], None], key: tuple[int, ...]
    ) -> None:
        self.clock = clock
        self.latency = latency
        self.deliver = deliver
        self.key = key
        self.drawn = int(clock.chance(*key) * (1 << 53))
        self.slowness = 0.0
        self.items: deque[tuple[float, Any]] = deque()
        self.last = 0.0
        self.planned = False
        self.blocked = 0
        self.unread = 0
        self.closed = False

    def chance(self) -> float:
        """A number in [0, 1): of this lane's own, so that what is sent elsewhere changes nothing here."""
        self.drawn = (self.drawn * 6364136223846793005 + 1442695040888963407) & ((1 << 64) - 1)
        return (self.drawn >> 11) / (1 << 53)

    def push(self, item: Any) -> None:
        clock = self.clock
        shortest, longest = self.latency
        time = clock.now + shortest + (longest - shortest) * self.chance()
        if self.slowness:
            time += self.slowness * (0.5 + self.chance())
        if time < self.last:
            time = self.last
        self.last = time
        self.items.append((time, item))
        if not self.planned and not self.blocked:
            self.planned = True
            clock.at(time, self.arrive)

    def arrive(self, _: Any = None) -> None:
        self.planned = False
        if self.blocked:
            return
        items, now = self.items, self.clock.now
        while items and items[0][0] <= now:
            self.deliver(items.popleft()[1])
        if items and not self.planned:
            self.planned = True
            self.clock.at(items[0][0], self.arrive)

    def release(self) -> None:
        self.blocked -= 1
        if not self.blocked and self.items and not self.planned:
            self.planned = True
            self.clock.at(max(self.items[0][0], self.clock.now + self.latency[0]), self.arrive)

    def end(self, *, lose: bool) -> None:
        """Nothing more is sent: the end travels behind what still arrives, which is all or, with ``lose``, a part."""
        if self.closed:
            return
        self.closed = True
        if lose and self.items:
            kept = int(self.chance() * (len(self.items) + 1))
            while len(self.items) > kept and self.items[-1][1] is not _OPEN:
                self.items.pop()
        self.push(_END)

    def drop(self) -> None:
        """The far end is gone: what is under way has nowhere to go."""
        self.closed = True
        self.items.clear()


class Link:
    """The connecting end; see ``carrier.LinkSocket``.

    Attributes:
        reader: called with (frame, large body or None) for each message as it arrives; where it is None, messages wait
            for :meth:`drain`.
        on_ended: called with the reason when the connection has ended.
    """

    __slots__ = (
        "_arrived",
        "_down",
        "_ended",
        "_network",
        "_up",
        "cut_since",
        "cuts",
        "endpoint",
        "identity",
        "inbound",
        "number",
        "on_ended",
        "opened_to",
        "reader",
        "site",
    )

    def __init__(self, network: Network, number: int, site: int, inbound_site: int, endpoint: str) -> None:
        self.number = number
        self.endpoint = endpoint
        self.site = site
        self.opened_to = inbound_site
        self.identity = b"\0" + number.to_bytes(4, "big")
        self.inbound: Inbound | None = None
        self.reader: Callable[[bytes, bytes | None], None] | None = None
        self.on_ended: Callable[[str], None] | None = None
        self.cuts = 0
        self.cut_since = 0.0
        self._network = network
        self._arrived: deque[Message] = deque()
        self._ended: str | None = None
        key = site, inbound_site, network.nth(site, inbound_site)
        self._up = _Lane(network.clock, network.latency, self._at_inbound, (*key, 0))
        self._down = _Lane(network.clock, network.latency, self._at_link, (*key, 1))

    # What the application does --------------------------------------------------------------------

    def send(self, frame: Frame) -> bool:
        """Hand ``frame`` over; False when there is no room, or no connection any more."""
        lane = self._up
        if lane.closed or len(lane.items) + lane.unread >= self._network.up_room:
            return False
        self._network.count(self.site)
        lane.push(_whole(frame))
        return True

    def send_large(self, head: bytes, body: Body) -> bool:
        """:meth:`send` of a message whose body rides as a second frame."""
        return self.send((head, body))

    def drain(self, limit: int, into: list[tuple[bytes, Body | None]]) -> bool:
        """Append the messages that are there, at most ``limit``; False when it ran dry."""
        arrived = self._arrived
        while arrived and limit > 0:
            limit -= 1
            self._down.unread -= 1
            into.append(arrived.popleft())
        return bool(arrived)

    def ended(self) -> str | None:
        """Why the connection ended or could not be made; None while it is being made or stands."""
        return self._ended

    def close(self, linger: float) -> None:
        """Give it back. Some of what was under way is lost, unless ``linger`` (seconds) is above 0."""
        if self._ended is None:
            self._ended = "closed here"
            self._down.drop()
            self._up.end(lose=linger <= 0)
            self._network.forget(self)

    # What the network does ------------------------------------------------------------------------

    def _at_inbound(self, item: Any) -> None:
        if type(item) is tuple:
            inbound = self.inbound
            if inbound is None:
                return
            inbound.take(self, item)
            if self._network.duplicates and self._up.chance() < self._network.duplicates:
                if self._up.chance() < 0.5:
                    inbound.take(self, item)
                else:
                    self._network.clock.after(self._up.chance(), self._again, (inbound, item))
        elif item is _OPEN:
            self._network.opened(self)
        else:
            self.inbound_ended()

    def _again(self, of: tuple[Inbound, Message]) -> None:
        if self.inbound is of[0] and not self._up.blocked:
            of[0].take(self, of[1])

    def _at_link(self, item: Any) -> None:
        if type(item) is tuple:
            if self.reader is not None:
                self.reader(*item)
            else:
                self._down.unread += 1
                self._arrived.append(item)
        else:
            self.end("the connection ended" if item is _END else "nobody listens there")

    def end(self, why: str) -> None:
        """The connecting side notices that the connection is over."""
        if self._ended is None:
            self._ended = why
            self._down.drop()
            self._up.end(lose=True)
            self._network.forget(self)
            if self.on_ended is not None:
                self.on_ended(why)

    def inbound_ended(self) -> None:
        """The binding side notices that the connection is over: it forgets the identity, and says nothing."""
        inbound, self.inbound = self.inbound, None
        self._up.drop()
        if inbound is not None:
            inbound.connections.pop(self.identity, None)
        self._network.forget(self)

    def leave(self, *, lose: bool) -> None:
        """The binding side ends the connection."""
        self.inbound_ended()
        self._down.end(lose=lose)

    def refuse(self) -> None:
        """Nobody listens at the other end."""
        self._up.drop()
        self._down.push(_REFUSED)

    def answer(self, frame: Frame) -> bool:
        """A message of the binding side; False when there is no room."""
        lane = self._down
        if lane.closed:
            return True  # handed over to a connection that is ending: lost
        if len(lane.items) + lane.unread >= self._network.down_room:
            return False
        lane.push(_whole(frame))
        return True

    def block(self, cut: Cut) -> None:
        """Stop what ``cut`` stops."""
        up, down = cut.stops(self.site, self.opened_to), cut.stops(self.opened_to, self.site)
        if cut.slowness:
            self._up.slowness += cut.slowness * up
            self._down.slowness += cut.slowness * down
            return
        self._up.blocked += up
        self._down.blocked += down
        if (up or down) and not cut.is_hold:
            self.cuts += 1
            if self.cuts == 1:
                self.cut_since = self._network.clock.now
                self._network.expect_silence(self)

    def unblock(self, cut: Cut) -> None:
        """Let go what :meth:`block` stopped."""
        up, down = cut.stops(self.site, self.opened_to), cut.stops(self.opened_to, self.site)
        if cut.slowness:
            self._up.slowness = max(0.0, self._up.slowness - cut.slowness * up)
            self._down.slowness = max(0.0, self._down.slowness - cut.slowness * down)
            return
        if (up or down) and not cut.is_hold:
            self.cuts -= 1
        if up:
            self._up.release()
        if down:
            self._down.release()

    @property
    def over(self) -> bool:
        """Whether both sides know that it is over."""
        return self._ended is not None and self.inbound is None and not self._up.items


class Inbound:
    """The binding end; see ``carrier.InboundSocket``.

    Attributes:
        reader: called with (identity, frame, large body or None) for each message as it arrives; where it is None,
            messages wait for :meth:`drain`.
    """

    __slots__ = ("_arrived", "_network", "connections", "endpoints", "reader", "site")

    def __init__(self, network: Network, site: int, endpoint: str) -> None:
        self.site = site
        self.endpoints = (endpoint,)
        self.connections: dict[bytes, Link] = {}
        self.reader: Callable[[bytes, bytes, bytes | None], None] | None = None
        self._network = network
        self._arrived: deque[tuple[Link, Message]] = deque()

    def take(self, link: Link, message: Message) -> None:
        """A message arrived."""
        if self.reader is not None:
            self.reader(link.identity, *message)
        else:
            link._up.unread += 1
            self._arrived.append((link, message))

    def send(self, identity: bytes, frame: Frame) -> bool:
        """Hand ``frame`` over to one connection; False when it has no room.

        Raises:
            ConnectionResetError: the connection has ended, as far as is known here.
        """
        link = self.connections.get(identity)
        if link is None:
            raise ConnectionResetError
        self._network.count(self.site)
        return link.answer(frame)

    def send_large(self, identity: bytes, head: bytes, body: Body) -> bool:
        """:meth:`send` of a message whose body rides as a second frame."""
        return self.send(identity, (head, body))

    def drain(self, limit: int, into: list[tuple[bytes, bytes, Body | None]]) -> bool:
        """Append the messages that are there, at most ``limit``; False when it ran dry."""
        arrived = self._arrived
        while arrived and limit > 0:
            limit -= 1
            link, message = arrived.popleft()
            link._up.unread -= 1
            into.append((link.identity, *message))
        return bool(arrived)

    def close(self, linger: float) -> None:
        """Give it back; what was handed over still leaves where ``linger`` (seconds) is above 0."""
        self._network.unbind(self)
        for link in list(self.connections.values()):
            link.leave(lose=linger <= 0)


class Cut:
    """Something between sites that stops what goes from ``a`` to ``b`` (and back, unless ``one_way``).

    Args:
        b: None for all that are not in ``a``.
        is_hold: connections live on, as those of a process that does not read.
        slowness: where it is above 0, what it would stop takes about so many seconds more instead.
    """

    __slots__ = ("_a", "_b", "_one_way", "is_hold", "slowness")

    def __init__(
        self, a: Iterable[int], b: Iterable[int] | None, *, one_way: bool, is_hold: bool, slowness: float = 0.0
    ) -> None:
        self.slowness = slowness
        self._a = frozenset(a)
        self._b = None if b is None else frozenset(b)
        self._one_way = one_way
        self.is_hold = is_hold

    def stops(self, source: int, target: int) -> bool:
        """Whether it stops what goes from ``source`` to ``target``."""
        return self._parts(source, target) or (not self._one_way and self._parts(target, source))

    def _parts(self, source: int, target: int) -> bool:
        return source in self._a and (target not in self._a if self._b is None else target in self._b)


class Network:
    """All sockets of a simulation.

    Args:
        clock: of the world.
        latency: seconds a message takes, from and to.

    Attributes:
        duplicates: the share of messages to inbound sockets that arrive twice, at once or within a second. ZeroMQ never
            does that; a receiver must bear it all the same.
        sent: messages sent, by site.
        opened_links: connections begun so far.
        stopped: sites whose process is stopped: they read and write nothing, and notice nothing.
    """

    def __init__(self, clock: Clock, latency: tuple[float, float] = LATENCY) -> None:
        self.clock = clock
        self.latency = latency
        self.up_room = UP_ROOM
        self.down_room = DOWN_ROOM
        self.duplicates = 0.0
        self.sent: dict[int, int] = {}
        self.opened_links = 0
        self.stopped: set[int] = set()
        self._opened: dict[tuple[int, int], int] = {}
        self._links: dict[int, Link] = {}
        self._bound: dict[str, Inbound] = {}
        self._sites: dict[str, int] = {}
        self._cuts: list[Cut] = []

    def count(self, site: int) -> None:
        """One more message of ``site``."""
        self.sent[site] = self.sent.get(site, 0) + 1

    def bind(self, site: int, endpoint: str) -> Inbound:
        """Listen at ``endpoint``, which is at ``site``."""
        inbound = self._bound[endpoint] = Inbound(self, site, endpoint)
        self._sites[endpoint] = site
        return inbound

    def connect(self, site: int, endpoint: str) -> Link:
        """Begin a connection from ``site``; whether it comes about is told by :meth:`Link.ended`."""
        self.opened_links += 1
        link = Link(self, self.opened_links, site, self._sites.get(endpoint, -1), endpoint)
        self._links[link.number] = link
        for cut in self._cuts:
            link.block(cut)
        link._up.push(_OPEN)
        return link

    def cut(
        self,
        a: Iterable[int],
        b: Iterable[int] | None,
        *,
        one_way: bool = False,
        is_hold: bool = False,
        slowness: float = 0.0,
    ) -> Cut:
        """Stop, or slow down, what goes between the sites ``a`` and ``b``, until :meth:`mend`."""
        cut = Cut(a, b, one_way=one_way, is_hold=is_hold, slowness=slowness)
        self._cuts.append(cut)
        for link in list(self._links.values()):
            link.block(cut)
        return cut

    def mend(self, cut: Cut) -> None:
        """End ``cut``; what it stopped arrives, as far as the connection still stands."""
        if cut in self._cuts:
            self._cuts.remove(cut)
            for link in list(self._links.values()):
                link.unblock(cut)

    def nth(self, site: int, inbound_site: int) -> int:
        """How many connections from ``site`` to ``inbound_site`` were begun, with one that begins now."""
        number = self._opened[site, inbound_site] = self._opened.get((site, inbound_site), 0) + 1
        return number

    def reset(self, sites: Iterable[int]) -> None:
        """End every connection of ``sites`` from outside, while the processes live on."""
        of = frozenset(sites)
        for link in list(self._links.values()):
            if link.site in of or link.opened_to in of:
                self.disconnect(link)

    def disconnect(self, link: Link) -> None:
        """End one connection from outside, as a network does: both sides notice, and what was under way is lost."""
        if link.inbound is not None:
            link.leave(lose=True)
        else:
            link.refuse()

    # Told by the sockets --------------------------------------------------------------------------

    def opened(self, link: Link) -> None:
        """A connection reached its endpoint."""
        inbound = self._bound.get(link.endpoint)
        if inbound is None:
            link.refuse()
        else:
            link.inbound = inbound
            inbound.connections[link.identity] = link

    def unbind(self, inbound: Inbound) -> None:
        """Nobody listens there any more."""
        if self._bound.get(inbound.endpoints[0]) is inbound:  # another may listen there by now
            del self._bound[inbound.endpoints[0]]

    def forget(self, link: Link) -> None:
        """Forget a connection that is over on both sides."""
        if link.over:
            self._links.pop(link.number, None)

    def expect_silence(self, link: Link) -> None:
        """A cut began: each side counts the connection as ended when no heartbeat was answered."""
        for side in (self._link_silent, self._inbound_silent):
            wait = HEARTBEAT_TIMEOUT + HEARTBEAT_EVERY * link._up.chance()
            self.clock.after(wait, side, (link, self.clock.now))

    def _link_silent(self, of: tuple[Link, float]) -> None:
        link, since = of
        if link.cuts and link.cut_since == since:
            if link.site in self.stopped:
                self.clock.after(HEARTBEAT_TIMEOUT, self._link_silent, of)
            else:
                link.end("no heartbeat was answered")

    def _inbound_silent(self, of: tuple[Link, float]) -> None:
        link, since = of
        if link.cuts and link.cut_since == since and link.inbound is not None:
            if link.opened_to in self.stopped:
                self.clock.after(HEARTBEAT_TIMEOUT, self._inbound_silent, of)
            else:
                link.leave(lose=True)


class Watcher(Protocol):
    """Who watches a registry."""

    seen_version: int

    @property
    def index(self) -> int: ...

    def learn(self, records: tuple[Record, ...]) -> None:
        """There is a new view."""


class VirtualRegistry:
    """Where the records live: the local registry, seen from every node with a delay.

    A record vanishes when its node dies. Each node notices a change after a time of its own, several at once.

    Args:
        notice: seconds until a node notices: from, to.
    """

    def __init__(self, clock: Clock, notice: tuple[float, float] = (0.02, 0.3)) -> None:
        self.is_away = False
        self.version = 0
        self.told = 0
        self._clock = clock
        self._notice = notice
        self._records: dict[str, Record] = {}
        self._withdrawn: deque[Record] = deque(maxlen=WITHDRAWN_KEPT)
        self._deaf: dict[int, None] = {}
        self._view: tuple[Record, ...] | None = None
        self._watchers: dict[Watcher, None] = {}
        self._pending: dict[Watcher, None] = {}

    def view(self) -> tuple[Record, ...]:
        """All records, in a stable order."""
        if self._view is None:
            self._view = tuple(sorted(self._records.values(), key=lambda record: record.node))
        return self._view

    def announce(self, record: Record) -> None:
        """Publish ``record``."""
        self._records[record.node] = record
        self._changed()

    def withdraw(self, node: str) -> None:
        """Take a record back."""
        record = self._records.pop(node, None)
        if record is not None:
            self._withdrawn.append(record)
            self._changed()

    def lapse(self, node: str) -> Record | None:
        """Lose the record of a node that lives, as when a lease ran out; returns it, for :meth:`announce`."""
        record = self._records.get(node)
        self.withdraw(node)
        return record

    def recall(self) -> list[Record]:
        """Show the last withdrawn records again, as one that was restored from an old copy does; returns them."""
        returned = [record for record in self._withdrawn if record.node not in self._records]
        for record in returned:
            self._records[record.node] = record
        self._changed()
        return returned

    def deafen(self, index: int) -> None:
        """Tell the nodes of that index nothing, until :meth:`hear`."""
        self._deaf[index] = None

    def hear(self, index: int) -> None:
        """Tell them what they missed."""
        if self._deaf.pop(index, self) is None:
            for watcher in list(self._watchers):
                if watcher.index == index:
                    self.refresh(watcher)

    def watch(self, watcher: Watcher) -> None:
        """Tell ``watcher`` the view: now, and soon after each change."""
        self._watchers[watcher] = None
        self._tell(watcher)

    def leave(self, watcher: Watcher) -> None:
        """Tell ``watcher`` nothing more."""
        self._watchers.pop(watcher, None)
        self._pending.pop(watcher, None)

    def refresh(self, watcher: Watcher) -> None:
        """Tell ``watcher`` at once what it has not noticed yet."""
        if watcher.seen_version != self.version:
            self._tell(watcher)

    def come_back(self) -> None:
        """The registry is there again after it was away."""
        self.is_away = False
        self._changed()

    def _changed(self) -> None:
        self._view = None
        self.version += 1
        if self.is_away:
            return
        shortest, longest = self._notice
        for watcher in self._watchers:
            if watcher not in self._pending:
                self._pending[watcher] = None
                drawn = self._clock.chance(watcher.index, int(self._clock.now * 1e6))
                self._clock.after(shortest + (longest - shortest) * drawn, self._due, watcher)

    def _due(self, watcher: Watcher) -> None:
        if self._pending.pop(watcher, self) is None:
            self.refresh(watcher)

    def _tell(self, watcher: Watcher) -> None:
        if not self.is_away and watcher.index not in self._deaf:
            self.told += 1
            watcher.seen_version = self.version
            watcher.learn(self.view())
